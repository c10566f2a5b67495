"""REINFORCE (Williams 1992) with a baseline, on reward-to-go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from hfpg.algorithms.kl_control import check_kl, next_kl_coef
from hfpg.config import check_choices, field, require
from hfpg.learner import Learner
from hfpg.ops.baselines import RunningMean, group_leave_one_out, leave_one_out, update_running_mean
from hfpg.ops.masked import Aggregation
from hfpg.ops.objectives import policy_gradient, value_error
from hfpg.ops.returns import rewards_to_go
from hfpg.types import Estimates, Rollout, Scored, TokenLoss


@dataclass(frozen=True)
class ReinforceState:
    """What changes from step to step: the KL coefficient and the running mean of the return."""

    kl_coef: float
    return_total: float = 0.0
    return_weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """One optimizer step per rollout on −(G_t − b) log π(y_t): an unbiased gradient of the expected reward.

    Baselines: `none`; `ema`, the running mean of past returns; `batch`, the mean return of the batch's other rows;
    `group`, the mean return of the prompt's other samples (needs num_generations ≥ 2); `value`, a learned V(s_t). None
    of them depends on the action it is subtracted from.
    """

    num_generations: int = field(1, "K: completions per prompt.")
    baseline: Literal["none", "ema", "batch", "group", "value"] = field("ema", "What is subtracted from the return.")
    ema_decay: float = field(0.9, "Decay of the running mean, per step.")
    gamma: float = field(1.0, "γ: discount per token.")
    value_coef: float = field(0.1, "c₁: weight of the value error, with baseline='value'.")
    entropy_coef: float = field(0.0, "c₂: weight of the entropy bonus; watch `entropy`.")
    kl_coef: float = field(0.05, "β: price of a nat of KL to the reference, in the reward; watch `kl_to_ref`.")
    kl_target: float | None = field(None, "Adapt β toward this KL, in nats per completion. Off.")
    aggregation: Aggregation = field("sequence_sum", "How per-token losses become one number.")

    def __post_init__(self) -> None:
        check_choices(self)
        check_kl(self.kl_coef, self.kl_target)
        require(self.num_generations >= 1, f"num_generations={self.num_generations} must be at least 1")
        require(
            self.baseline != "group" or self.num_generations >= 2,
            f"baseline='group' compares the samples of one prompt, and num_generations={self.num_generations} leaves "
            "nothing to compare with; set it to 4, or use baseline='ema'",
        )
        require(0 <= self.ema_decay < 1, f"ema_decay={self.ema_decay} must be at least 0 and below 1, such as 0.9")
        require(0 < self.gamma <= 1, f"gamma={self.gamma} must be above 0 and at most 1")

    @property
    def value(self) -> Literal["shared"] | None:
        """The value head that this method needs."""
        return "shared" if self.baseline == "value" else None

    minibatches: ClassVar[int] = 1

    def init(self) -> ReinforceState:
        """The state before the first step."""
        return ReinforceState(kl_coef=self.kl_coef)

    def estimate(
        self, rollout: Rollout, rewards: torch.Tensor, state: ReinforceState
    ) -> tuple[Estimates, ReinforceState]:
        """A_t = G_t − b with G the reward-to-go. The running mean takes this batch in after it has served as b."""
        returns = rewards_to_go(rewards, rollout.completion_mask, self.gamma)
        running = RunningMean(state.return_total, state.return_weight)
        if self.baseline == "none":
            baseline = torch.zeros_like(returns)
        elif self.baseline == "ema":
            baseline = torch.full_like(returns, running.mean)
            running = update_running_mean(running, returns[:, 0], rollout.weights, self.ema_decay)
        elif self.baseline == "batch":
            baseline = leave_one_out(returns, rollout.weights)
        elif self.baseline == "group":
            baseline = group_leave_one_out(returns, rollout.weights, rollout.group_ids)
        else:
            assert rollout.values is not None  # the trainer builds a value head because `value` is set
            baseline = rollout.values
        advantages = torch.where(rollout.completion_mask, returns - baseline, 0)
        state = replace(state, return_total=running.total, return_weight=running.weight)
        return Estimates(advantages, returns if self.baseline == "value" else None), state

    def loss(self, new: Scored, rows: Rollout, credit: Estimates) -> TokenLoss:
        """L_t = −A_t log π(y_t) (+ c₁ · value error) − c₂ · entropy."""
        total = policy = policy_gradient(new.logprobs, credit.advantages)
        metrics = {"policy_loss": policy}
        if new.values is not None and credit.returns is not None:
            metrics["value_error"] = value_error(new.values, credit.returns)
            total = total + self.value_coef * metrics["value_error"]
        if self.entropy_coef and new.entropy is not None:
            total = total - self.entropy_coef * new.entropy
        return TokenLoss(total, metrics)

    def update(
        self, learner: Learner, rollout: Rollout, credit: Estimates, state: ReinforceState
    ) -> tuple[dict[str, float], ReinforceState]:
        """One optimizer step, then the KL coefficient's next value."""
        metrics = learner.optimize(
            rollout, credit, self.loss, aggregation=self.aggregation, with_entropy=self.entropy_coef != 0
        )
        return metrics, replace(state, kl_coef=next_kl_coef(state.kl_coef, self.kl_target, rollout))


@dataclass(frozen=True, kw_only=True)
class RLOO(Reinforce):
    """REINFORCE whose baseline is the mean of the prompt's other samples (Ahmadian et al. 2024, arXiv 2402.14740)."""

    num_generations: int = field(4, "K: completions per prompt, at least 2.")
    baseline: Literal["none", "ema", "batch", "group", "value"] = field("group", "What is subtracted from the return.")
