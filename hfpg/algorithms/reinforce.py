"""REINFORCE (Williams 1992) with a baseline, on reward-to-go."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hfpg.algorithms.critic import last_values, values_of
from hfpg.algorithms.method import Method, State, whole_returns
from hfpg.config import field, refuse_unread, require
from hfpg.ops.baselines import RunningMean, leave_one_out, update_running_mean
from hfpg.ops.objectives import policy_gradient, value_error
from hfpg.ops.returns import rewards_to_go
from hfpg.types import Estimates, Rollout, Scored, TokenLoss


Baseline = Literal["none", "ema", "batch", "group", "greedy", "input", "value"]


@dataclass(frozen=True)
class ReinforceState(State):
    """And the running mean of the return."""

    return_total: float = 0.0
    return_weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Reinforce(Method):
    """One optimizer step per rollout on −(G_t − b) log π(y_t): an unbiased gradient of the expected reward.

    Baselines: `none`; `ema`, the running mean of past returns; `batch`, the mean return of the batch's other rows;
    `group`, the mean return of the prompt's other samples (needs num_generations ≥ 2); `greedy`, the score of the
    prompt's greedy completion; `input`, the score of the prompt itself; `value`, a learned V(s_t). None of them
    depends on the action it is subtracted from. `group` and `batch` compare whole returns.
    """

    paper: ClassVar[str] = "Williams 1992, Machine Learning 8"
    formula: ClassVar[str] = "L_t = −(G_t − b) log π(y_t),  G_t = Σ_{l ≥ t} γ^{l−t} r_l"
    bias: ClassVar[str] = "unbiased for ∇J with every baseline (aggregation=sequence_sum, γ = 1)"

    baseline: Baseline = field("ema", "What is subtracted from the return.")
    ema_decay: float = field(0.9, "Decay of the running mean, per step.")
    gamma: float = field(1.0, "γ: discount per token.")
    value_coef: float = field(0.1, "c₁: weight of the value error, with baseline='value'.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.baseline != "group" or self.num_generations >= 2,
            f"baseline='group' compares the samples of one prompt, and num_generations={self.num_generations} leaves "
            "nothing to compare with; set it to 4, or use baseline='ema'",
        )
        require(0 <= self.ema_decay < 1, f"ema_decay={self.ema_decay} must be at least 0 and below 1, such as 0.9")
        for name, reader in (("ema_decay", "ema"), ("value_coef", "value")):
            if self.baseline != reader:
                refuse_unread(
                    self, f"read only with baseline={reader!r}, and it is {self.baseline!r}; remove it", name
                )
        require(0 < self.gamma <= 1, f"gamma={self.gamma} must be above 0 and at most 1")
        require(
            self.truncation != "mask" or self.baseline == "group",
            f"baseline={self.baseline!r} with truncation='mask' pays for ending, or for not ending: among completions "
            "that ended only the mean of the same prompt's others keeps the direction; use baseline='group' with "
            "num_generations=4 (RLOO), or truncation='terminal' with missing_eos_penalty",
        )

    @property
    def value(self) -> Literal["shared"] | None:
        """The value head that this method needs."""
        return "shared" if self.baseline == "value" else None

    @property
    def extra_baseline(self) -> Literal["greedy", "input"] | None:
        """Scores beside those of the samples."""
        return self.baseline if self.baseline in ("greedy", "input") else None  # type: ignore[return-value]

    def init(self) -> ReinforceState:
        """The state before the first step."""
        return ReinforceState(kl_coef=self.kl_coef)

    def estimate(
        self, rollout: Rollout, rewards: Float[Tensor, "B C"], state: ReinforceState
    ) -> tuple[Estimates, ReinforceState]:
        """A_t = G_t − b with G the reward-to-go (with truncation='mask' the whole return).

        The running mean takes this batch in after it has served as b.
        """
        mask, weights = rollout.completion_mask, rollout.weights
        returns = rewards_to_go(rewards, mask, self.gamma, last_values(rollout, self.truncation))
        if self.truncation == "mask":
            returns = whole_returns(returns, rollout)
        running = RunningMean(state.return_total, state.return_weight)
        advantages = torch.where(mask, returns - self._baseline(rollout, returns, running), 0)
        if self.baseline == "ema":
            running = update_running_mean(running, returns[:, 0], rollout.new_weights * (weights > 0), self.ema_decay)
            state = replace(state, return_total=running.total, return_weight=running.weight)
        credit = Estimates(self.corrected(advantages, rollout), returns if self.baseline == "value" else None)
        return credit, state

    def _baseline(self, rollout: Rollout, returns: Float[Tensor, "B C"], running: RunningMean) -> Tensor:
        """b, [B, C] or [B, 1]. It never depends on the row's own token at t or after it."""
        if self.baseline == "none":
            return torch.zeros_like(returns)
        if self.baseline == "ema":
            return torch.full_like(returns, running.mean)
        if self.baseline == "value":
            return values_of(rollout, "baseline='value'")
        if self.baseline in ("greedy", "input"):
            assert rollout.baseline_scores is not None  # the trainer gets it because `extra_baseline` is set
            return rollout.baseline_scores.nan_to_num(0.0)[:, None]  # a prompt that nobody could score has b = 0
        groups = rollout.group_ids if self.baseline == "group" else None
        return leave_one_out(returns[:, 0], rollout.weights, groups)[:, None]

    def loss(self, new: Scored, rows: Rollout, credit: Estimates, state: State | None = None) -> TokenLoss:
        """L_t = −A_t log π(y_t) (+ c₁ · value error) − c₂ · entropy."""
        policy = policy_gradient(new.logprobs, credit.advantages)
        if new.values is None or credit.returns is None:
            return self.regularized(policy, {}, new, rows, state)
        error = value_error(new.values, credit.returns)
        total, metrics = self.regularized(policy, {"value_error": error}, new, rows, state)
        return TokenLoss(total + self.value_coef * error, metrics)


@dataclass(frozen=True, kw_only=True)
class RLOO(Reinforce):
    """REINFORCE whose baseline is the mean of the prompt's other samples (Ahmadian et al. 2024, arXiv 2402.14740)."""

    paper: ClassVar[str] = "Ahmadian et al. 2024, arXiv 2402.14740; Kool et al. 2019"
    formula: ClassVar[str] = "L_t = −(G_t − mean of the other samples' returns) log π(y_t)"
    bias: ClassVar[str] = (
        "unbiased for ∇J (aggregation=sequence_sum): the sample covariance of return and score function"
    )

    num_generations: int = field(4, "K: completions per prompt, at least 2.")
    baseline: Baseline = field("group", "What is subtracted from the return.")


@dataclass(frozen=True, kw_only=True)
class ReMax(Reinforce):
    """REINFORCE whose baseline is the score of the greedy completion (Li et al. 2023, arXiv 2310.10505)."""

    paper: ClassVar[str] = (
        "Li et al. 2023, arXiv 2310.10505; self-critical training, Rennie et al. 2016, arXiv 1612.00563"
    )
    formula: ClassVar[str] = "L_t = −(G_t − score of the greedy completion) log π(y_t)"
    bias: ClassVar[str] = "unbiased for ∇J (aggregation=sequence_sum): the baseline depends on the prompt only"

    baseline: Baseline = field("greedy", "What is subtracted from the return.")
