"""Kullback–Leibler divergence from samples (Schulman 2020, "Approximating KL divergence"), and its controller.

δ = log π(y) − log π_ref(y) at tokens drawn from π; all estimators are of KL(π ‖ π_ref).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def k1(log_ratio: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """δ. Unbiased in value; in the *reward* its gradient is exactly ∇KL; in the *loss* its expected gradient is 0."""
    return log_ratio


def k2(log_ratio: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """½ δ². Biased in value; its gradient per token is that of the KL of that token alone."""
    return log_ratio**2 / 2


def k3(log_ratio: Float[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """e^{−δ} − 1 + δ ≥ 0. Unbiased in value with low variance: the one to report."""
    return torch.expm1(-log_ratio) + log_ratio


def k2_sequence(log_ratio: Float[Tensor, "B C"], mask: Bool[Tensor, "B C"]) -> Float[Tensor, "B C"]:
    """½ (Σ_t δ_t)², spread over the tokens: δ_t · sg(Σ δ) − ½ sg(δ_t Σ δ).

    Summed over a sequence its value is ½ S² and its gradient S ∇S, whose expectation is exactly ∇KL (arXiv
    2510.01555): the one loss-side form that credits a token with the KL of all that follows, with `sequence_sum`.
    """
    delta = torch.where(mask, log_ratio, 0)
    total = delta.sum(1, keepdim=True).detach()
    return delta * total - delta.detach() * total / 2


def full(logits: Float[Tensor, "... V"], other_logits: Float[Tensor, "... V"]) -> Float[Tensor, ...]:
    """Σ_v π(v) (log π(v) − log π_other(v)), exact over the vocabulary. Tokens outside π's support add 0."""
    logp, logq = logits.log_softmax(-1), other_logits.log_softmax(-1)
    inside = logp > -torch.inf
    # −inf is taken out before the product: 0 · inf would make its gradient NaN
    difference = torch.where(inside, logp, 0) - torch.where(inside, logq, 0)
    return (logp.exp() * difference).sum(-1)


def adapt_kl_coef(kl_coef: float, kl_to_ref: float, target: float, gain: float = 0.1) -> float:
    """β ← β · (1 + gain · clip(KL/target − 1, −0.2, 0.2)), a pure step (Ziegler et al. 2019, §2.2).

    `kl_to_ref` and `target` in nats per completion. A KL that is not finite leaves β as it is.
    """
    error = kl_to_ref / target - 1
    if not abs(error) < float("inf"):
        return kl_coef
    return kl_coef * (1 + gain * min(max(error, -0.2), 0.2))
