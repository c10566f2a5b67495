"""Preferences between two texts: the loss of a reward model, and how often it agrees with people.

r_c and r_r are the scores of the chosen and of the rejected text of a pair. Losses are per pair and unreduced.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from hfpg.ops.masked import row_mean


def bradley_terry(
    chosen: Float[Tensor, " B"],
    rejected: Float[Tensor, " B"],
    margin: Float[Tensor, " B"] | None = None,
    preference: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """−p log σ(d) − (1 − p) log σ(−d),   d = r_c − r_r − m, in fp32 at least.

    `margin` m ≥ 0 is how much better the chosen text must score (default 0), `preference` p the probability that
    people prefer it: 1 (the default), or ½ in a tie, whose margin is 0. The loss sees differences only: a function of
    the prompt, added to both scores, changes nothing. log σ, not log(1 + e^−d): that overflows. Bradley & Terry 1952;
    Christiano et al. 2017 (arXiv 1706.03741); margin: Touvron et al. 2023 (arXiv 2307.09288).
    """
    d = _wide(chosen) - _wide(rejected)
    d = d if margin is None else d - margin.to(d.dtype)
    if preference is None:
        return -logsigmoid(d)
    p = preference.to(d.dtype)
    return -p * logsigmoid(d) - (1 - p) * logsigmoid(-d)


def centering(chosen: Float[Tensor, " B"], rejected: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """(r_c + r_r)², in fp32 at least: fixes what differences leave free (Eisenstein et al. 2023, arXiv 2312.09244)."""
    return (_wide(chosen) + _wide(rejected)) ** 2


def agrees(difference: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """1[d > 0] + ½ 1[d = 0],   d = r_c − r_r: whether the chosen text scores higher; equal scores count half."""
    return (difference > 0).to(difference.dtype) + (difference == 0).to(difference.dtype) / 2


def pair_accuracy(chosen: Float[Tensor, " N"], rejected: Float[Tensor, " N"]) -> tuple[float, float, float]:
    """(1/N) Σ_i 1[r_c > r_r] + ½ 1[r_c = r_r], and its 95 % interval by `wilson`, which takes pairs for independent.

    Raises:
        ValueError: there is no pair, or a score is not finite (which would count as a wrong choice).
    """
    d = chosen.double() - rejected.double()
    if not len(d) or not bool(d.isfinite().all()):
        raise ValueError(
            f"pair accuracy of {len(d)} pairs, {int((~d.isfinite()).sum())} of them without finite scores"
        )
    accuracy = float(row_mean(agrees(d), torch.ones_like(d)))
    return accuracy, *wilson(accuracy * len(d), len(d))


def wilson(right: int | float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The score interval of a proportion, 95 % by default (Wilson 1927): never outside 0 … 1, right for small n.

    (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n),   p = right / n
    """
    p = right / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def _wide(x: Tensor) -> Tensor:
    """fp32 at least; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
