"""What every method has: how scores become token rewards, where the KL goes, what reused samples count for."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from hfpg.algorithms.kl_control import KLEstimator, check_kl, next_kl_coef, token_kl
from hfpg.config import check_choices, check_numbers, field, refuse_unread, require
from hfpg.learner import Learner
from hfpg.ops.baselines import RunningMoments, accompanied, equal_in_group, update_running_moments
from hfpg.ops.importance import OffPolicy, off_policy_weights, self_normalized
from hfpg.ops.masked import Aggregation
from hfpg.ops.returns import token_rewards
from hfpg.types import Estimates, Rollout, Scored, TokenLoss


@dataclass(frozen=True)
class State:
    """What changes from step to step; the trainer keeps it and saves it."""

    kl_coef: float
    step: int = 0  # updates done
    score_count: float = 0.0  # running moments of the scores, with reward_normalization='running'
    score_mean: float = 0.0
    score_m2: float = 0.0


S = TypeVar("S", bound=State)


MASKED = (
    "truncation='mask' without comparing the completions of one prompt: what is subtracted from a return is not the "
    "mean of what ended, so that ending is paid for or punished (docs/algorithms/shared.md); RLOO and GRPO have no "
    "such bias, and truncation='terminal' leaves nothing out"
)
"""A sentence of `warnings`."""


def whole_returns(returns: Float[Tensor, "B C"], rollout: Rollout) -> Float[Tensor, "B C"]:
    """The return of the whole completion on every token, for truncation='mask'; 0 for the only one left of its group.

    Among completions that ended E[∇ log π] is not 0 but ∇ log P(ended). What stands on a token then has to be the
    completion's own return less the others', or it pays for ending: a lone return would, and a reward-to-go, which
    lacks the KL of the tokens before. docs/algorithms/shared.md; tests/oracle/test_truncation.py.
    """
    together = accompanied(rollout.weights, rollout.group_ids)
    return torch.where(together[:, None], returns[:, :1], 0).expand_as(returns)


@dataclass(frozen=True, kw_only=True)
class Method:
    """Settings that all methods share, and what they do.

    A method adds `estimate` (credit) and `loss`; the trainer calls `init`, then every step `rewards`, `estimate` and
    `update`. A class of your own with these four and `num_generations`, `kl_coef` and `value` serves as well.

    Raises:
        ConfigError: settings that cannot be, or that do not go together.
    """

    num_generations: int = field(1, "K: completions per prompt.")
    aggregation: Aggregation = field("sequence_sum", "How per-token losses become one number.")

    # the KL to the reference
    kl_coef: float = field(0.05, "β: price of a nat of KL to the reference; watch `kl_to_ref`. 0: no reference.")
    kl_target: float | None = field(None, "Adapt β toward this KL, in nats per completion. Off.")
    kl_in: Literal["reward", "loss"] = field(
        "reward", "Where the KL enters. In the reward its gradient is exactly that of the KL; see docs/numerics.md."
    )
    kl_estimator: KLEstimator = field("k1", "k1 in the reward; k2_sequence, k2, k3 or full in the loss.")
    entropy_coef: float = field(0.0, "c₂: weight of the entropy bonus; watch `entropy`.")

    # from scores to rewards, in this order: normalise, clip, penalties, −β·k1
    reward_normalization: Literal["none", "running", "fixed"] = field(
        "none", "(score − mean) / std: with running moments, or with reward_mean and reward_std."
    )
    reward_mean: float = field(0.0, "Mean of the scores, with reward_normalization='fixed'.")
    reward_std: float = field(1.0, "Standard deviation of the scores, with reward_normalization='fixed'.")
    reward_clip: float | None = field(None, "Scores are clipped to ± this. Off.")
    missing_eos_penalty: float = field(0.0, "Taken off the score of a completion that did not end by itself.")
    soft_overlong: float = field(
        0.0, "Share of max_completion_length, at its end, over which a penalty rises from 0 to 1 (DAPO: 0.2)."
    )
    truncation: Literal["terminal", "bootstrap", "mask"] = field(
        "terminal", "A cut completion: ends there (V = 0); goes on with the critic's V; or is left out."
    )

    # samples that another policy drew
    replay: int = field(0, "Rollouts of so many past steps are used again, with off_policy weights.")
    off_policy: OffPolicy = field(
        "none", "What a sample of the behaviour policy μ counts for; see docs/algorithms/off_policy.md."
    )
    weight_cap: float | None = field(None, "Largest off-policy weight. Default: none; 2 with 'truncated'.")
    self_normalize: bool = field(False, "Divide sequence weights by their mean over the rollout.")

    loss: ClassVar[Callable[..., TokenLoss]]  # (new scores, rows, estimates, state) → the loss per token, unreduced

    def __post_init__(self) -> None:
        check_choices(self)
        check_numbers(self)
        check_kl(self.kl_coef, self.kl_target, self.kl_in, self.kl_estimator)
        for name in ("num_generations", "epochs", "minibatches"):
            count = getattr(self, name, 1)
            require(count >= 1, f"{name}={count} must be at least 1")
        for name in ("reward_clip", "reward_std", "weight_cap"):
            bound = getattr(self, name)
            require(bound is None or bound > 0, f"{name}={bound} must be above 0, or absent")
        for name in ("missing_eos_penalty", "replay", "entropy_coef", "value_coef"):
            amount = getattr(self, name, 0)
            require(amount >= 0, f"{name}={amount} must be 0 (off) or more")
        require(
            0 <= self.soft_overlong < 1, f"soft_overlong={self.soft_overlong} must be a share of the length, like 0.2"
        )
        if self.kl_coef == 0:
            refuse_unread(
                self, "about a KL, and kl_coef=0 has none; remove it, or set kl_coef", "kl_in", "kl_estimator"
            )
        self._check_rewards()
        self._check_off_policy()

    def _check_rewards(self) -> None:
        fixed = self.reward_mean != 0 or self.reward_std != 1
        require(
            self.reward_normalization == "fixed" or not fixed,
            f"reward_mean={self.reward_mean} and reward_std={self.reward_std} are read only with "
            f"reward_normalization='fixed', and it is {self.reward_normalization!r}",
        )
        require(
            self.truncation != "bootstrap" or self.value is not None,
            f"truncation='bootstrap' continues a cut completion with V, and {type(self).__name__} has no value "
            "function here; use truncation='terminal', or PPO or A2C",
        )

        require(
            self.truncation != "mask" or self.missing_eos_penalty == 0,
            f"missing_eos_penalty={self.missing_eos_penalty} is taken off cut completions, and truncation='mask' "
            "leaves them out; use truncation='terminal'",
        )

    def _check_off_policy(self) -> None:
        how = self.off_policy
        require(
            self.replay == 0 or how != "none",
            f"replay={self.replay} uses samples of past policies, and off_policy='none' would count them as the "
            "policy's own; use off_policy='truncated'",
        )
        require(
            self.weight_cap is None or how != "none",
            f"weight_cap={self.weight_cap} caps off-policy weights, and off_policy='none' has none; use 'truncated'",
        )
        require(
            not self.self_normalize or how in ("sequence", "truncated"),
            f"self_normalize=True divides weights of whole sequences, and off_policy={how!r} has none; use 'sequence' "
            "or 'truncated'",
        )

    # ── what the trainer asks of a method

    @property
    def value(self) -> Literal["shared", "separate"] | None:
        """The value head that the method needs."""
        return None

    @property
    def extra_baseline(self) -> Literal["greedy", "input"] | None:
        """Scores that the trainer has to get for the baseline, beside those of the samples."""
        return None

    @property
    def resample_rounds(self) -> int:
        """Times that the trainer draws again in place of groups whose scores are all equal."""
        return 0

    def warnings(self, fresh_value_head: bool) -> list[str]:
        """Sentences about settings that are legal and rarely meant."""
        found = []
        if (
            self.kl_in == "loss"
            and self.kl_coef > 0
            and getattr(self, "epochs", 1) * getattr(self, "minibatches", 1) > 1
        ):
            found.append(
                "kl_in='loss' with more than one optimizer step per rollout: the samples are the old policy's and "
                "the KL term is not corrected for it; kl_in='reward' has no such bias"
            )
        if self.kl_in == "loss" and self.kl_coef > 0 and self.off_policy != "none":
            found.append(
                "kl_in='loss' is an average over whatever completions are there: off-policy weights do not reach it; "
                "kl_in='reward' is weighted like the rest"
            )
        return found

    def init(self) -> Any:
        """The state before the first step."""
        return State(kl_coef=self.kl_coef)

    # ── from scores to token rewards

    def rewards(self, rollout: Rollout, state: S, longest: int) -> tuple[Rollout, Float[Tensor, "B C"], S]:
        """The rollout with shaped scores and row weights, token rewards [B, C], and the state with new moments.

        score → normalise → clip → penalties; then r_t = 1[t is last] · score − β k1_t (with kl_in='reward'). The
        score of the baseline goes the same way. With truncation='mask' cut completions get row weight 0, and with
        resample_rounds the groups whose scores are all equal do.
        """
        moments = RunningMoments(state.score_count, state.score_mean, state.score_m2)
        now = update_running_moments(moments, rollout.scores, rollout.new_weights)
        by = moments if moments.rows else now  # nothing was seen before the first batch: it serves itself
        weights = rollout.weights
        if self.truncation == "mask":
            weights = torch.where(rollout.finished, weights, 0)
        if self.resample_rounds:
            weights = torch.where(equal_in_group(rollout.scores, weights, rollout.group_ids), 0, weights)
        lengths = rollout.completion_mask.sum(1)
        shaped: dict[str, Any] = {
            "scores": self._shape(rollout.scores, rollout.finished, lengths, by, longest),
            "weights": weights,
        }
        if rollout.baseline_scores is not None:
            theirs = (rollout.baseline_finished, rollout.baseline_lengths)
            shaped["baseline_scores"] = self._shape(rollout.baseline_scores, *theirs, by, longest)
        rollout = replace(rollout, **shaped)
        if self.reward_normalization == "running":
            state = replace(state, score_count=now.rows, score_mean=now.mean, score_m2=now.m2)
        log_ratio = None
        if rollout.ref_logprobs is not None and self.kl_in == "reward":
            log_ratio = rollout.old_logprobs - rollout.ref_logprobs
        parts = rollout.token_scores
        if parts is not None:  # in the unit of the scores; what shaping adds or takes goes to the last token
            parts = parts / self._unit(by)
        mask = rollout.completion_mask
        return rollout, token_rewards(rollout.scores, mask, log_ratio, state.kl_coef, parts), state

    def _unit(self, moments: RunningMoments) -> float:
        """What a score is divided by."""
        return {"none": 1.0, "running": moments.std, "fixed": self.reward_std}[self.reward_normalization]

    def _shape(
        self, scores: Tensor, finished: Tensor | None, lengths: Tensor | None, moments: RunningMoments, longest: int
    ) -> Float[Tensor, " B"]:
        """Normalised, clipped and penalised scores; no penalties where there is no completion (`finished` None)."""
        if self.reward_normalization != "none":
            mean = moments.mean if self.reward_normalization == "running" else self.reward_mean
            scores = (scores - mean) / self._unit(moments)
        if self.reward_clip is not None:
            scores = scores.clamp(-self.reward_clip, self.reward_clip)
        if finished is not None:
            scores = scores - torch.where(finished, 0.0, self.missing_eos_penalty)
        if lengths is not None and self.soft_overlong > 0:
            zone = math.ceil(round(self.soft_overlong * longest, 9))  # .07 · 100 is above 7 by rounding
            scores = scores - ((lengths - (longest - zone)) / zone).clamp(0, 1)
        return scores

    # ── pieces of credit, loss and update

    def corrected(self, advantages: Float[Tensor, "B C"], rollout: Rollout) -> Float[Tensor, "B C"]:
        """Advantages times the off-policy weights of old policy ÷ μ. As w ≥ 0, w·min(ρA, clip(ρ)A) = min(ρwA, …)."""
        if self.off_policy == "none" or rollout.behaviour_logprobs is None:
            return advantages
        log_ratio = rollout.old_logprobs - rollout.behaviour_logprobs
        w = off_policy_weights(log_ratio, rollout.completion_mask, self.off_policy, self.weight_cap)
        if self.self_normalize:
            w = self_normalized(w, rollout.weights)
        return advantages * w

    def regularized(
        self, policy: Tensor, metrics: dict[str, Tensor], new: Scored, rows: Rollout, state: State | None
    ) -> TokenLoss:
        """The policy's loss, plus β · KL (with kl_in='loss'), minus c₂ · entropy."""
        total, metrics = policy, {"policy_loss": policy} | metrics
        if self.entropy_coef and new.entropy is not None:
            total = total - self.entropy_coef * new.entropy
        kl_coef = self.kl_coef if state is None else state.kl_coef
        if self.kl_in == "loss" and kl_coef and rows.ref_logprobs is not None:
            metrics["kl_loss"] = token_kl(self.kl_estimator, new, rows)
            total = total + kl_coef * metrics["kl_loss"]
        return TokenLoss(total, metrics)

    def schedule(self, state: State) -> dict[str, Any]:
        """Arguments of `Learner.optimize`: one optimizer step, unless a method says more."""
        return dict(
            aggregation=self.aggregation,
            with_entropy=self.entropy_coef != 0,
            with_kl=self.kl_in == "loss" and self.kl_estimator == "full" and state.kl_coef > 0,
            skip_zero=self._loss_is_advantage_times_something(state),
            token_local=self.token_local,
        )

    @property
    def token_local(self) -> bool:
        """True where the loss at a token depends on that token's scores alone. Of a loss of one's own nobody knows."""
        whole = self.kl_in == "loss" and self.kl_estimator in ("full", "k2_sequence")  # a vocabulary's, a row's sum
        return self._loss_is_hfpgs() and not whole

    def _loss_is_hfpgs(self) -> bool:
        pieces = [getattr(type(self), name, None) for name in ("loss", "regularized", "surrogate")]
        return all(piece is None or piece.__module__.startswith("hfpg.algorithms.") for piece in pieces)

    def _loss_is_advantage_times_something(self, state: State) -> bool:
        """True where rows whose advantages are 0 add nothing."""
        plain = self.value is None and self.entropy_coef == 0 and (self.kl_in == "reward" or state.kl_coef == 0)
        return self._loss_is_hfpgs() and plain

    def next_state(self, rollout: Rollout, state: S) -> S:
        """One update more, and the KL coefficient's next value."""
        return replace(state, step=state.step + 1, kl_coef=next_kl_coef(state.kl_coef, self.kl_target, rollout))

    def update(self, learner: Learner, rollout: Rollout, credit: Estimates, state: S) -> tuple[dict[str, float], S]:
        """The optimizer steps of one rollout, and the state after them."""
        loss = functools.partial(self.loss, state=state)
        return learner.optimize(rollout, credit, loss, **self.schedule(state)), self.next_state(rollout, state)
