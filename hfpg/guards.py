"""What is said of a step's scores, and what ends a run that learns nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hfpg.config import GuardStop
from hfpg.report.completions import shown
from hfpg.report.watch import CONSTANT_STEPS, Constant, constant
from hfpg.rewards.check import look
from hfpg.types import Rollout


STUCK_STEPS = 3  # in a row without a change of the policy, before the run ends


class Guards:
    """Watches a run, step by step.

    Args:
        stop_constant: ends the run after so many steps in which no judge told completions apart; 0: never.
        scoring: names of the reward functions whose weight is not 0.
        say: where warnings go.
    """

    def __init__(self, stop_constant: int, scoring: Sequence[str], say: Callable[[str], None]):
        self.stop_constant, self.scoring, self.say = stop_constant, scoring, say
        self.looked = False  # at a step's scores
        self.said_dropped = False
        self.constant: Constant = {}  # reward functions that tell nothing apart
        self.stuck = 0  # steps in a row
        self.broken = False  # the policy: nothing of it is to be kept

    def counts(self) -> dict[str, Any]:
        """How many steps in a row, for a checkpoint: a resumed run counts on."""
        return {"constant": self.constant, "stuck": self.stuck}

    def resume(self, counts: Mapping[str, Any]) -> None:
        """Go on from the `counts` of a checkpoint; from none where it is older than they are."""
        self.constant = {name: (value, steps) for name, (value, steps) in counts.get("constant", {}).items()}
        self.stuck = counts.get("stuck", 0)

    def first_scores(self, rollout: Rollout, tokenizer: Any) -> None:
        """Say what the run's first scores already tell about the judge; see `hfpg reward check`."""
        if self.looked:
            return
        self.looked = True
        texts: list[Any] = [completion for _, completion, _ in shown(rollout, tokenizer)]
        lengths = rollout.completion_mask.sum(1)
        for text in look(rollout.scores, rollout.weights, lengths, texts, rollout.group_ids).warnings():
            self.say(f"note on the reward: {text}")

    def scores(self, said: Mapping[str, Any]) -> None:
        """Say it when failures drop completions, and when scores tell nothing apart.

        Args:
            said: what the collector keeps of the judge's answer: `errors`, `rows`, `by_function`.
        Raises:
            GuardStop: for `stop_constant` steps every function that counts gave every completion the same.
        """
        if said["errors"] and not self.said_dropped:
            self.said_dropped = True
            count = f"{len(said['errors'])} of {said['rows']} completions of this step"
            self.say(f"warning: {count} were dropped; the first: {said['errors'][0]} (watch `dropped`)")
        self.constant = constant(self.constant, said["by_function"])
        flat = [f"reward function {name!r} gave every completion {v:g}" for name, (v, _) in self.constant.items()]
        for text, (_, steps) in zip(flat, self.constant.values(), strict=True):
            if steps == CONSTANT_STEPS:
                self.say(f"warning: {text}, {steps} steps in a row: nothing can be learnt from it")
        limit = self.stop_constant
        if limit and all(self.constant.get(name, (0.0, 0))[1] >= limit for name in self.scoring):
            raise GuardStop(
                f"stop_constant={limit} steps in a row taught nothing: {'; '.join(flat)}. Look at the judge with "
                "`hfpg reward check`, or sample more widely (temperature, num_generations)"
            )

    def policy(self, rollout: Rollout) -> None:
        """GuardStop when the policy gives tokens that it has just drawn no finite log-prob."""
        bad = ~torch.isfinite(rollout.old_logprobs) & rollout.completion_mask
        if bad.any():
            self.broken = True
            raise GuardStop(
                f"the policy is broken: it gives {int(bad.sum())} of {int(rollout.completion_mask.sum())} tokens a "
                "log-prob that is not finite. Go on from an older checkpoint with a smaller learning_rate"
            )

    def weights(self, parameters: Iterable[Tensor]) -> None:
        """GuardStop when weights are not finite."""
        if not all(bool(torch.isfinite(p).all()) for p in parameters):
            self.broken = True
            raise GuardStop(
                "the policy is broken: weights that are not finite are not saved. Go on from an older checkpoint with "
                "a smaller learning_rate"
            )

    def update(self, failed: bool) -> None:
        """Count how many steps in a row have failed to change the policy."""
        self.stuck = self.stuck + 1 if failed else 0

    def changes(self) -> None:
        """GuardStop when the updates of STUCK_STEPS steps in a row failed."""
        if self.stuck >= STUCK_STEPS:
            raise GuardStop(
                f"{STUCK_STEPS} steps in a row changed nothing: their gradients were not finite, or no completion was "
                "scored; look at loss, grad_norm and unscored in metrics.jsonl, and try a smaller learning_rate"
            )
