"""What is subtracted from a return to lower the variance of the gradient, without moving its mean."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hfpg.ops.masked import row_mean


def leave_one_out(
    returns: Float[Tensor, " B"], weights: Float[Tensor, " B"], group_ids: Int[Tensor, " B"] | None = None
) -> Float[Tensor, " B"]:
    """b_i = mean return of the *other* rows: of the same prompt (RLOO, arXiv 2402.14740), or of the whole batch.

    Row i is left out, so b_i does not depend on its own actions and the gradient stays unbiased (Kool et al. 2019).
    Rows of weight 0 do not count; a row without another counting one has b = 0. Where all returns are equal, b is
    exactly that return.
    """
    group = _groups(returns, weights, group_ids)
    own = group.x * group.w
    others = group.total_weight - group.w
    mean = torch.where(others > 0, (group.total - own) / others.clamp(min=1e-12), 0)
    return torch.where(group.equal & (others > 0), group.highest, mean).to(returns.dtype)


def group_mean(
    returns: Float[Tensor, " B"], weights: Float[Tensor, " B"], group_ids: Int[Tensor, " B"] | None = None
) -> Float[Tensor, " B"]:
    """Mean return of the row's group, itself included (GRPO); without `group_ids`, of the batch.

    The expected gradient is then (K − 1)/K of the unbiased one, in the same direction.
    """
    group = _groups(returns, weights, group_ids)
    mean = group.total / group.total_weight.clamp(min=1e-12)
    return torch.where(group.equal & (group.total_weight > 0), group.highest, mean).to(returns.dtype)


def group_std(
    returns: Float[Tensor, " B"], weights: Float[Tensor, " B"], group_ids: Int[Tensor, " B"] | None = None
) -> Float[Tensor, " B"]:
    """Standard deviation of the row's group, divisor n − 1 (as GRPO's codes take it); exactly 0 for equal returns."""
    group = _groups(returns, weights, group_ids)
    mean = group.total / group.total_weight.clamp(min=1e-12)
    squares = group.sum((group.x - mean) ** 2 * group.w)
    variance = squares / (group.total_weight - 1).clamp(min=1e-12)
    return torch.where(group.equal | (group.total_weight <= 1), 0, variance.sqrt()).to(returns.dtype)


def accompanied(weights: Float[Tensor, " B"], group_ids: Int[Tensor, " B"] | None = None) -> Bool[Tensor, " B"]:
    """True for rows whose group has another counting row, with which they can be compared."""
    group = _groups(weights, weights, group_ids)
    return group.total_weight - group.w > 0


def equal_in_group(
    returns: Float[Tensor, " B"], weights: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]
) -> Bool[Tensor, " B"]:
    """True for rows whose group's counting returns are all the same: nothing can be learnt from them."""
    return _groups(returns, weights, group_ids).equal


class _Groups(NamedTuple):
    """Sums over the counting rows of each row's group, in float64; `equal`: these all have the value `highest`."""

    x: Tensor
    w: Tensor
    group: Tensor
    total: Tensor
    total_weight: Tensor
    highest: Tensor
    equal: Tensor

    def sum(self, values: Tensor) -> Tensor:
        """Σ over the row's group."""
        return _spread(values, self.group, "sum")


def _groups(returns: Tensor, weights: Tensor, group_ids: Tensor | None) -> _Groups:
    index = torch.zeros(len(returns), dtype=torch.long, device=returns.device)
    if group_ids is not None:
        index = torch.unique(group_ids, return_inverse=True)[1]
    counts = weights > 0
    x, w = torch.where(counts, returns, 0).double(), weights.double()
    highest = _spread(torch.where(counts, x, -torch.inf), index, "amax")
    lowest = _spread(torch.where(counts, x, torch.inf), index, "amin")
    total, weight = _spread(x * w, index, "sum"), _spread(w, index, "sum")
    return _Groups(x, w, index, total, weight, highest, highest <= lowest)


def _spread(values: Tensor, index: Tensor, how: str) -> Tensor:
    """Reduce over the rows that share an index, and give each row its group's result."""
    fill = {"sum": 0.0, "amax": -torch.inf, "amin": torch.inf}[how]
    out = torch.full_like(values, fill)
    return out.scatter_reduce(0, index, values, how)[index]


class RunningMean(NamedTuple):
    """Exponential mean of what was seen so far. `mean` is bias-corrected; 0 before the first observation."""

    total: float = 0.0
    weight: float = 0.0

    @property
    def mean(self) -> float:
        return self.total / self.weight if self.weight > 0 else 0.0


def update_running_mean(
    state: RunningMean, x: Float[Tensor, " B"], weights: Float[Tensor, " B"], decay: float
) -> RunningMean:
    """m ← decay · m + (1 − decay) · mean(x), as a pure step; a batch where no row counts leaves it as it is.

    To stay unbiased the *old* state must serve as the baseline of the batch that updates it: with the current batch
    inside, the expected gradient shrinks by a share of 1/N.
    """
    if weights.sum() <= 0:
        return state
    share = 1 - decay
    batch = float(row_mean(x, weights))
    return RunningMean(decay * state.total + share * batch, decay * state.weight + share)


class RunningMoments(NamedTuple):
    """Rows, mean and sum of squared deviations of what was seen so far (Welford 1962)."""

    rows: float = 0.0
    mean: float = 0.0
    m2: float = 0.0

    @property
    def std(self) -> float:
        """Population standard deviation; 1 before there are two different values."""
        return math.sqrt(self.m2 / self.rows) if self.rows > 1 and self.m2 > 0 else 1.0


def update_running_moments(
    state: RunningMoments, x: Float[Tensor, " B"], weights: Float[Tensor, " B"]
) -> RunningMoments:
    """Take a batch in (Chan et al. 1979), as a pure step; rows of weight 0 do not count."""
    count = float((weights > 0).sum())
    if count == 0:
        return state
    x, w = x.double(), (weights > 0).double()
    mean = float(row_mean(x, w))
    m2 = count * float(row_mean((x - mean) ** 2, w))
    total, delta = state.rows + count, mean - state.mean
    return RunningMoments(
        total, state.mean + delta * count / total, state.m2 + m2 + delta**2 * state.rows * count / total
    )
