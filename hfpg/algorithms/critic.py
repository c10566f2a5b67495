"""Credit by a learned value function, shared by the actor-critic methods."""

from __future__ import annotations

import torch

from hfpg.ops.masked import center_and_scale
from hfpg.ops.returns import gae
from hfpg.types import Estimates, Rollout


def credit_by_values(
    rollout: Rollout, rewards: torch.Tensor, gamma: float, lam: float, whiten_advantages: bool
) -> Estimates:
    """Advantages by GAE(γ, λ) and returns A + V, [B, C] each. Whitening spans the whole rollout."""
    assert rollout.values is not None  # the trainer builds a value head because the algorithm's `value` is set
    advantages = gae(rewards, rollout.values, rollout.completion_mask, gamma, lam)
    returns = torch.where(rollout.completion_mask, advantages + rollout.values, 0)
    if whiten_advantages:
        advantages = center_and_scale(advantages, rollout.completion_mask, rollout.weights)
    return Estimates(advantages, returns)
