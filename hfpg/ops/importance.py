"""Importance sampling: what a sample drawn by the behaviour policy μ counts for under the policy π.

δ_t = log π(y_t) − log μ(y_t) at the chosen tokens. Weights are constants: nothing is differentiated through them.
Exact biases of each kind, by enumeration: docs/algorithms/off_policy.md.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hfpg.ops.masked import row_mean
from hfpg.ops.objectives import ratio


OffPolicy = Literal["none", "token", "prefix", "sequence", "truncated"]
TRUNCATED_CAP = 2.0


def off_policy_weights(
    log_ratio: Float[Tensor, "B C"], mask: Bool[Tensor, "B C"], how: OffPolicy, cap: float | None = None
) -> Float[Tensor, "B C"]:
    """Weights w_t [B, C] of the chosen tokens; the exponent is clamped to ±20, `cap` bounds w from above.

    - `none`       1
    - `token`      exp δ_t                    biased; bounded variance (TIS with a cap)
    - `prefix`     exp Σ_{s ≤ t} δ_s          exact when multiplied with Q − V, not with a sampled return
    - `sequence`   exp Σ_s δ_s, on every t    exact (Precup et al. 2000); its variance grows with the length
    - `truncated`  min(sequence, cap), cap 2 unless given: a little bias, far less variance (Ionides 2008)
    """
    delta = torch.where(mask, log_ratio.detach(), 0)
    if how == "none":
        return torch.ones_like(delta)
    if how == "token":
        exponent = delta
    elif how == "prefix":
        exponent = delta.cumsum(1)
    else:
        exponent = delta.sum(1, keepdim=True).expand_as(delta)
    cap = TRUNCATED_CAP if cap is None and how == "truncated" else cap
    weights = ratio(exponent)
    return weights if cap is None else weights.clamp(max=cap)


def self_normalized(sequence_weights: Float[Tensor, "B C"], weights: Float[Tensor, " B"]) -> Float[Tensor, "B C"]:
    """w / mean(w), the mean over the rows that count. Bias O(1/B), and no more variance from the scale of w."""
    mean = row_mean(sequence_weights[:, 0], weights)
    return torch.where(mean > 0, sequence_weights / mean.clamp(min=1e-30), 0)


def effective_sample_size(
    log_ratio: Float[Tensor, "B C"], mask: Bool[Tensor, "B C"], weights: Float[Tensor, " B"]
) -> Float[Tensor, ""]:
    """(Σ w)² / (N Σ w²) of the untruncated sequence weights (Kong 1992): 1 on-policy, 1/N when one row is all.

    1 when no row counts: there is nothing to distrust.
    """
    log_w = torch.where(mask, log_ratio.detach(), 0).sum(1).double()
    counts = weights > 0
    if not counts.any():
        return torch.ones((), dtype=torch.float64, device=weights.device)
    w = (log_w - log_w[counts].max()).exp()  # only ratios of weights matter
    return row_mean(w, weights) ** 2 / row_mean(w**2, weights)
