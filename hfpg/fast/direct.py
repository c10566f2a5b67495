"""Gradients of the largest matrices, added where they are kept.

Autograd makes the gradient of every use of a matrix as a tensor of its size, and adds them up. For an embedding and
an LM head of 50,000 × 768 these are two blocks of 154 MB in every backward pass, on a CPU out of fresh, slow pages.
Inside `adding_to(matrix)` the uses that know of this module add to `matrix.grad` themselves, and `keeping_blocks`
keeps that block from step to step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable


_DIRECT: set[int] = set()


@contextmanager
def adding_to(*matrices: Tensor) -> Iterator[None]:
    """Forward passes inside make backward passes that add to `.grad` of these leaves.

    For `backward()` of one process only: `torch.autograd.grad` would find nothing, and hooks, such as those by which
    processes average their gradients, are not called. Leaves that are not on a CPU, or have hooks, are left alone.
    """
    mine = {id(x) for x in matrices if _suits(x)}
    _DIRECT.update(mine)
    try:
        yield
    finally:
        _DIRECT.difference_update(mine)


@contextmanager
def keeping_blocks(*matrices: Tensor) -> Iterator[None]:
    """For a block that drops gradients: those of leaves that `adding_to` would take are zeros after it, in place."""
    kept = [(x, x.grad) for x in matrices if _suits(x) and x.grad is not None]
    yield
    for matrix, gradient in kept:
        matrix.grad = gradient.zero_()


def is_direct(matrix: Tensor) -> bool:
    """True inside `adding_to(matrix)`."""
    return id(matrix) in _DIRECT


def gradient_of(matrix: Tensor) -> Tensor:
    """Its `.grad`, zeros where there is none yet."""
    if matrix.grad is None:
        matrix.grad = torch.zeros_like(matrix)
    return matrix.grad


def look_up(
    matrix: Float[Tensor, "V H"], ids: Int[Tensor, "*shape"], padding_idx: int | None = None
) -> Float[Tensor, "*shape H"]:
    """Rows of a matrix, as `torch.nn.functional.embedding`, which gives row `padding_idx` no gradient."""
    if is_direct(matrix) and torch.is_grad_enabled():
        return _LookUp.apply(matrix, ids, padding_idx)
    return torch.nn.functional.embedding(ids, matrix, padding_idx)


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, matrix: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
        """The rows."""
        ctx.matrix, ctx.padding_idx = matrix, padding_idx
        ctx.save_for_backward(ids)
        return torch.nn.functional.embedding(ids, matrix)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None]:
        """Adds to the matrix's gradient; autograd has nothing to do."""
        (ids,) = ctx.saved_tensors
        if ctx.padding_idx is not None:
            gradient = gradient.masked_fill((ids == ctx.padding_idx)[..., None], 0)
        gradient_of(ctx.matrix).index_add_(0, ids.flatten(), gradient.flatten(0, -2))
        return None, None, None


def _suits(x: Tensor) -> bool:
    return x.requires_grad and x.is_leaf and x.device.type == "cpu" and not _hooked(x)


def _hooked(x: Tensor) -> bool:
    return bool(getattr(x, "_backward_hooks", None) or getattr(x, "_post_accumulate_grad_hooks", None))
