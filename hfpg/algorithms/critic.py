"""What the actor-critic methods share: credit by a learned value function, and its training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hfpg.algorithms.method import MASKED, Method, S, State
from hfpg.config import field, require
from hfpg.ops.masked import center_and_scale
from hfpg.ops.returns import gae
from hfpg.types import Estimates, Rollout


def values_of(rollout: Rollout, method: str) -> Float[Tensor, "B C"]:
    """V(s_t) of every chosen token, [B, C]; ConfigError where nobody has scored any."""
    require(
        rollout.values is not None,
        f"{method} takes V(s_t) from a value head, and the policy has none; build it with "
        "ActorCritic(policy, value='shared'), as PolicyGradientTrainer does",
    )
    assert rollout.values is not None
    return rollout.values


def last_values(rollout: Rollout, truncation: str) -> Float[Tensor, " B"] | None:
    """V after the last chosen token of the completions that were cut, 0 after the others; None: 0 everywhere."""
    if truncation != "bootstrap":
        return None
    assert rollout.last_values is not None  # scored because the method's `truncation` says so
    return torch.where(rollout.finished, 0, rollout.last_values)


@dataclass(frozen=True, kw_only=True)
class Critic(Method):
    """A value function V(s_t), and advantages by GAE(γ, λ) (arXiv 1506.02438).

    λ = 1 is unbiased for any value function, which a fresh head needs.
    """

    gamma: float = field(1.0, "γ: discount per token.")
    lam: float = field(1.0, "λ of GAE: below 1 less variance, and bias until the value function is good.")
    value_lam: float | None = field(None, "λ of the critic's targets A + V. Default: lam; 1 is unbiased.")
    value: Literal["shared", "separate"] = field(
        "shared", "Value head on the policy's trunk, or on a trunk of its own."
    )
    value_coef: float = field(0.1, "c₁: weight of the value error in the loss; watch `explained_variance`.")
    value_warmup: int = field(0, "Steps at the start in which only the value function learns.")
    whiten_advantages: bool = field(False, "Advantages to mean 0 and std 1 over all tokens of the rollout.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lam", "value_lam"):
            lam = getattr(self, name)
            require(lam is None or 0 <= lam <= 1, f"{name}={lam} must lie between 0 and 1")
        require(0 < self.gamma <= 1, f"gamma={self.gamma} must be above 0 and at most 1")
        require(self.value_warmup >= 0, f"value_warmup={self.value_warmup} must be 0 (off) or more")

    def warnings(self, fresh_value_head: bool) -> list[str]:
        """λ below 1 with a value function that knows nothing; V where completions are left out."""
        found = super().warnings(fresh_value_head)
        if self.truncation == "mask":
            found.append(MASKED)
        if fresh_value_head and self.lam < 1 and self.value_warmup == 0:
            found.append(
                f"lam={self.lam} trusts a value head that knows nothing yet, which biases the first gradients; "
                "value_warmup=5 lets it learn first, and lam=1 is unbiased for any value function"
            )
        return found

    def estimate(self, rollout: Rollout, rewards: Float[Tensor, "B C"], state: S) -> tuple[Estimates, S]:
        """Advantages by GAE(γ, λ) and returns A + V, from token rewards [B, C]. Whitening is over all rows."""
        values, mask = values_of(rollout, type(self).__name__), rollout.completion_mask
        after = last_values(rollout, self.truncation)
        advantages = gae(rewards, values, mask, self.gamma, self.lam, after)
        errors = advantages
        if self.value_lam not in (None, self.lam):
            errors = gae(rewards, values, mask, self.gamma, self.value_lam, after)
        returns = torch.where(mask, errors + values, 0)
        if self.whiten_advantages:
            advantages = center_and_scale(advantages, mask, rollout.weights)
        return Estimates(self.corrected(advantages, rollout), returns), state

    def schedule(self, state: State) -> dict[str, Any]:
        """Only the value function is trained while it warms up."""
        warming = state.step < self.value_warmup
        return super().schedule(state) | (dict(train="value") if warming else {})
