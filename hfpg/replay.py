"""Rollouts of past steps that are used again, with weights for what the policy has become since."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from hfpg.ops.importance import effective_sample_size
from hfpg.types import Rollout, join


REPLAY_FILE = "replay.safetensors"
WARN_BELOW, DROP_BELOW = 0.5, 0.1  # of the effective sample size


class Replay:
    """The last `size` rollouts, oldest first, the same on every rank.

    Args:
        size: rollouts kept; 0: none.
        say: where warnings go.
    """

    def __init__(self, size: int, say: Callable[[str], None]):
        self.size, self.say = size, say
        self.rollouts: list[Rollout] = []
        self._kept: list[Rollout] = []  # those that the step in hand uses

    def add_to(self, rollout: Rollout, rescore: Callable[[Rollout], Rollout]) -> tuple[Rollout, dict[str, float]]:
        """The rollout and the stored ones, scored by the policy as it is now (`rescore`), as one; and metrics.

        A stored rollout whose effective sample size has fallen below 0.1 leaves for good; below 0.5 it is said. What
        is stored changes with `turn` only, when the update is done.

        effective_sample_size   (Σw)² / (N Σw²) of the sequence weights of all rows in use
        replayed                rows of past steps in use
        """
        again, self._kept = [], []
        for stored in self.rollouts:
            scored = rescore(stored)
            size = self._effective(scored)
            if size < DROP_BELOW:
                self.say(f"a stored rollout is dropped: its effective sample size is {size:.2f}, below {DROP_BELOW}")
                continue
            if size < WARN_BELOW:
                self.say(f"the effective sample size of a stored rollout is {size:.2f}: the policy moved far from it")
            again.append(scored)
            self._kept.append(stored)
        together = join([_mark(r, True) for r in again] + [_mark(rollout, False)]) if again else rollout
        size = self._effective(together)
        if not again and size < WARN_BELOW:
            self.say(f"effective sample size {size:.2f}: what samples is far from the policy that is trained")
        return together, {
            "effective_sample_size": size,
            "replayed": float(sum(len(r) for r in again)),
        }

    @staticmethod
    def _effective(rollout: Rollout) -> float:
        assert rollout.behaviour_logprobs is not None
        log_ratio = rollout.old_logprobs - rollout.behaviour_logprobs
        return float(effective_sample_size(log_ratio, rollout.completion_mask, rollout.weights))

    def turn(self, rollout: Rollout) -> None:
        """A step is done: keep its rollout for the coming ones, in place of the oldest."""
        if self.size:
            kept = replace(
                rollout,
                behaviour_logprobs=rollout.sampler_logprobs,
                prompt_states=None,  # large, and soon made again
                completion_states=None,
            )
            self.rollouts = [*self._kept, kept][-self.size :]

    def state(self) -> dict[str, Tensor]:
        """Everything that is kept, as plain tensors `NUMBER|FIELD`."""
        return {
            f"{number}|{field.name}": getattr(rollout, field.name)
            .detach()
            .cpu()
            .clone()
            .contiguous()  # two fields may share one tensor
            for number, rollout in enumerate(self.rollouts)
            for field in dataclasses.fields(rollout)
            if getattr(rollout, field.name) is not None
        }

    def load(self, folder: Path, device: torch.device) -> None:
        """Put back what `state` gave, from a checkpoint folder; a checkpoint without the file kept nothing."""
        self.rollouts = []
        if not (folder / REPLAY_FILE).is_file():
            return
        found: dict[int, dict[str, Tensor]] = {}
        for name, tensor in load_file(folder / REPLAY_FILE).items():
            number, _, field = name.partition("|")
            found.setdefault(int(number), {})[field] = tensor.to(device)
        self.rollouts = [Rollout(**found[number]) for number in sorted(found)]


def _mark(rollout: Rollout, stored: bool) -> Rollout:
    return replace(rollout, stored=torch.full_like(rollout.finished, stored))
