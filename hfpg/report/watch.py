"""What a run watches its judges for: over-optimisation (Gao et al. 2022), and scores that tell nothing apart."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any


Column = Sequence[float | None]
"""One score per completion; None where nobody could say."""

APART = 3.0  # standard errors; the best of n evaluations is the luckiest of n, so 2 would fire on noise
IN_A_ROW = 2  # evaluations, before over-optimisation is said
CONSTANT_STEPS = 3  # before it is said


@dataclass(frozen=True)
class Watch:
    """The best evaluation so far by the metric of `keep_best_by`, a judge that training never sees."""

    name: str = ""  # the metric that is watched
    best: float | None = None
    best_step: int = 0
    best_proxy: list[float | None] = field(default_factory=list)  # per held-out prompt: what is optimised
    best_gold: list[float | None] = field(default_factory=list)  # and what is watched
    falling: int = 0  # evaluations in a row in which the two have parted since the best

    @staticmethod
    def resumed(saved: Mapping[str, Any], name: str) -> Watch:
        """The watch that a checkpoint holds, or a new one where that watched another metric."""
        known = {f.name for f in dataclasses.fields(Watch)}
        return Watch(**{k: v for k, v in saved.items() if k in known}) if saved.get("name") == name else Watch(name)


def seen(watch: Watch, step: int, value: float, proxy: Column, gold: Column) -> tuple[Watch, bool]:
    """The watch after one more evaluation, and whether it is the best so far (the first is).

    `value` is the watched metric; `proxy` and `gold` are the scores of the held-out prompts, in the same order at
    every evaluation. The two have parted where proxy > best_proxy and gold < best_gold, each by more than APART
    standard errors.
    """
    if watch.best is None or value > watch.best:
        new = replace(watch, best=value, best_step=step, best_proxy=list(proxy), best_gold=list(gold), falling=0)
        return new, True
    up, down = standard_errors(proxy, watch.best_proxy), standard_errors(gold, watch.best_gold)
    return replace(watch, falling=watch.falling + 1 if up > APART and down < -APART else 0), False


def standard_errors(now: Column, then: Column) -> float:
    """mean(d) / (std(d) / √n), where d_i = now_i − then_i: what differs between prompts cancels.

    0 where fewer than two prompts were scored both times, or other prompts than then.
    """
    pairs = zip(now, then, strict=True) if len(now) == len(then) else ()
    d = [a - b for a, b in pairs if a is not None and b is not None]
    if len(d) < 2 or fmean(d) == 0:
        return 0.0
    error = stdev(d) / math.sqrt(len(d))
    return fmean(d) / error if error > 0 else math.copysign(math.inf, fmean(d))


Constant = dict[str, tuple[float, int]]
"""Reward functions that gave all completions of a step one score: the last one, and for how many steps in a row."""


def constant(before: Constant, by_function: Mapping[str, Column]) -> Constant:
    """The same after one more step; a function that scored fewer than two completions of it begins anew."""
    after: Constant = {}
    for name, column in by_function.items():
        scores = [score for score in column if score is not None]
        if len(scores) > 1 and min(scores) == max(scores):
            after[name] = (scores[0], before.get(name, (0.0, 0))[1] + 1)
    return after
