"""What is minimised, per token and unreduced. Advantages and returns are constants: they are detached here."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hfpg.ops.masked import row_means


LOG_RATIO_LIMIT = 20.0  # e^20 ≈ 5e8: beyond it a ratio is a broken row, and exp would give inf


def policy_gradient(logprobs: Float[Tensor, "B C"], advantages: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """−A_t · log π(y_t | s_t)  (Williams 1992). Its gradient is *minus* the policy gradient: descent ascends J."""
    return -advantages.detach() * logprobs


def ratio(log_ratio: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """ρ_t = exp(log π_new − log π_old), the exponent clamped to ±20."""
    return log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def surrogate(log_ratio: Float[Tensor, "B C"], advantages: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """−ρ_t A_t, unclipped (conservative policy iteration, Kakade & Langford 2002; TRPO, arXiv 1502.05477, eq. 14)."""
    return -ratio(log_ratio) * advantages.detach()


def cispo(
    logprobs: Float[Tensor, "B C"],
    log_ratio: Float[Tensor, "B C"],
    advantages: Float[Tensor, "B C"],
    is_cap: float,
) -> Float[Tensor, "B C"]:
    """−sg(min(ρ_t, is_cap)) A_t log π(y_t)  (CISPO, arXiv 2506.13585): no token loses its gradient.

    `is_cap` is absolute, such as 5. At ρ = 1 the gradient is the policy gradient.
    """
    return -ratio(log_ratio).clamp(max=is_cap).detach() * advantages.detach() * logprobs


def sequence_log_ratio(log_ratio: Float[Tensor, "B C"], mask: Bool[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """log s = (1/L) Σ_t log ρ_t on every token: the geometric mean over the sequence (GSPO, arXiv 2507.18071)."""
    return row_means(log_ratio, mask)[:, None].expand_as(log_ratio)


def clipped_surrogate(
    log_ratio: Float[Tensor, "B C"],
    advantages: Float[Tensor, "B C"],
    clip_low: float,
    clip_high: float | None = None,
    dual_clip: float | None = None,
) -> Float[Tensor, "B C"]:
    """−min(ρ A, clip(ρ, 1 − ε_low, 1 + ε_high) A)  (PPO, arXiv 1707.06347, eq. 7).

    `clip_high` None: ε_high = ε_low; larger is "clip-higher" (DAPO, arXiv 2503.14476). `dual_clip` c > 1 bounds the
    loss where A < 0: max(min(ρA, clip(ρ)A), cA) (arXiv 1912.09729). At ρ = 1 the gradient is the policy gradient.
    """
    advantages = advantages.detach()
    rho = ratio(log_ratio)
    clipped = rho.clamp(1 - clip_low, 1 + (clip_low if clip_high is None else clip_high))
    objective = torch.minimum(rho * advantages, clipped * advantages)
    if dual_clip is not None:
        objective = torch.where(advantages < 0, torch.maximum(objective, dual_clip * advantages), objective)
    return -objective


def clip_fraction(
    log_ratio: Float[Tensor, "B C"], advantages: Float[Tensor, "B C"], clip_low: float, clip_high: float | None = None
) -> Float[Tensor, "B C"]:
    """1 where clipping cuts the token's gradient: ρ > 1 + ε_high with A > 0, or ρ < 1 − ε_low with A < 0."""
    rho = ratio(log_ratio)
    high = rho > 1 + (clip_low if clip_high is None else clip_high)
    low = rho < 1 - clip_low
    return ((high & (advantages > 0)) | (low & (advantages < 0))).to(rho.dtype)


def value_error(
    values: Float[Tensor, "B C"],
    returns: Float[Tensor, "B C"],
    old_values: Float[Tensor, "B C"] | None = None,
    clip_range: float | None = None,
) -> Float[Tensor, "B C"]:
    """½ (V(s_t) − R_t)². With `clip_range` c: ½ max of that and of the error of V clipped to V_old ± c.

    Value clipping depends on the scale of the rewards; it is off unless asked for (`clip_range` needs `old_values`).
    """
    returns = returns.detach()
    error = (values - returns) ** 2
    if clip_range is not None and old_values is not None:
        near = old_values.detach() + (values - old_values.detach()).clamp(-clip_range, clip_range)
        error = torch.maximum(error, (near - returns) ** 2)
    return error / 2
