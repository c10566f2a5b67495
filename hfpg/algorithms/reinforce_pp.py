"""REINFORCE++ (Hu 2025, arXiv 2501.03262): REINFORCE with PPO's clip and whitened advantages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from hfpg.algorithms.clipped import Clipped
from hfpg.algorithms.method import MASKED, S, State
from hfpg.config import field, require
from hfpg.ops.masked import Aggregation, center_and_scale
from hfpg.ops.returns import rewards_to_go
from hfpg.types import Estimates, Rollout, Scored, TokenLoss


@dataclass(frozen=True, kw_only=True)
class ReinforcePlusPlus(Clipped):
    """Reward-to-go of r_t = 1[t is last] · score − β k1_t, whitened over all tokens of the rollout, then clipped.

    One completion per prompt is enough: what a completion is compared with is the whole rollout.
    """

    paper: ClassVar[str] = "Hu 2025, arXiv 2501.03262"
    formula: ClassVar[str] = "L_t = −min(ρ_t A_t, clip(ρ_t, 1 ± ε) A_t),  A_t = (G_t − mean) / std over all tokens"
    bias: ClassVar[str] = (
        "not ∇J: mean and std of the same rollout (a factor of about 1/std, and O(1/N)), and a random number of "
        "tokens in the denominator; without whitening and with aggregation=sequence_sum the first step is ∇J"
    )

    gamma: float = field(1.0, "γ: discount per token.")
    whiten_advantages: bool = field(True, "Advantages to mean 0 and std 1 over all tokens of the rollout.")
    aggregation: Aggregation = field("token_mean", "How per-token losses become one number.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.gamma <= 1, f"gamma={self.gamma} must be above 0 and at most 1")

    def warnings(self, fresh_value_head: bool) -> list[str]:
        """A mean over the rollout where completions are left out."""
        return [*super().warnings(fresh_value_head), *([MASKED] if self.truncation == "mask" else [])]

    def estimate(self, rollout: Rollout, rewards: Float[Tensor, "B C"], state: S) -> tuple[Estimates, S]:
        """A_t: the reward-to-go, whitened over all tokens that count."""
        advantages = rewards_to_go(rewards, rollout.completion_mask, self.gamma)
        if self.whiten_advantages:
            advantages = center_and_scale(advantages, rollout.completion_mask, rollout.weights)
        return Estimates(self.corrected(advantages, rollout)), state

    def loss(self, new: Scored, rows: Rollout, credit: Estimates, state: State | None = None) -> TokenLoss:
        """The clipped surrogate, + β · KL with kl_in='loss', − c₂ · entropy."""
        policy, metrics = self.surrogate(new, rows, credit.advantages)
        return self.regularized(policy, metrics, new, rows, state)
