"""Trust-region policy optimization (Schulman et al. 2015, arXiv 1502.05477) on language models."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hfpg.algorithms.critic import last_values, values_of
from hfpg.algorithms.method import MASKED, Method, S, State, whole_returns
from hfpg.config import TrainConfig, field, refuse_unread, require
from hfpg.learner import Learner
from hfpg.natural import Fisher, natural_step
from hfpg.ops.baselines import leave_one_out
from hfpg.ops.masked import Aggregation
from hfpg.ops.objectives import surrogate, value_error
from hfpg.ops.returns import gae, rewards_to_go
from hfpg.types import Estimates, Rollout, Scored, TokenLoss


@dataclass(frozen=True, kw_only=True)
class TRPO(Method):
    """One natural-gradient step per rollout, as long as the KL to the old policy allows.

    maximise Σ_t ρ_t A_t  subject to  Σ_t KL(π_old(·|s_t) ‖ π(·|s_t)) ≤ max_kl, nats per completion, exact over the
    vocabulary. A is the return less the mean of the prompt's other samples, or GAE with a critic of its own trunk.
    """

    paper: ClassVar[str] = "Schulman et al. 2015, arXiv 1502.05477; Kakade 2001"
    formula: ClassVar[str] = "max Σ_t ρ_t A_t  s.t.  Σ_t KL(π_old ‖ π) ≤ δ;  step = √(2δ / xᵀFx) x,  (F + λI) x = g"
    bias: ClassVar[str] = (
        "g is ∇J exactly (leave-one-out, or λ = 1 with any V); the step is F⁻¹g scaled: another direction, by design"
    )

    num_generations: int = field(4, "K: completions per prompt; at least 2 without a critic.")
    aggregation: Aggregation = field("sequence_sum", "Only sequence_sum: the trust region is per completion.")
    critic: Literal["none", "separate", "shared"] = field(
        "none", "none: leave-one-out of the prompt's samples. separate: V on a trunk of its own, and GAE."
    )
    max_kl: float = field(0.01, "δ: bound of the exact KL to the old policy, nats per completion; `trust_region_kl`.")
    damping: float = field(0.1, "λ as a share of the Fisher matrix' mean eigenvalue.")
    cg_iterations: int = field(10, "Conjugate-gradient steps, one Fisher product each; watch `cg_residual`.")
    backtrack: float = field(0.8, "Each try of the line search is this share of the one before.")
    backtrack_steps: int = field(10, "Tries of the line search; watch `line_search_failures`.")
    fisher: Fisher = field(
        "auto", "Fisher products by differentiating twice (exact), by finite_difference, or as a first try says."
    )
    gamma: float = field(1.0, "γ: discount per token.")
    lam: float = field(1.0, "λ of GAE, with a critic.")
    value_epochs: int = field(1, "Passes of the critic over each rollout, after the policy's step.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.critic != "shared",
            "critic='shared' puts V on the policy's trunk: training it moves the policy outside the trust region; use "
            "critic='separate', or 'none'",
        )
        require(
            self.critic != "none" or self.num_generations >= 2,
            f"TRPO without a critic compares the samples of one prompt, and num_generations={self.num_generations} "
            "leaves nothing to compare with; set it to 4, or use critic='separate'",
        )
        if self.critic == "none":
            refuse_unread(self, "the critic's, and critic='none'; use critic='separate'", "lam", "value_epochs")
        require(
            self.entropy_coef == 0 and (self.kl_in == "reward" or self.kl_coef == 0),
            "an entropy bonus or a KL in the surrogate would make the step another one than the trust region was made "
            "for; use kl_in='reward' and entropy_coef=0",
        )
        require(
            self.aggregation == "sequence_sum",
            f"aggregation={self.aggregation!r}: TRPO sums over a completion, as its trust region does; use "
            "'sequence_sum'",
        )
        require(
            self.replay == 0,
            f"replay={self.replay} brings in prefixes that the old policy did not reach, and the trust region is an "
            "average over those that it did; use replay=0, or PPO",
        )
        for name in ("max_kl", "damping"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be above 0, such as 0.01")
        for name in ("cg_iterations", "backtrack_steps", "value_epochs"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        require(0 < self.backtrack < 1, f"backtrack={self.backtrack} must lie between 0 and 1, such as 0.8")
        require(0 <= self.lam <= 1, f"lam={self.lam} must lie between 0 and 1")
        require(0 < self.gamma <= 1, f"gamma={self.gamma} must be above 0 and at most 1")

    @property
    def value(self) -> Literal["separate"] | None:
        """The value head that the method needs."""
        return "separate" if self.critic == "separate" else None

    def check_run(self, args: TrainConfig) -> None:
        """Refuse settings of the run that break the trust region."""
        require(
            not args.bf16,
            "bf16=True: the KL of a step of 0.01 nats is lost in bfloat16; train TRPO with bf16=False",
        )
        default = TrainConfig.max_grad_norm
        require(
            self.critic == "separate" or args.max_grad_norm == default,
            f"max_grad_norm={args.max_grad_norm} clips gradients, and the length of TRPO's step is max_kl; remove it",
        )

    def warnings(self, fresh_value_head: bool) -> list[str]:
        """What else the run's settings do not do."""
        own = "the critic's" if self.critic == "separate" else "nobody's"
        found = [*super().warnings(fresh_value_head), f"TRPO's step is as long as max_kl says; learning_rate is {own}"]
        if self.truncation == "mask" and self.critic == "separate":
            found.append(MASKED)
        return found

    def estimate(self, rollout: Rollout, rewards: Float[Tensor, "B C"], state: S) -> tuple[Estimates, S]:
        """A_t = G_t − mean of the other samples' returns; or GAE(γ, λ), with returns A + V for the critic."""
        mask, after = rollout.completion_mask, last_values(rollout, self.truncation)
        if self.critic == "none":
            returns = rewards_to_go(rewards, mask, self.gamma, after)
            if self.truncation == "mask":
                returns = whole_returns(returns, rollout)
            others = leave_one_out(returns[:, 0], rollout.weights, rollout.group_ids)
            advantages = torch.where(mask, returns - others[:, None], 0)
            return Estimates(self.corrected(advantages, rollout)), state
        values = values_of(rollout, "critic='separate'")
        advantages = gae(rewards, values, mask, self.gamma, self.lam, after)
        returns = torch.where(mask, advantages + values, 0)
        return Estimates(self.corrected(advantages, rollout), returns), state

    def loss(self, new: Scored, rows: Rollout, credit: Estimates, state: State | None = None) -> TokenLoss:
        """−ρ_t A_t (eq. 14 of the paper, negated)."""
        policy = surrogate(new.logprobs - rows.old_logprobs, credit.advantages)
        return TokenLoss(policy, {"policy_loss": policy})

    def value_loss(self, new: Scored, rows: Rollout, credit: Estimates) -> TokenLoss:
        """½ (V(s_t) − R_t)²."""
        assert new.values is not None and credit.returns is not None
        error = value_error(new.values, credit.returns)
        return TokenLoss(error, {"value_error": error})

    def update(self, learner: Learner, rollout: Rollout, credit: Estimates, state: S) -> tuple[dict[str, float], S]:
        """The policy's natural step, then the critic's optimizer steps."""
        settings: dict[str, Any] = dict(max_kl=self.max_kl, damping=self.damping, cg_iterations=self.cg_iterations)
        settings |= dict(backtrack=self.backtrack, backtrack_steps=self.backtrack_steps, fisher=self.fisher)
        loss = functools.partial(self.loss, state=state)
        metrics = natural_step(learner, rollout, credit, loss, **settings)
        if self.critic == "separate":
            fitted = learner.optimize(
                rollout, credit, self.value_loss, aggregation="token_mean", epochs=self.value_epochs, train="value"
            )
            metrics |= {"value_error": fitted["value_error"]} if fitted["optimizer_steps"] else {}
        return metrics, self.next_state(rollout, state)
