"""Matrix products in single precision on a CPU, by oneDNN.

MKL, which torch multiplies with, leaves the AVX-512 units of AMD's processors unused: oneDNN takes half of its time
there, forward and backward (docs/performance.md), and is its equal on Intel's. On processors without these units the
two are equal, and oneDNN keeps memory for every shape. Every function here falls back to torch's own product where
oneDNN is absent, or the matrix small, or nothing is gained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable


SMALLEST = 1 << 16  # numbers in a matrix: below, the call costs more than the product
PART_BYTES = 16 << 20  # of a product that is added to another
PART_ROWS = 1024  # of a long sum
FEWEST = 4  # rows: for fewer, MKL's matrix-vector product is as fast


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Inside, a GPU multiplies numbers in single precision rounded to 11 bits (bfloat16: 8), and adds them up in full.

    For what comes out of half precision anyway. On a CPU nothing changes.
    """
    if not enabled:
        yield
        return
    matmul = torch.backends.cuda.matmul
    newer = getattr(matmul, "fp32_precision", None)  # its name from torch 2.9 on; the older one moves both
    try:
        older = matmul.allow_tf32
        matmul.allow_tf32 = True
    except RuntimeError:  # somebody has used the newer name, and torch forbids to mix them
        older, matmul.fp32_precision = None, "tf32"
    try:
        yield
    finally:
        if older is not None:
            matmul.allow_tf32 = older
        if newer is not None:
            matmul.fp32_precision = newer


def available() -> bool:
    """True where this torch has oneDNN's linear product, and `torch.backends.mkldnn.enabled` has not been cleared."""
    flags = torch.backends.mkldnn
    return flags.is_available() and bool(flags.enabled) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def gains() -> bool:
    """False on a processor of 256-bit units, where oneDNN is no faster than torch's own product."""
    return torch.backends.cpu.get_cpu_capability() != "AVX2"


def suits(matrix: Tensor) -> bool:
    """True for a matrix that oneDNN multiplies faster."""
    return (
        matrix.device.type == "cpu"
        and matrix.dtype == torch.float32
        and matrix.numel() >= SMALLEST
        and gains()
        and available()
        and not torch.is_autocast_enabled("cpu")
    )


def rung(rows: int) -> int:
    """The next size, eight per factor of two and multiples of 4: what so many rows are made up to.

    For every shape oneDNN keeps 0.6 MB and takes some milliseconds the first time, so sizes should be few.
    """
    step = 1 << max(2, rows.bit_length() - 4)
    return -(-rows // step) * step


@torch.no_grad()
def product(a: Float[Tensor, "N K"], b: Float[Tensor, "M K"], bias: Tensor | None = None) -> Float[Tensor, "N M"]:
    """a @ b.T (+ bias), without a gradient. Transposed views are multiplied as they are."""
    if len(a) >= FEWEST and a.dtype == b.dtype and suits(b if b.numel() >= a.numel() else a):
        return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return torch.nn.functional.linear(a, b, bias)


def add_product(out: Float[Tensor, "M N"], a: Float[Tensor, "M K"], b: Float[Tensor, "N K"]) -> None:
    """out += a @ b.T. Rows go through in parts: oneDNN cannot add, and a product of 154 MB would be fresh pages."""
    if not suits(out):
        out.addmm_(a, b.T)
        return
    rows = max(1, PART_BYTES // (out.shape[1] * out.element_size()))
    for start in range(0, len(out), rows):
        out[start : start + rows] += product(a[start : start + rows], b)


def inner_product(a: Float[Tensor, "K N"], b: Float[Tensor, "K M"]) -> Float[Tensor, "N M"]:
    """a.T @ b for a long K, in parts: oneDNN takes up to a fifth less time than for the whole."""
    if not suits(b):
        return a.T @ b
    out = product(a[:PART_ROWS].T, b[:PART_ROWS].T)
    for start in range(PART_ROWS, len(a), PART_ROWS):
        out += product(a[start : start + PART_ROWS].T, b[start : start + PART_ROWS].T)
    return out


def linear(
    x: Float[Tensor, "... K"], weight: Tensor, bias: Float[Tensor, " M"] | None, transposed: bool = False
) -> Float[Tensor, "... M"]:
    """x · weightᵀ + bias with weight [M, K], or x · weight + bias with weight [K, M] if `transposed` (GPT-2).

    One derivative only; the products of the backward pass are oneDNN's as well.
    """
    flat = x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled():
        out = _Linear.apply(flat, weight, bias, transposed)
    else:
        out = product(flat, weight.T if transposed else weight, bias)
    return out.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
        """The product."""
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.transposed, ctx.biased = transposed, bias is not None
        return product(x, weight.T if transposed else weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The two products of the gradients."""
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad[:3]
        to_x = to_weight = None
        if of_x:
            to_x = product(g, weight if ctx.transposed else weight.T)
        if of_weight:  # in the layout of the weight, or it would be copied where it is added up
            to_weight = product(x.T, g.T) if ctx.transposed else product(g.T, x.T)
        return to_x, to_weight, g.sum(0) if ctx.biased and of_bias else None, None
