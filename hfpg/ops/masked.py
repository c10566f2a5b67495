"""The only reductions in the package. Every mean asks: which tokens, which weights?

All functions take `mask [B, C]` (True where the policy chose the token) and row weights `[B]`.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


Aggregation = Literal["sequence_sum", "token_mean", "sequence_mean", "constant"]


def token_coefficients(
    mask: Bool[Tensor, "B C"], weights: Float[Tensor, " B"], how: Aggregation, max_length: int | None = None
) -> Float[Tensor, "B C"]:
    """Coefficients c such that the aggregate of any x [B, C] is Σ_bt c_bt · x_bt.

    With w the row weights, m the mask, L_b = Σ_t m_bt:

    - `sequence_sum`   Σ_b w_b Σ_t m x / Σ w        the only one whose expectation is ∇J
    - `token_mean`     Σ_b w_b Σ_t m x / Σ_b w_b L_b
    - `sequence_mean`  Σ_b w_b (Σ_t m x / L_b) / Σ w
    - `constant`       Σ_b w_b Σ_t m x / (Σ w · max_length)   = ∇J / max_length   (Dr. GRPO, arXiv 2503.20783)

    Since every aggregate is this one weighted sum, a batch may be cut into micro-batches and over ranks in any way:
    the coefficients of the whole minibatch are made first, and the parts add up. A denominator of 0 (no row counts)
    gives coefficients of 0.
    """
    m = mask.to(weights.dtype)
    rows = weights.sum()
    lengths = m.sum(1)
    if how == "sequence_sum":
        row, total = weights, rows
    elif how == "token_mean":
        row, total = weights, (weights * lengths).sum()
    elif how == "sequence_mean":
        row, total = weights / lengths.clamp(min=1), rows
    elif how == "constant":
        row, total = weights, rows * (mask.shape[1] if max_length is None else max_length)
    else:
        raise ValueError(
            f"aggregation={how!r} is unknown; use 'sequence_sum', 'token_mean', 'sequence_mean' or 'constant'"
        )
    return torch.where(total > 0, 1 / total, 0.0) * row[:, None] * m


def aggregate(
    x: Float[Tensor, "B C"],
    mask: Bool[Tensor, "B C"],
    weights: Float[Tensor, " B"],
    how: Aggregation,
    max_length: int | None = None,
) -> Float[Tensor, ""]:
    """One number from per-token quantities; see `token_coefficients`. Values outside the mask do not matter."""
    return (torch.where(mask, x, 0) * token_coefficients(mask, weights.to(x.dtype), how, max_length)).sum()


def masked_mean(x: Float[Tensor, "B C"], mask: Bool[Tensor, "B C"], weights: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """Weighted mean over chosen tokens, Σ w m x / Σ w m; 0 when there is no token."""
    return aggregate(x, mask, weights, "token_mean")


def row_mean(x: Float[Tensor, " B"], weights: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """Weighted mean over rows, Σ w x / Σ w; 0 when no row counts. A non-finite x in a row of weight 0 is left out."""
    total = weights.sum()
    return torch.where(total > 0, torch.where(weights > 0, x * weights, 0).sum() / total, 0.0)


def row_means(x: Float[Tensor, "B C"], mask: Bool[Tensor, "B C"]) -> Float[Tensor, " B"]:
    """Mean over the chosen tokens of each row; 0 for a row without any."""
    return torch.where(mask, x, 0).sum(1) / mask.sum(1).clamp(min=1)


def extent(mask: Bool[Tensor, "B C"]) -> Int[Tensor, " B"]:
    """Columns up to and with the last chosen token; a gap before it counts. 0 for a row without any."""
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)


def row_std(x: Float[Tensor, " B"], weights: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """Weighted standard deviation over rows (population form, divisor Σ w)."""
    return row_mean((x - row_mean(x, weights)) ** 2, weights).sqrt()


def correlation(x: Float[Tensor, " B"], y: Float[Tensor, " B"], weights: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    """Weighted Pearson correlation of two columns; 0 when one of them is constant."""
    spread = row_std(x, weights) * row_std(y, weights)
    together = row_mean((x - row_mean(x, weights)) * (y - row_mean(y, weights)), weights)
    return torch.where(spread > 0, together / spread, 0.0)


def center_and_scale(
    x: Float[Tensor, "B C"], mask: Bool[Tensor, "B C"], weights: Float[Tensor, " B"], eps: float = 1e-8
) -> Float[Tensor, "B C"]:
    """(x − mean) / std over all chosen tokens ("whitening"). Fewer than two tokens: x is returned as it is.

    Equal values become exactly 0. In fp32 the mean of equal numbers is off by rounding, and dividing that by a
    standard deviation of nearly 0 would turn it into large advantages out of nothing.
    """
    if _tokens(mask, weights) < 2:
        return x
    mean, std = _moments(x, mask, weights)
    if std == 0:
        return torch.zeros_like(x)
    return (torch.where(mask, x.double() - mean, 0) / (std + eps)).to(x.dtype)


def _tokens(mask: Bool[Tensor, "B C"], weights: Float[Tensor, " B"]) -> int:
    return int((mask & (weights > 0)[:, None]).sum())


def _moments(x: Tensor, mask: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over chosen tokens, in float64; 0 where the values differ by fp32 rounding only."""
    counts = mask & (weights > 0)[:, None]
    x, weights = x.double(), weights.double()
    mean = masked_mean(x, mask, weights)
    std = masked_mean((x - mean) ** 2, mask, weights).sqrt()
    return mean, torch.where(std <= 1e-6 * torch.where(counts, x, 0).abs().max(), 0, std)
