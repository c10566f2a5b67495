"""Slopes of a loss at single tokens: with them the LM head makes its gradient while it makes the scores."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from hfpg.types import Estimates, Rollout, Scored, TokenLoss


class Slopes:
    """dL/d log π(y_t) and dL/dH_t of a loss whose part of a token depends on that token's own numbers alone.

    Such a loss can be differentiated at some tokens before the others are scored. V(s_t) is another head's matter: it
    stands still here at the old value.

    Args:
        loss: of (new scores, rows, credit), unreduced; of hfpg's all but those with a ratio or a KL of sequences.
        rows, credit: of a micro-batch, [B, C].
        weights: [B, C], what every token's loss counts for in L.
    """

    def __init__(
        self,
        loss: Callable[[Scored, Rollout, Estimates], TokenLoss],
        rows: Rollout,
        credit: Estimates,
        weights: Float[Tensor, "B C"],
    ):
        self.loss, self.rows, self.credit, self.weights = loss, rows, credit, weights
        self.places = rows.completion_mask.flatten().nonzero()[:, 0]

    @torch.enable_grad()
    def __call__(
        self, chunk: slice, logprobs: Float[Tensor, " n"], entropy: Float[Tensor, " n"] | None
    ) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"] | None]:
        """At the tokens `chunk` of all N chosen ones (rows of the mask in order), where these are the scores."""
        at, old = self.places[chunk], self.rows.old_logprobs.to(logprobs.dtype)
        leaves = [old.flatten().index_copy(0, at, logprobs).view_as(old).requires_grad_()]
        if entropy is not None:
            leaves.append(torch.zeros_like(old).flatten().index_copy(0, at, entropy).view_as(old).requires_grad_())
        new = Scored(leaves[0], None if entropy is None else leaves[1], self.rows.values, None)
        per_token = torch.where(self.rows.completion_mask, self.loss(new, self.rows, self.credit).loss, 0)
        total = (per_token * self.weights).sum()
        found = torch.autograd.grad(total + sum(0 * x.sum() for x in leaves), leaves)
        slopes = [x.flatten()[at] for x in found]
        return slopes[0], None if entropy is None else slopes[1]
