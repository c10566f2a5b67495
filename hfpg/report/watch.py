"""A judge that training never saw: the best model by it is kept, and over-optimisation is said (Gao et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Watch:
    """What evaluations have shown so far, by the metric of `keep_best_by`."""

    name: str = ""  # the metric that is watched
    best: float | None = None
    best_step: int = 0
    proxy: float | None = None  # of the last evaluation: what is optimised
    gold: float | None = None  # and what is watched
    falling: int = 0  # evaluations in a row in which the proxy rose and the gold fell


def seen(watch: Watch, step: int, proxy: float, gold: float) -> tuple[Watch, bool]:
    """The watch after one more evaluation, and whether it is the best so far (the first is)."""
    best = watch.best is None or gold > watch.best
    apart = watch.proxy is not None and watch.gold is not None and proxy > watch.proxy and gold < watch.gold
    after = replace(watch, proxy=proxy, gold=gold, falling=watch.falling + 1 if apart else 0)
    return (replace(after, best=gold, best_step=step) if best else after), best
