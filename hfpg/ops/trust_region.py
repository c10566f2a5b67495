"""The natural gradient under a trust region, on flat vectors (TRPO, arXiv 1502.05477; Kakade 2001).

maximise gᵀs subject to ½ sᵀFs ≤ δ  ⇒  s = √(2δ / xᵀFx) · x with Fx = g. F is known only through products F·v.
Inner products are taken in float64, whatever the vectors are in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hfpg.ops.keyed import key, mix


Product = Callable[[Tensor], Tensor]


class Solution(NamedTuple):
    """x with Ax ≈ b, and ‖b − Ax‖ / ‖b‖."""

    x: Tensor
    residual: float


def dot(a: Float[Tensor, " D"], b: Float[Tensor, " D"]) -> float:
    """aᵀb in float64."""
    return float(torch.dot(a.double(), b.double()))


def conjugate_gradient(
    product: Product, b: Float[Tensor, " D"], iterations: int = 10, tolerance: float = 1e-10
) -> Solution:
    """Solve Ax = b for a symmetric positive definite A given by `product` (Hestenes & Stiefel 1952).

    Ends after `iterations` products, or when ‖b − Ax‖² ≤ tolerance · ‖b‖², or at a direction of no curvature.
    """
    x, residual = torch.zeros_like(b), b.clone()
    direction, size, whole = residual, dot(b, b), dot(b, b)
    for _ in range(iterations):
        if size <= tolerance * whole:
            break
        image = product(direction)
        curvature = dot(direction, image)
        if not curvature > 0:
            break
        step = size / curvature
        x, residual = x + step * direction, residual - step * image
        size, before = dot(residual, residual), size
        direction = residual + (size / before) * direction
    return Solution(x, (size / whole) ** 0.5 if whole > 0 else 0.0)


def finite_difference(gradient_at: Product, v: Float[Tensor, " D"], size: float) -> Float[Tensor, " D"]:
    """H·v ≈ (∇(+εv) − ∇(−εv)) / 2ε with ‖εv‖ = size; `gradient_at(offset)` is the gradient at θ + offset."""
    length = dot(v, v) ** 0.5
    if length == 0:
        return torch.zeros_like(v)
    epsilon = size / length
    return (gradient_at(epsilon * v) - gradient_at(-epsilon * v)) / (2 * epsilon)


def signs(count: int, like: Tensor, seed: int, purpose: str, *counters: int) -> Float[Tensor, " D"]:
    """`count` keyed random signs ±1 (Rademacher)."""
    bits = mix(torch.arange(count, device=like.device) ^ key(seed, purpose, *counters))
    return torch.where(bits < 0, -1.0, 1.0).to(like.dtype)


def mean_eigenvalue(product: Product, probes: list[Tensor]) -> float:
    """tr(F) / D by Hutchinson's estimator: the mean of zᵀFz / D over vectors z of random signs."""
    return sum(dot(z, product(z)) / len(z) for z in probes) / len(probes)


def step_length(x: Float[Tensor, " D"], image: Float[Tensor, " D"], max_kl: float) -> float:
    """√(2δ / xᵀAx) with `image` = Ax; 0 where there is no curvature."""
    curvature = dot(x, image)
    return (2 * max_kl / curvature) ** 0.5 if curvature > 0 else 0.0


def line_search(
    evaluate: Callable[[float], tuple[float, float]], max_kl: float, shrink: float = 0.8, tries: int = 10
) -> float:
    """The first of 1, shrink, shrink², … whose (KL, gain) has KL ≤ max_kl and gain > 0; 0.0 when none has.

    NaN fails every comparison, so a step that leads there is never taken.
    """
    fraction = 1.0
    for _ in range(tries):
        kl, gain = evaluate(fraction)
        if kl <= max_kl and gain > 0:
            return fraction
        fraction *= shrink
    return 0.0
