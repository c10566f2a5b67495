"""A natural-gradient step of the policy inside a trust region: what TRPO does in place of the optimizer.

Everything is summed over micro-batches and ranks before it is used, and every decision is taken from such sums, so a
step does not depend on how rows are batched or spread over processes.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any, Literal

import torch
from accelerate.utils import broadcast
from torch import Tensor

from hfpg.config import require
from hfpg.fields import first_line
from hfpg.learner import Learner, LossFunction
from hfpg.micro_batches import clip_columns, model_inputs, trim
from hfpg.models import ActorCritic
from hfpg.ops.masked import token_coefficients
from hfpg.ops.trust_region import (
    conjugate_gradient,
    finite_difference,
    line_search,
    mean_eigenvalue,
    signs,
    step_length,
)
from hfpg.pretrained import causal_lm
from hfpg.types import Estimates, Rollout


logger = logging.getLogger(__name__)

Fisher = Literal["auto", "exact", "finite_difference"]
TRACE_PROBES = 2
ROUNDING = 8  # units in the last place of the largest log-prob


class TrustRegion:
    """D(θ) = Σ_b w_b Σ_t KL(π_old(·|s_t) ‖ π_θ(·|s_t)) / Σ w around the policy as it is, nats per completion.

    The old policy is a copy that shares every frozen parameter with the policy: with LoRA it costs the adapter, in
    full fine-tuning a second model. It is also what a failed search goes back to.

    Raises:
        ConfigError: parameters below single precision, whose rounding would eat the step.
    """

    def __init__(self, learner: Learner, rollout: Rollout, estimates: Estimates, loss: LossFunction):
        self.learner, self.rollout, self.estimates, self.loss = learner, rollout, estimates, loss
        self.actor: ActorCritic = learner.actor
        named = list(self.actor.named_parameters())
        self.parameters = [p for n, p in named if p.requires_grad and not n.startswith("value.")]
        low = {str(p.dtype) for p in self.parameters if torch.finfo(p.dtype).bits < 32}
        require(
            not low, f"TRPO's steps are lost in the rounding of {sorted(low)} parameters; load the model in float32"
        )
        shared = {id(p): p for p in self.actor.policy.parameters() if not p.requires_grad}
        self.old = ActorCritic(copy.deepcopy(self.actor.policy, shared)).requires_grad_(False)
        copies = zip(self.actor.policy.parameters(), self.old.policy.parameters(), strict=True)
        self.start = [old for p, old in copies if p.requires_grad]
        self.coefficients = token_coefficients(rollout.completion_mask, rollout.weights, "sequence_sum")
        self.batches = learner.shares(rollout)

    # ── parameters as one vector

    def flat(self, tensors: Any) -> Tensor:
        """One vector of gradients; a parameter without one counts as 0."""
        pairs = zip(tensors, self.parameters, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g.detach()).flatten() for g, p in pairs])

    @torch.no_grad()
    def move(self, offset: Tensor | None) -> None:
        """θ = θ_old + offset; None: θ_old, bit for bit."""
        for p, start in zip(self.parameters, self.start, strict=True):
            p.copy_(start)
        for p, part in zip(self.parameters, [] if offset is None else self.split(offset), strict=offset is not None):
            p.add_(part)

    def split(self, v: Tensor) -> list[Tensor]:
        """The vector in the parameters' shapes."""
        sizes = [p.numel() for p in self.parameters]
        return [part.view_as(p) for part, p in zip(v.split(sizes), self.parameters, strict=True)]

    # ── sums over micro-batches and ranks

    def summed(self, of: Callable[[Tensor], Tensor], like: Tensor) -> Tensor:
        """Σ over this rank's micro-batches and over ranks of `of(rows)`."""
        total = torch.zeros_like(like)
        for rows in self.batches:
            total += of(rows)
        return self.learner.accelerator.reduce(total, reduction="sum")

    def divergence(self, rows: Tensor) -> Tensor:
        """The part of D that these rows make."""
        return self._scored(rows)[0]

    def _scored(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """These rows' parts of D and of the loss."""
        part = trim(self.rollout.take(rows))
        width = part.completion_ids.shape[1]
        with self.learner.accelerator.autocast():
            inputs = model_inputs(part, self.learner.args.temperature)
            new = self.actor(**inputs, with_values=False, reference=self.old, reverse=True)
        c = self.coefficients[rows, :width]
        token = self.loss(new, part, clip_columns(self.estimates.take(rows), width))
        return (c * new.kl).sum(), (c * torch.where(part.completion_mask, token.loss, 0)).sum()

    def exact_part(self, rows: Tensor, v: Tensor) -> Tensor:
        """These rows' part of F·v, by differentiating twice."""
        grads = torch.autograd.grad(self.divergence(rows), self.parameters, create_graph=True, allow_unused=True)
        pairs = zip(grads, self.split(v), strict=True)
        along = torch.stack([(g * part).sum() for g, part in pairs if g is not None]).sum()
        return self.flat(torch.autograd.grad(along, self.parameters, allow_unused=True))

    def gradient_part(self, rows: Tensor) -> Tensor:
        """These rows' part of ∇D where θ is now."""
        return self.flat(torch.autograd.grad(self.divergence(rows), self.parameters, allow_unused=True))

    def exact_product(self, v: Tensor) -> Tensor:
        """F·v: the Hessian of D at θ_old, by differentiating twice."""
        return self.summed(lambda rows: self.exact_part(rows, v), v)

    def difference_product(self, v: Tensor) -> Tensor:
        """F·v by a central difference of ∇D: one derivative is enough, so any attention kernel will do."""
        return self.difference(lambda: self.summed(self.gradient_part, v), v)

    def difference(self, gradient: Callable[[], Tensor], v: Tensor) -> Tensor:
        """The central difference of `gradient()` along v, around θ_old."""

        def gradient_at(offset: Tensor) -> Tensor:
            self.move(offset)
            return gradient()

        try:
            # in fp32 a smaller step drowns in rounding, a larger one leaves the quadratic region
            return finite_difference(gradient_at, v, 1e-4 if v.dtype == torch.float64 else 1e-2)
        finally:
            self.move(None)

    def trial(self, v: Tensor) -> int:
        """Can this rank's first micro-batch be differentiated twice? 0: yes; 1: it comes out wrong; 2: it raises.

        Wrong: not finite, or far from the finite difference, as by a kernel whose backward pass is no function that
        autograd sees. There is no collective in here: a rank that raises would leave the others waiting.
        """
        for rows in self.batches[:1]:
            try:
                twice = self.exact_part(rows, v)
            except RuntimeError as error:
                logger.info("no Fisher products by differentiating twice: %s", first_line(error))
                return 2
            once = self.difference(lambda rows=rows: self.gradient_part(rows), v)  # type: ignore[misc]
            if not (twice - once).norm() <= 0.1 * torch.maximum(twice.norm(), once.norm()):
                logger.info("Fisher products by differentiating twice are not those by finite differences")
                return 1
        return 0

    @torch.no_grad()
    def at(self, offset: Tensor) -> tuple[float, float]:
        """(D, loss) at θ_old + offset."""
        self.move(offset)
        zero = torch.zeros(2, dtype=torch.float64, device=offset.device)
        found = self.summed(lambda rows: torch.stack(self._scored(rows)).double(), zero)
        return float(found[0]), float(found[1])


def choose_fisher(region: TrustRegion, asked: Fisher, v: Tensor) -> Fisher:
    """How products are made: as asked, or as one trial with v says, the same on every rank; one trial per run.

    Raises:
        ConfigError: fisher="exact" of a model whose kernels have no second derivative.
    """
    if asked == "finite_difference":
        return asked
    outcome = region.learner.fisher_trial
    if outcome is None:
        found = torch.tensor([region.trial(v)], device=v.device)
        outcome = region.learner.fisher_trial = int(region.learner.accelerator.gather(found).max())
    require(
        asked != "exact" or outcome < 2,
        f"fisher='exact' differentiates twice, and the attention kernels of "
        f"{type(causal_lm(region.actor.policy)).__name__} have no second derivative here; load it with "
        "attn_implementation='eager', or use fisher='finite_difference'",
    )
    return "exact" if asked == "exact" or outcome == 0 else "finite_difference"


def natural_step(
    learner: Learner,
    rollout: Rollout,
    estimates: Estimates,
    loss: LossFunction,
    *,
    max_kl: float,
    damping: float = 0.1,
    cg_iterations: int = 10,
    backtrack: float = 0.8,
    backtrack_steps: int = 10,
    fisher: Fisher = "auto",
) -> dict[str, float]:
    """One step that lowers `loss` with D ≤ max_kl, or none; a search that fails leaves θ as it was, bit for bit.

    x solves (F + λI) x = g with λ = damping · tr(F) / dim θ, and the step is √(2δ / xᵀ(F + λI)x) · x, shortened until
    D ≤ δ and the loss is lower.

    trust_region_kl         D of the step taken, nats per completion
    surrogate_gain          how far the loss fell
    step_fraction           share of the full step that was taken; 0: none
    line_search_failures    1 when no share of it would do
    cg_residual             ‖g − (F + λI)x‖ / ‖g‖
    fisher_exact            1: products by differentiating twice; 0: by finite differences
    """
    region = TrustRegion(learner, rollout, estimates, loss)
    metrics, largest = learner.gradient(rollout, estimates, loss, "sequence_sum")
    g = -region.flat([p.grad for p in region.parameters])
    learner.forget_gradient()
    norm = float(g.double().norm())
    metrics |= dict(grad_norm=norm, optimizer_steps=0.0, kl_stops=0.0, skipped_steps=0.0, first_log_ratio_max=largest)
    metrics |= dict(trust_region_kl=0.0, surrogate_gain=0.0, step_fraction=0.0, line_search_failures=0.0)
    if not 0 < norm < float("inf"):
        return metrics | {"skipped_steps": float(norm != 0)}
    if only_rounding(rollout, estimates):  # a step is as long as max_kl says, along noise too
        return metrics
    kind = choose_fisher(region, fisher, g)
    whole, residual = whole_step(region, g, kind, max_kl, damping, cg_iterations)
    fraction, kl, gain = search(region, whole, max_kl, backtrack, backtrack_steps)
    if fraction > 0:
        learner.on_event("on_pre_optimizer_step")
        region.move(fraction * whole)
        learner.on_event("on_optimizer_step")
        metrics |= dict(optimizer_steps=1.0, trust_region_kl=kl, surrogate_gain=gain, step_fraction=fraction)
    metrics["line_search_failures"] = float(fraction == 0)
    return metrics | dict(cg_residual=residual, fisher_exact=float(kind == "exact"))


def only_rounding(rollout: Rollout, estimates: Estimates) -> bool:
    """Whether no advantage is more than what rounding leaves of equal scores and of the KL of two equal policies."""
    counted = rollout.completion_mask & (rollout.weights > 0)[:, None]
    if not counted.any():
        return False
    largest = float(estimates.advantages[counted].abs().max())
    logprobs = rollout.old_logprobs[counted]
    return largest <= ROUNDING * torch.finfo(logprobs.dtype).eps * max(1.0, float(logprobs.abs().max()))


def whole_step(
    region: TrustRegion, g: Tensor, kind: Fisher, max_kl: float, damping: float, cg_iterations: int
) -> tuple[Tensor, float]:
    """√(2δ / xᵀ(F + λI)x) · x, the same on every rank, and the residual of x."""
    product = region.exact_product if kind == "exact" else region.difference_product
    seed, turn = region.learner.args.seed, region.learner.turn
    probes = [signs(len(g), g, seed, "trace", turn, i) for i in range(TRACE_PROBES)]
    shift = damping * mean_eigenvalue(product, probes)

    def damped(v: Tensor) -> Tensor:
        return product(v) + shift * v

    x, residual = conjugate_gradient(damped, g, cg_iterations)
    return broadcast(step_length(x, damped(x), max_kl) * x), residual


def search(
    region: TrustRegion, whole: Tensor, max_kl: float, backtrack: float, backtrack_steps: int
) -> tuple[float, float, float]:
    """(share of the step to take, D there, gain there); zeros where none will do. θ ends where it began."""
    seen: dict[float, tuple[float, float]] = {0.0: (0.0, 0.0)}

    def evaluate(fraction: float) -> tuple[float, float]:
        kl, after = region.at(fraction * whole)
        seen[fraction] = kl, before - after
        return seen[fraction]

    try:
        before = region.at(torch.zeros_like(whole))[1]
        fraction = line_search(evaluate, max_kl, backtrack, backtrack_steps)
    finally:  # whatever ends the search, an interrupt too
        region.move(None)
    return fraction, *seen[fraction]
