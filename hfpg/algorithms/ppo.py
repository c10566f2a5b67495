"""Proximal policy optimization (Schulman et al. 2017, arXiv 1707.06347) on language models (arXiv 1909.08593)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hfpg.algorithms.clipped import Clipped
from hfpg.algorithms.critic import Critic
from hfpg.algorithms.method import State
from hfpg.config import field, require
from hfpg.ops.masked import Aggregation
from hfpg.ops.objectives import value_error
from hfpg.types import Estimates, Rollout, Scored, TokenLoss


@dataclass(frozen=True, kw_only=True)
class PPO(Clipped, Critic):
    """Several epochs of minibatches on the clipped surrogate, with a value function and advantages by GAE."""

    paper: ClassVar[str] = "Schulman et al. 2017, arXiv 1707.06347"
    formula: ClassVar[str] = (
        "L_t = −min(ρ_t A_t, clip(ρ_t, 1 ± ε) A_t) + c₁ ½ (V(s_t) − R_t)² − c₂ H_t,  A by GAE(γ, λ)"
    )
    bias: ClassVar[str] = (
        "first step: ∇J exactly at λ = 1, aggregation=sequence_sum, without whitening, for any V; biased by "
        "token_mean (the default), by λ < 1 until V is good, and after the first step by clipping"
    )

    epochs: int = field(4, "Passes over each rollout.")
    whiten_advantages: bool = field(True, "Advantages to mean 0 and std 1 over all tokens of the rollout.")
    value_clip_range: float | None = field(None, "Clip values to V_old ± this; depends on the reward's scale. Off.")
    aggregation: Aggregation = field("token_mean", "How per-token losses become one number.")

    def __post_init__(self) -> None:
        super().__post_init__()
        bound = self.value_clip_range
        require(bound is None or bound > 0, f"value_clip_range={bound} must be above 0, or absent")

    def loss(self, new: Scored, rows: Rollout, credit: Estimates, state: State | None = None) -> TokenLoss:
        """L_t = clipped surrogate + c₁ · value error − c₂ · entropy (eq. 9 of the paper, negated)."""
        assert new.values is not None and credit.returns is not None
        policy, metrics = self.surrogate(new, rows, credit.advantages)
        error = value_error(new.values, credit.returns, rows.values, self.value_clip_range)
        total, metrics = self.regularized(policy, metrics | {"value_error": error}, new, rows, state)
        return TokenLoss(total + self.value_coef * error, metrics)
