"""Synchronous advantage actor-critic (Mnih et al. 2016, arXiv 1602.01783) with GAE (arXiv 1506.02438)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hfpg.algorithms.critic import Critic
from hfpg.algorithms.method import State
from hfpg.config import field
from hfpg.ops.masked import Aggregation
from hfpg.ops.objectives import policy_gradient, value_error
from hfpg.types import Estimates, Rollout, Scored, TokenLoss


@dataclass(frozen=True, kw_only=True)
class A2C(Critic):
    """One optimizer step per rollout on −A_t log π(y_t), A by GAE from a value function that learns beside it."""

    paper: ClassVar[str] = "Mnih et al. 2016, arXiv 1602.01783; Schulman et al. 2016, arXiv 1506.02438"
    formula: ClassVar[str] = "L_t = −A_t log π(y_t) + c₁ ½ (V(s_t) − R_t)² − c₂ H_t,  A by GAE(γ, λ)"
    bias: ClassVar[str] = (
        "∇J exactly at λ = 1 and aggregation=sequence_sum, for any V; with the exact V at every λ; token_mean (the "
        "default) divides by a random length"
    )

    aggregation: Aggregation = field("token_mean", "How per-token losses become one number.")

    def loss(self, new: Scored, rows: Rollout, credit: Estimates, state: State | None = None) -> TokenLoss:
        """L_t = −A_t log π(y_t) + c₁ · value error − c₂ · entropy."""
        assert new.values is not None and credit.returns is not None
        policy = policy_gradient(new.logprobs, credit.advantages)
        error = value_error(new.values, credit.returns)
        total, metrics = self.regularized(policy, {"value_error": error}, new, rows, state)
        return TokenLoss(total + self.value_coef * error, metrics)
