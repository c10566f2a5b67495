"""The KL to the reference: which estimator may stand where, its token loss, and the coefficient between steps."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hfpg.config import require
from hfpg.ops.kl import adapt_kl_coef, k2, k2_sequence, k3
from hfpg.ops.masked import row_mean
from hfpg.types import Rollout, Scored


KLEstimator = Literal["k1", "k2_sequence", "k2", "k3", "full"]


def check_kl(kl_coef: float, kl_target: float | None, kl_in: str = "reward", estimator: str = "k1") -> None:
    """Raise ConfigError for a coefficient or target that cannot be, or an estimator where it does not work."""
    require(kl_coef >= 0, f"kl_coef={kl_coef} must not be negative; 0 switches the reference off")
    require(
        kl_target is None or kl_target > 0, f"kl_target={kl_target} must be above 0 nats per completion, such as 6"
    )
    require(
        kl_target is None or kl_coef > 0,
        f"kl_target={kl_target} moves kl_coef by a factor, and kl_coef=0 stays 0; start it at 0.05, say",
    )
    require(
        kl_in == "reward" or estimator != "k1",
        "kl_in='loss' with kl_estimator='k1' regularises nothing: its expected gradient is zero; use "
        "kl_estimator='k2_sequence', or kl_in='reward'",
    )
    require(
        kl_in == "loss" or estimator == "k1",
        f"kl_in='reward' with kl_estimator={estimator!r} hardly regularises: its gradient is far "
        "from that of the KL (docs/numerics.md); use kl_estimator='k1', or kl_in='loss'",
    )


def token_kl(estimator: KLEstimator, new: Scored, rows: Rollout) -> Float[Tensor, "B C"]:
    """The loss-side KL of the new policy to the reference, per token. Only `k2_sequence` has the KL's gradient."""
    assert rows.ref_logprobs is not None
    log_ratio = new.logprobs - rows.ref_logprobs
    if estimator == "full":
        assert new.kl is not None  # the learner was asked for it
        return new.kl
    if estimator == "k2_sequence":
        return k2_sequence(log_ratio, rows.completion_mask)
    return {"k2": k2, "k3": k3}[estimator](log_ratio)


def kl_per_completion(rollout: Rollout) -> float:
    """KL(π_old ‖ π_ref), nats per completion: the mean of Σ_t (log π_old − log π_ref) over all that this step drew.

    Whatever their row weights: completions that nobody scored, that were cut, or whose group was drawn again are the
    policy's too. Rows of earlier steps are not. NaN where nothing was drawn or there is no reference.
    """
    drawn = torch.ones_like(rollout.weights, dtype=torch.bool) if rollout.stored is None else ~rollout.stored
    if rollout.ref_logprobs is None or not drawn.any():
        return math.nan
    log_ratio = torch.where(rollout.completion_mask, rollout.old_logprobs - rollout.ref_logprobs, 0)
    return float(row_mean(log_ratio.sum(1), drawn.to(log_ratio.dtype)))


def next_kl_coef(kl_coef: float, kl_target: float | None, rollout: Rollout) -> float:
    """The coefficient for the next step; the same one where no KL was measured."""
    return kl_coef if kl_target is None else adapt_kl_coef(kl_coef, kl_per_completion(rollout), kl_target)
