"""Credit over time. Row t of `values` is V(s_t), the value *before* token t; V after the last chosen token is 0."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def token_rewards(
    scores: Float[Tensor, " B"],
    mask: Bool[Tensor, "B C"],
    log_ratio_to_ref: Float[Tensor, "B C"] | None = None,
    kl_coef: float = 0.0,
    token_scores: Float[Tensor, "B C"] | None = None,
) -> Float[Tensor, "B C"]:
    """r_t = 1[t is the last chosen token] · score − β · (log π(y_t) − log π_ref(y_t)).

    With `token_scores` s_t the score is paid out at the tokens that earned it: r_t = s_t, and the last chosen token
    gets what is left, score − Σ s_t. A row's rewards sum to its score either way.

    The score sits on the last chosen token: the stop token, or the last token of a completion that was cut. A row
    without any chosen token earns nothing. k1 in the reward is the placement whose expected gradient is that of the
    KL itself (tests/oracle proves it exactly).
    """
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    rewards = torch.where(last, scores[:, None], 0)
    if token_scores is not None:
        parts = torch.where(mask, token_scores, 0)
        rewards = parts + torch.where(last, rewards - parts.sum(1, keepdim=True), 0)
    if log_ratio_to_ref is not None:
        rewards = rewards - kl_coef * torch.where(mask, log_ratio_to_ref, 0)
    return rewards


def rewards_to_go(
    rewards: Float[Tensor, "B C"],
    mask: Bool[Tensor, "B C"],
    gamma: float = 1.0,
    last_values: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, "B C"]:
    """G_t = Σ_{l ≥ t} γ^{l−t} r_l over chosen tokens (Williams 1992; Sutton & Barto 2018, eq. 3.8).

    `last_values`: what follows the last chosen token, 0 if absent.
    """
    return gae(rewards, torch.zeros_like(rewards), mask, gamma, 1.0, last_values)


def gae(
    rewards: Float[Tensor, "B C"],
    values: Float[Tensor, "B C"],
    mask: Bool[Tensor, "B C"],
    gamma: float = 1.0,
    lam: float = 1.0,
    last_values: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, "B C"]:
    """Generalized advantage estimation (arXiv 1506.02438, eq. 16).

    δ_t = r_t + γ V(s_{t+1}) − V(s_t);   A_t = δ_t + γ λ A_{t+1}

    Only chosen tokens are steps: padding, and a gap inside the row, take no time, and what stands there does not
    matter. After the last chosen token V is 0, or `last_values` where a cut completion would have gone on. At λ = 1,
    A_t = rewards_to_go − V(s_t): unbiased for any V.
    """
    advantages = torch.zeros_like(rewards)
    running = torch.zeros_like(rewards[:, 0])
    next_value = torch.zeros_like(running) if last_values is None else last_values
    for t in reversed(range(rewards.shape[1])):
        chosen, value = mask[:, t], values[:, t]
        delta = rewards[:, t] + gamma * next_value - value
        running = torch.where(chosen, delta + gamma * lam * running, running)
        next_value = torch.where(chosen, value, next_value)
        advantages[:, t] = torch.where(chosen, running, 0)
    return advantages
