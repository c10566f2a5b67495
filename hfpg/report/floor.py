"""How far a step is from what its matrix products alone would take on this machine."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import nn

from hfpg.fast.product import product
from hfpg.models import ActorCritic
from hfpg.pretrained import causal_lm
from hfpg.types import Rollout


class Sizes(NamedTuple):
    """Numbers in the matrices of a model that every position goes through: multiplications per position."""

    frozen: int  # in the layers below those that learn
    above: int  # in the other layers
    learning: int  # of `above`, those that learn
    head: int
    head_learning: int


def sizes(actor: ActorCritic) -> Sizes | None:
    """The sizes of a policy; None for a mixture of experts, of which a position takes a part."""
    lm = causal_lm(actor.policy)
    embeddings = {id(p) for m in lm.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = lm.get_output_embeddings()
    of_head = {id(p) for p in head.parameters()} if head is not None else set()
    counts = {"frozen": 0, "above": 0, "learning": 0}
    seen_learning = False
    for p in lm.base_model.parameters():
        if p.dim() > 2:
            return None
        if p.dim() < 2 or id(p) in embeddings | of_head:
            continue
        seen_learning = seen_learning or p.requires_grad
        below = bool(actor.frozen_layers) and not seen_learning
        counts["frozen" if below else "above"] += p.numel()
        counts["learning"] += p.numel() * p.requires_grad
    matrix = head.weight if head is not None else next(lm.parameters())
    return Sizes(**counts, head=matrix.numel(), head_learning=matrix.numel() * matrix.requires_grad)


def products(rollout: Rollout, of: Sizes, epochs: int, reference: bool, separate: bool) -> float:
    """Floating-point operations in the matrix products of one step: 2 per multiplication.

    Every prompt is counted once, however many completions it has, and old log-probs are those of sampling. A pass
    that trains costs what it says, as much again for the gradient of its input, and as much for that of the weights
    that learn. Attention, norms, activations, softmax and the optimizer are not counted. Nor is what a step saves when
    rows add nothing or `max_kl` ends it early: then it may take less.
    """
    lengths = zip(rollout.group_ids.tolist(), rollout.prompt_mask.sum(1).tolist(), strict=True)
    prompts = sum(dict(lengths).values())
    tokens = float(rollout.completion_mask.sum())
    positions, whole = prompts + tokens, of.frozen + of.above
    sampling = 2 * (positions * whole + tokens * of.head)
    states = 2 * positions * of.frozen if of.frozen else 0
    scoring = 2 * (positions * of.above + tokens * of.head) * reference
    training = positions * (4 * of.above + 2 * of.learning) + tokens * (4 * of.head + 2 * of.head_learning)
    critic = positions * (2 * of.above + epochs * (4 * of.above + 2 * of.learning)) * separate
    return sampling + states + scoring + epochs * training + critic


def rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a large matrix product here and now: the best of torch's and oneDNN's."""
    rows, inner, outer = (512, 768, 3072) if device.type == "cpu" else (8192, 4096, 8192)
    a = torch.randn(rows, inner, device=device, dtype=dtype)
    b = torch.randn(outer, inner, device=device, dtype=dtype)
    best = float("inf")
    for multiply in (torch.nn.functional.linear, product) * 6:
        _wait(device)
        start = time.perf_counter()
        multiply(a, b)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return 2 * rows * inner * outer / best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Floor:
    """Says of each step how many seconds its matrix products need, and how many times as long it took.

    Args:
        actor: the policy and value function.
        accelerator: its processes share the work, in its precision.
        epochs: passes over a rollout.
        reference: whether a reference policy scores it.
    """

    def __init__(self, actor: ActorCritic, accelerator: Accelerator, epochs: int, reference: bool):
        self.actor, self.epochs, self.reference = actor, epochs, reference
        self.world = accelerator.num_processes
        bf16 = accelerator.mixed_precision == "bf16"
        self.dtype = torch.bfloat16 if bf16 else causal_lm(actor.policy).dtype
        self.rate = 0.0

    def metrics(self, rollout: Rollout, seconds: float) -> dict[str, float]:
        """seconds/floor and times_floor; nothing for a model whose matrices cannot be counted."""
        found = sizes(self.actor)
        if found is None:
            return {}
        device = rollout.completion_ids.device
        self.rate = self.rate or rate(device, self.dtype)
        separate = self.actor.value_kind == "separate"
        floor = products(rollout, found, self.epochs, self.reference, separate) / (self.rate * self.world)
        return {"seconds/floor": floor, "times_floor": seconds / floor if floor else 0.0}
