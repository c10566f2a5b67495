"""From samples and scores to a rollout: old and reference log-probs, entropy and values, on every rank."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch

from hfpg.checkpoint import RunState
from hfpg.distributed import gather_rows
from hfpg.generation.hf import HFGenerator
from hfpg.learner import Learner, OldScores, captured
from hfpg.micro_batches import balance
from hfpg.pretrained import causal_lm
from hfpg.report.clock import Clock
from hfpg.types import Rollout, Samples, Scores


logger = logging.getLogger(__name__)

SAMPLER_TOLERANCE = 1e-5  # between sampling and scoring in single precision, of the largest log-prob: rounding is 1e-6
LONGER = 1.5  # times the longest text that was compared


class Rescorer:
    """Completes rollouts.

    In single precision hfpg's own sampler has already said what the scoring forward would say. It is believed after a
    comparison at the first step of the run, and again when texts are much longer than any compared so far (a window, a
    scaled position, is not seen in short ones). The result is part of the run's state.

    Args:
        learner: scores, and holds policy, reference and settings.
        algorithm: says whether it needs the value after the last token.
        generator: who draws the samples now.
        clock: counts the seconds of `rescore`.
        run: the state of the run.
        say: where warnings go.
    """

    def __init__(
        self,
        learner: Learner,
        algorithm: Any,
        generator: Callable[[], Any],
        clock: Clock,
        run: Callable[[], RunState],
        say: Callable[[str], None],
    ):
        self.learner, self.generator, self.clock, self.run, self.say = learner, generator, clock, run, say
        self.accelerator = learner.accelerator
        self.bootstraps = getattr(algorithm, "truncation", "terminal") == "bootstrap"

    @property
    def comparable(self) -> bool:
        """True where the sampler may be believed: another may say what it likes, and bfloat16 rounds ratios away."""
        return (
            self.learner.args.trust_sampler
            and isinstance(self.generator(), HFGenerator)
            and self.accelerator.mixed_precision == "no"
            and causal_lm(self.learner.actor.policy).dtype.itemsize >= 4
            and not self.bootstraps
        )

    def rollout(self, samples: Samples, scores: Scores) -> Rollout:
        """The rollout of this rank's samples and every other's, in sample-id order."""
        with self.clock.phase("rescore"):
            nothing = torch.zeros(samples.completion_ids.shape, device=samples.completion_ids.device)
            judged = {f.name: getattr(scores, f.name) for f in dataclasses.fields(scores)}
            mine = Rollout(
                **{f.name: getattr(samples, f.name) for f in dataclasses.fields(samples)},
                **{name: value for name, value in judged.items() if name not in ("by_function", "extra")},
                old_logprobs=nothing,
                entropy=nothing,
            )
            return gather_rows(self.accelerator, self._scored(mine, self._believed(mine)))

    def again(self, stored: Rollout) -> Rollout:
        """A stored rollout by the policy as it is now, on every rank."""
        with self.clock.phase("rescore"):
            rows = balance(stored.lengths, self.accelerator.num_processes)[self.accelerator.process_index]
            return gather_rows(self.accelerator, self._scored(stored.take(rows), None))

    def _scored(self, rows: Rollout, given: OldScores | None) -> Rollout:
        old = self.learner.score(rows, self.bootstraps, given)
        names = {"old_logprobs": "logprobs"}
        filled = [f.name for f in dataclasses.fields(rows) if names.get(f.name, f.name) in OldScores._fields]
        return dataclasses.replace(rows, **{name: getattr(old, names.get(name, name)) for name in filled})

    def _believed(self, rows: Rollout) -> OldScores | None:
        """What the sampler says of its tokens, where it may stand for the scoring forward."""
        given, run = captured(rows), self.run()
        shared = self.learner.actor.value_kind == "shared"
        if not self.comparable or given is None or (shared and given.values is None):
            return None
        longest = self._longest(rows)
        believed = run.sampler_gap is not None and run.sampler_gap <= SAMPLER_TOLERANCE
        if run.sampler_gap is None or (believed and longest > LONGER * run.sampler_length):
            run.sampler_length = longest
            run.sampler_gap = max(self.learner.gap(rows), run.sampler_gap or 0.0)
            logger.info("sampling and scoring differ by at most %.1e of the largest log-prob", run.sampler_gap)
            if run.sampler_gap > SAMPLER_TOLERANCE:
                self.say(
                    f"sampling and scoring differ by {run.sampler_gap:.1e} of the largest log-prob, more "
                    f"than {SAMPLER_TOLERANCE}: old log-probs are scored again at every step"
                )
        return given if run.sampler_gap <= SAMPLER_TOLERANCE else None

    def _longest(self, rows: Rollout) -> int:
        """Tokens of the longest prompt with its completion, over all ranks."""
        mine = rows.lengths.max() if len(rows) else torch.zeros((), dtype=torch.long)
        return int(self.accelerator.gather(mine.to(self.accelerator.device)[None]).max())
