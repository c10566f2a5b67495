"""The KL coefficient between steps: fixed, or moved toward a target."""

from __future__ import annotations

import torch

from hfpg.config import require
from hfpg.ops.kl import adapt_kl_coef
from hfpg.ops.masked import row_mean
from hfpg.types import Rollout


def check_kl(kl_coef: float, kl_target: float | None) -> None:
    """Raise ConfigError for a coefficient or target that cannot be."""
    require(kl_coef >= 0, f"kl_coef={kl_coef} must not be negative; 0 switches the reference off")
    require(
        kl_target is None or kl_target > 0, f"kl_target={kl_target} must be above 0 nats per completion, such as 6"
    )
    require(
        kl_target is None or kl_coef > 0,
        f"kl_target={kl_target} moves kl_coef by a factor, and kl_coef=0 stays 0; start it at 0.05, say",
    )


def kl_per_completion(rollout: Rollout) -> float:
    """KL(π_old ‖ π_ref), nats per completion: the rows' mean of Σ_t (log π_old − log π_ref); 0 without reference."""
    if rollout.ref_logprobs is None:
        return 0.0
    log_ratio = torch.where(rollout.completion_mask, rollout.old_logprobs - rollout.ref_logprobs, 0)
    return float(row_mean(log_ratio.sum(1), rollout.weights))


def next_kl_coef(kl_coef: float, kl_target: float | None, rollout: Rollout) -> float:
    """The coefficient for the next step."""
    return kl_coef if kl_target is None else adapt_kl_coef(kl_coef, kl_per_completion(rollout), kl_target)
