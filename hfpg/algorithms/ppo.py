"""Proximal policy optimization (Schulman et al. 2017, arXiv 1707.06347) on language models (arXiv 1909.08593)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from hfpg.algorithms.critic import credit_by_values
from hfpg.algorithms.kl_control import check_kl, next_kl_coef
from hfpg.config import check_choices, field, require
from hfpg.learner import Learner
from hfpg.ops.kl import k3
from hfpg.ops.masked import Aggregation
from hfpg.ops.objectives import clip_fraction, clipped_surrogate, ratio, value_error
from hfpg.types import Estimates, Rollout, Scored, TokenLoss


@dataclass(frozen=True)
class PPOState:
    """What changes from step to step."""

    kl_coef: float


@dataclass(frozen=True, kw_only=True)
class PPO:
    """Several epochs of minibatches on the clipped surrogate, with a value function and advantages by GAE.

    λ = 1 by default: unbiased for any value function, which a fresh head needs.
    """

    num_generations: int = field(1, "K: completions per prompt.")
    epochs: int = field(4, "Passes over each rollout.")
    minibatches: int = field(1, "Optimizer steps per pass; must divide prompts × K.")
    clip_range: float = field(0.2, "ε: the ratio is clipped to 1 ± ε; watch `clip_fraction`.")
    clip_range_high: float | None = field(None, "Upper ε (clip-higher); default: clip_range.")
    dual_clip: float | None = field(None, "c > 1: bounds the loss where the advantage is negative; 3 is usual.")
    gamma: float = field(1.0, "γ: discount per token.")
    lam: float = field(1.0, "λ of GAE: below 1 less variance, and bias until the value function is good.")
    whiten_advantages: bool = field(True, "Advantages to mean 0 and std 1 over all tokens of the rollout.")
    value: Literal["shared", "separate"] = field(
        "shared", "Value head on the policy's trunk, or on a trunk of its own."
    )
    value_coef: float = field(0.1, "c₁: weight of the value error in the loss; watch `explained_variance`.")
    value_clip_range: float | None = field(None, "Clip values to V_old ± this; depends on the reward's scale. Off.")
    entropy_coef: float = field(0.0, "c₂: weight of the entropy bonus; watch `entropy`.")
    kl_coef: float = field(0.05, "β: price of a nat of KL to the reference, in the reward; watch `kl_to_ref`.")
    kl_target: float | None = field(None, "Adapt β toward this KL, in nats per completion. Off.")
    max_kl: float | None = field(None, "End the update when a minibatch's mean kl_to_old per token exceeds this. Off.")
    aggregation: Aggregation = field("token_mean", "How per-token losses become one number.")

    def __post_init__(self) -> None:
        check_choices(self)
        check_kl(self.kl_coef, self.kl_target)
        for name in ("num_generations", "epochs", "minibatches"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        require(0 < self.clip_range < 1, f"clip_range={self.clip_range} must lie between 0 and 1, such as 0.2")
        for name in ("clip_range_high", "value_clip_range", "max_kl"):
            bound = getattr(self, name)
            require(bound is None or bound > 0, f"{name}={bound} must be above 0, or absent")
        require(0 <= self.lam <= 1, f"lam={self.lam} must lie between 0 and 1")
        require(0 < self.gamma <= 1, f"gamma={self.gamma} must be above 0 and at most 1")
        high = self.clip_range if self.clip_range_high is None else self.clip_range_high
        require(
            self.dual_clip is None or self.dual_clip > 1 + high,
            f"dual_clip={self.dual_clip} must exceed 1 + the upper clip range {1 + high}; 3 is usual",
        )

    def init(self) -> PPOState:
        """The state before the first step."""
        return PPOState(kl_coef=self.kl_coef)

    def estimate(self, rollout: Rollout, rewards: torch.Tensor, state: PPOState) -> tuple[Estimates, PPOState]:
        """Advantages by GAE and returns A + V, from token rewards [B, C]. Whitening is over the whole rollout."""
        return credit_by_values(rollout, rewards, self.gamma, self.lam, self.whiten_advantages), state

    def loss(self, new: Scored, rows: Rollout, credit: Estimates) -> TokenLoss:
        """L_t = clipped surrogate + c₁ · value error − c₂ · entropy (eq. 9 of the paper, negated)."""
        assert new.values is not None and credit.returns is not None
        log_ratio = new.logprobs - rows.old_logprobs
        policy = clipped_surrogate(log_ratio, credit.advantages, self.clip_range, self.clip_range_high, self.dual_clip)
        value = value_error(new.values, credit.returns, rows.values, self.value_clip_range)
        total = policy + self.value_coef * value
        if self.entropy_coef and new.entropy is not None:
            total = total - self.entropy_coef * new.entropy
        clipped = clip_fraction(log_ratio, credit.advantages, self.clip_range, self.clip_range_high)
        return TokenLoss(
            total,
            {
                "policy_loss": policy,
                "value_error": value,
                "clip_fraction": clipped,
                "kl_to_old": k3(-log_ratio),
                "ratio": ratio(log_ratio),
            },
        )

    def update(
        self, learner: Learner, rollout: Rollout, credit: Estimates, state: PPOState
    ) -> tuple[dict[str, float], PPOState]:
        """Epochs × minibatches optimizer steps, unless a KL stop ends them; then the KL coefficient's next value."""
        metrics = learner.optimize(
            rollout,
            credit,
            self.loss,
            aggregation=self.aggregation,
            epochs=self.epochs,
            minibatches=self.minibatches,
            max_kl=self.max_kl,
            with_entropy=self.entropy_coef != 0,
        )
        return metrics, replace(state, kl_coef=next_kl_coef(state.kl_coef, self.kl_target, rollout))
