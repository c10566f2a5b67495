"""What is subtracted from a return to lower the variance of the gradient, without moving its mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hfpg.ops.masked import row_mean


def leave_one_out(returns: Float[Tensor, "B C"], weights: Float[Tensor, " B"]) -> Float[Tensor, "B C"]:
    """b_i,t = mean over the *other* rows of the whole batch of their return at t = 0 (one number per row).

    Row i is left out, so the baseline does not depend on its own actions and the gradient stays unbiased
    (Kool et al. 2019). Rows of weight 0 do not count. With fewer than two counting rows the baseline is 0.
    """
    first = torch.where(weights > 0, returns[:, 0] * weights, 0)
    others = weights.sum() - weights
    return torch.where(others > 0, (first.sum() - first) / others.clamp(min=1e-12), 0)[:, None].expand_as(returns)


def group_leave_one_out(
    returns: Float[Tensor, "B C"], weights: Float[Tensor, " B"], group_ids: Int[Tensor, " B"]
) -> Float[Tensor, "B C"]:
    """b_i,t = mean over the *other* samples of the same prompt of their return at t = 0 (RLOO, arXiv 2402.14740).

    Rows of weight 0 do not count; a row without another counting sample in its group has baseline 0.
    """
    same = (group_ids[:, None] == group_ids[None, :]) & ~torch.eye(
        len(group_ids), dtype=torch.bool, device=weights.device
    )
    share = same.to(weights.dtype) * weights
    first = torch.where(weights > 0, returns[:, 0], 0)
    total = share.sum(1)
    return torch.where(total > 0, share @ first / total.clamp(min=1e-12), 0)[:, None].expand_as(returns)


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
