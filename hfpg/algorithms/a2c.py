"""Synchronous advantage actor-critic (Mnih et al. 2016, arXiv 1602.01783) with GAE (arXiv 1506.02438)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from hfpg.algorithms.critic import credit_by_values
from hfpg.algorithms.kl_control import check_kl, next_kl_coef
from hfpg.config import check_choices, field, require
from hfpg.learner import Learner
from hfpg.ops.masked import Aggregation
from hfpg.ops.objectives import policy_gradient, value_error
from hfpg.types import Estimates, Rollout, Scored, TokenLoss


@dataclass(frozen=True)
class A2CState:
    """What changes from step to step."""

    kl_coef: float


@dataclass(frozen=True, kw_only=True)
class A2C:
    """One optimizer step per rollout on −A_t log π(y_t), A by GAE from a value function that learns beside it."""

    num_generations: int = field(1, "K: completions per prompt.")
    gamma: float = field(1.0, "γ: discount per token.")
    lam: float = field(1.0, "λ of GAE: below 1 less variance, and bias until the value function is good.")
    whiten_advantages: bool = field(False, "Advantages to mean 0 and std 1 over all tokens of the rollout.")
    value: Literal["shared", "separate"] = field(
        "shared", "Value head on the policy's trunk, or on a trunk of its own."
    )
    value_coef: float = field(0.1, "c₁: weight of the value error in the loss; watch `explained_variance`.")
    entropy_coef: float = field(0.0, "c₂: weight of the entropy bonus; watch `entropy`.")
    kl_coef: float = field(0.05, "β: price of a nat of KL to the reference, in the reward; watch `kl_to_ref`.")
    kl_target: float | None = field(None, "Adapt β toward this KL, in nats per completion. Off.")
    aggregation: Aggregation = field("token_mean", "How per-token losses become one number.")

    minibatches: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_choices(self)
        check_kl(self.kl_coef, self.kl_target)
        require(self.num_generations >= 1, f"num_generations={self.num_generations} must be at least 1")
        require(0 <= self.lam <= 1, f"lam={self.lam} must lie between 0 and 1")
        require(0 < self.gamma <= 1, f"gamma={self.gamma} must be above 0 and at most 1")

    def init(self) -> A2CState:
        """The state before the first step."""
        return A2CState(kl_coef=self.kl_coef)

    def estimate(self, rollout: Rollout, rewards: torch.Tensor, state: A2CState) -> tuple[Estimates, A2CState]:
        """Advantages by GAE and returns A + V, from token rewards [B, C]."""
        return credit_by_values(rollout, rewards, self.gamma, self.lam, self.whiten_advantages), state

    def loss(self, new: Scored, rows: Rollout, credit: Estimates) -> TokenLoss:
        """L_t = −A_t log π(y_t) + c₁ · value error − c₂ · entropy."""
        assert new.values is not None and credit.returns is not None
        policy = policy_gradient(new.logprobs, credit.advantages)
        value = value_error(new.values, credit.returns)
        total = policy + self.value_coef * value
        if self.entropy_coef and new.entropy is not None:
            total = total - self.entropy_coef * new.entropy
        return TokenLoss(total, {"policy_loss": policy, "value_error": value})

    def update(
        self, learner: Learner, rollout: Rollout, credit: Estimates, state: A2CState
    ) -> tuple[dict[str, float], A2CState]:
        """One optimizer step, then the KL coefficient's next value."""
        metrics = learner.optimize(
            rollout, credit, self.loss, aggregation=self.aggregation, with_entropy=self.entropy_coef != 0
        )
        return metrics, replace(state, kl_coef=next_kl_coef(state.kl_coef, self.kl_target, rollout))
