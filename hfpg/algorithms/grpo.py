"""GRPO (Shao et al. 2024, arXiv 2402.03300) and its family: settings of one method, each with a name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hfpg.algorithms.clipped import Clipped
from hfpg.algorithms.kl_control import KLEstimator
from hfpg.algorithms.method import S, State
from hfpg.config import field, refuse_unread, require
from hfpg.ops.baselines import accompanied, group_mean, group_std, leave_one_out
from hfpg.ops.kl import k3
from hfpg.ops.masked import Aggregation
from hfpg.ops.objectives import cispo, clip_fraction, clipped_surrogate, ratio, sequence_log_ratio
from hfpg.types import Estimates, Rollout, Scored, TokenLoss


STD_EPSILON = 1e-4  # added to the standard deviation; smaller ones blow rounding errors up into advantages


@dataclass(frozen=True, kw_only=True)
class GRPO(Clipped):
    """Advantages from comparing the K completions of a prompt; no value function.

    A_i = (R_i − mean) / (std + 1e-4) over the prompt's completions, on every token of completion i. A group of equal
    returns has advantage 0, exactly.
    """

    paper: ClassVar[str] = "Shao et al. 2024, arXiv 2402.03300"
    formula: ClassVar[str] = "L_t = −min(ρ_t A_i, clip(ρ_t, 1 ± ε) A_i) + β k3_t,  A_i = (R_i − mean_g) / std_g"
    bias: ClassVar[str] = (
        "not ∇J: dividing by std_g weights prompts by their difficulty, the mean per sequence favours short right and "
        "long wrong completions, and k3 in the loss is another objective than KL in the reward"
    )

    num_generations: int = field(8, "K: completions per prompt, at least 2.")
    baseline: Literal["group", "leave_one_out"] = field(
        "group", "Mean return of the group with the sample itself, or without it (unbiased)."
    )
    scale: Literal["none", "group", "batch"] = field("group", "Standard deviation that advantages are divided by.")
    objective: Literal["clip", "cispo"] = field("clip", "Clipped surrogate, or capped weights on log π (CISPO).")
    importance: Literal["token", "sequence"] = field("token", "Ratio per token, or its geometric mean (GSPO).")
    is_cap: float | None = field(None, "Largest ratio ρ with objective='cispo', absolute; 5 is usual.")
    resample_rounds: int = field(0, "Dynamic sampling: draw again for groups of equal scores, at most so many times.")
    kl_coef: float = field(0.04, "β: weight of the KL to the reference; watch `kl_to_ref`. 0: no reference.")
    kl_in: Literal["reward", "loss"] = field("loss", "Where the KL enters; see docs/numerics.md.")
    kl_estimator: KLEstimator = field("k3", "k1 in the reward; k2_sequence, k2, k3 or full in the loss.")
    aggregation: Aggregation = field("sequence_mean", "How per-token losses become one number.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.num_generations >= 2,
            f"{type(self).__name__} compares the samples of one prompt, and num_generations={self.num_generations} "
            "leaves nothing to compare with; set it to 8, or use Reinforce(baseline='ema')",
        )
        require(
            self.scale != "group" or self.baseline != "leave_one_out",
            "baseline='leave_one_out' with scale='group' divides by a spread that is next to 0 when the others agree, "
            "so that advantages explode; use scale='none' or 'batch'",
        )
        require(self.resample_rounds >= 0, f"resample_rounds={self.resample_rounds} must be 0 (off) or more")
        self._check_objective()

    def _check_objective(self) -> None:
        require(
            self.objective != "cispo" or self.is_cap is not None,
            "objective='cispo' caps the ratio at is_cap, which is absolute and has no default here; is_cap=5 is usual",
        )
        require(
            self.is_cap is None or self.objective == "cispo",
            f"is_cap={self.is_cap} is the largest ratio of objective='cispo'; with objective={self.objective!r} "
            "clip_range is what counts: remove it",
        )
        require(
            self.is_cap is None or self.is_cap >= 1,
            f"is_cap={self.is_cap} is the largest ratio, and must be at least 1, such as 5",
        )
        if self.objective == "cispo":
            refuse_unread(self, "not read with objective='cispo', whose only bound is is_cap; remove it", "clip_range")
        clips = [name for name in ("dual_clip", "clip_range_high") if getattr(self, name) is not None]
        require(
            self.objective != "cispo" or not clips,
            f"objective='cispo' clips no loss, so {' and '.join(clips)} would do nothing; remove it, or use "
            "objective='clip'",
        )
        require(
            self.objective != "cispo" or self.importance == "token",
            "objective='cispo' weighs every token by its own ratio; use importance='token'",
        )

    def warnings(self, fresh_value_head: bool) -> list[str]:
        """A sequence ratio hardly moves: clip ranges of token ratios never clip it."""
        found = super().warnings(fresh_value_head)
        if self.importance == "sequence" and self.clip_range > 0.05:
            found.append(
                f"clip_range={self.clip_range} with importance='sequence' never clips: a geometric mean over the "
                "sequence stays near 1; the paper takes 3e-4 and clip_range_high 4e-4"
            )
        return found

    def estimate(self, rollout: Rollout, rewards: Float[Tensor, "B C"], state: S) -> tuple[Estimates, S]:
        """A_i = (R_i − b) / scale on every chosen token; R_i is the completion's whole return."""
        returns, weights, groups = rewards.sum(1), rollout.weights, rollout.group_ids
        compare = group_mean if self.baseline == "group" else leave_one_out
        advantages = returns - compare(returns, weights, groups)
        if self.scale != "none":
            std = group_std(returns, weights, groups if self.scale == "group" else None)
            advantages = advantages / (std + STD_EPSILON)
        counts = weights > 0
        if self.truncation == "mask":
            counts = counts & accompanied(weights, groups)  # see `whole_returns`
        spread = torch.where(rollout.completion_mask & counts[:, None], advantages[:, None], 0)
        return Estimates(self.corrected(spread, rollout)), state

    @property
    def token_local(self) -> bool:
        """A ratio of sequences is every token's."""
        return super().token_local and self.importance == "token"

    def loss(self, new: Scored, rows: Rollout, credit: Estimates, state: State | None = None) -> TokenLoss:
        """The clipped surrogate with a token or sequence ratio, or CISPO; + β · KL − c₂ · entropy."""
        log_ratio = new.logprobs - rows.old_logprobs
        if self.objective == "cispo":
            assert self.is_cap is not None
            policy = cispo(new.logprobs, log_ratio, credit.advantages, self.is_cap)
            clipped = (ratio(log_ratio) > self.is_cap).to(policy.dtype)
        else:
            by = log_ratio
            if self.importance == "sequence":
                by = sequence_log_ratio(log_ratio, rows.completion_mask)
            bounds = (self.clip_range, self.clip_range_high)
            policy = clipped_surrogate(by, credit.advantages, *bounds, self.dual_clip)
            clipped = clip_fraction(by, credit.advantages, *bounds)
        moved = {"clip_fraction": clipped, "kl_to_old": k3(-log_ratio), "ratio": ratio(log_ratio)}
        return self.regularized(policy, moved, new, rows, state)


@dataclass(frozen=True, kw_only=True)
class DrGRPO(GRPO):
    """GRPO without its two biases: no division by the spread, and a constant for the length (arXiv 2503.20783)."""

    paper: ClassVar[str] = "Liu et al. 2025, arXiv 2503.20783"
    formula: ClassVar[str] = "L_t = −min(ρ_t A_i, clip(ρ_t, 1 ± ε) A_i) / C,  A_i = R_i − mean_g"
    bias: ClassVar[str] = "first step: ∇J · (K − 1) / (K · max_completion_length), the exact direction"

    scale: Literal["none", "group", "batch"] = field("none", "Standard deviation that advantages are divided by.")
    aggregation: Aggregation = field("constant", "How per-token losses become one number.")
    kl_coef: float = field(0.0, "β: weight of the KL to the reference; 0: no reference.")


@dataclass(frozen=True, kw_only=True)
class DAPO(GRPO):
    """GRPO with clip-higher, token mean, dynamic sampling and a soft penalty near the length limit."""

    paper: ClassVar[str] = "Yu et al. 2025, arXiv 2503.14476"
    formula: ClassVar[str] = "L_t = −min(ρ_t A_i, clip(ρ_t, 1 − ε, 1 + ε_high) A_i),  A_i = (R_i − mean_g) / std_g"
    bias: ClassVar[str] = (
        "not ∇J: divided by std_g, by a random number of tokens, and without the prompts whose completions all score "
        "the same"
    )

    num_generations: int = field(16, "K: completions per prompt, at least 2.")
    clip_range_high: float | None = field(0.28, "Upper ε (clip-higher).")
    aggregation: Aggregation = field("token_mean", "How per-token losses become one number.")
    kl_coef: float = field(0.0, "β: weight of the KL to the reference; 0: no reference.")
    resample_rounds: int = field(3, "Dynamic sampling: draw again for groups of equal scores, at most so many times.")
    soft_overlong: float = field(
        0.2, "Share of max_completion_length, at its end, over which a penalty rises from 0 to 1."
    )


@dataclass(frozen=True, kw_only=True)
class GSPO(GRPO):
    """GRPO whose ratio is that of the sequence: the geometric mean of the token ratios (arXiv 2507.18071)."""

    paper: ClassVar[str] = "Zheng et al. 2025, arXiv 2507.18071"
    formula: ClassVar[str] = "L_t = −min(s A_i, clip(s, 1 − ε, 1 + ε_high) A_i),  s = exp(mean_t log ρ_t)"
    bias: ClassVar[str] = "not ∇J: divided by std_g, and a mean per sequence; at ratio 1 the same as GRPO without KL"

    importance: Literal["token", "sequence"] = field("sequence", "Ratio per token, or its geometric mean (GSPO).")
    clip_range: float = field(3e-4, "ε: the sequence ratio is clipped to 1 − ε; watch `clip_fraction`.")
    clip_range_high: float | None = field(4e-4, "Upper ε.")
    minibatches: int = field(4, "Optimizer steps per pass; must divide prompts × K.")
    kl_coef: float = field(0.0, "β: weight of the KL to the reference; 0: no reference.")


@dataclass(frozen=True, kw_only=True)
class CISPO(GRPO):
    """GRPO on log π with capped ratios as constant weights: no token loses its gradient (arXiv 2506.13585)."""

    paper: ClassVar[str] = "MiniMax 2025, arXiv 2506.13585"
    formula: ClassVar[str] = "L_t = −sg(min(ρ_t, is_cap)) A_i log π(y_t),  A_i = (R_i − mean_g) / std_g"
    bias: ClassVar[str] = (
        "not ∇J: divided by std_g and by a random number of tokens; capped weights after the first step"
    )

    objective: Literal["clip", "cispo"] = field("cispo", "Clipped surrogate, or capped weights on log π (CISPO).")
    is_cap: float | None = field(5.0, "Largest ratio ρ, absolute.")
    aggregation: Aggregation = field("token_mean", "How per-token losses become one number.")
    kl_coef: float = field(0.0, "β: weight of the KL to the reference; 0: no reference.")
