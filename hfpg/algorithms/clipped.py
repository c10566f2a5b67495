"""What the methods share that take several optimizer steps on one rollout: the clipped surrogate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from hfpg.algorithms.method import Method, State
from hfpg.config import field, require
from hfpg.ops.kl import k3
from hfpg.ops.objectives import clip_fraction, clipped_surrogate, ratio
from hfpg.types import Rollout, Scored


@dataclass(frozen=True, kw_only=True)
class Clipped(Method):
    """Epochs of minibatches on −min(ρA, clip(ρ)A) (PPO, arXiv 1707.06347, eq. 7)."""

    epochs: int = field(1, "Passes over each rollout.")
    minibatches: int = field(1, "Optimizer steps per pass; must divide prompts × K.")
    clip_range: float = field(0.2, "ε: the ratio is clipped to 1 ± ε; watch `clip_fraction`.")
    clip_range_high: float | None = field(None, "Upper ε (clip-higher); default: clip_range.")
    dual_clip: float | None = field(None, "c > 1: bounds the loss where the advantage is negative; 3 is usual.")
    max_kl: float | None = field(None, "End the update when a minibatch's mean kl_to_old per token exceeds this. Off.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.clip_range < 1, f"clip_range={self.clip_range} must lie between 0 and 1, such as 0.2")
        for name in ("clip_range_high", "max_kl"):
            bound = getattr(self, name)
            require(bound is None or bound > 0, f"{name}={bound} must be above 0, or absent")
        high = self.clip_range if self.clip_range_high is None else self.clip_range_high
        require(
            self.dual_clip is None or self.dual_clip > 1 + high,
            f"dual_clip={self.dual_clip} must exceed 1 + the upper clip range, {1 + high}; 3 is usual",
        )

    def surrogate(
        self, new: Scored, rows: Rollout, advantages: Float[Tensor, "B C"]
    ) -> tuple[Float[Tensor, "B C"], dict[str, Tensor]]:
        """The policy's loss per token, and how far it has moved: clip_fraction, kl_to_old (k3), ratio."""
        log_ratio = new.logprobs - rows.old_logprobs
        policy = clipped_surrogate(log_ratio, advantages, self.clip_range, self.clip_range_high, self.dual_clip)
        clipped = clip_fraction(log_ratio, advantages, self.clip_range, self.clip_range_high)
        return policy, {"clip_fraction": clipped, "kl_to_old": k3(-log_ratio), "ratio": ratio(log_ratio)}

    def schedule(self, state: State) -> dict[str, Any]:
        """Epochs × minibatches optimizer steps, unless a KL stop ends them."""
        own = dict(epochs=self.epochs, minibatches=self.minibatches, max_kl=self.max_kl)
        schedule = super().schedule(state) | own
        schedule["skip_zero"] &= self.max_kl is None  # the KL that stops is a mean over all rows
        return schedule
