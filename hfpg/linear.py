"""Linear layers of a model by oneDNN for the time of a forward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hfpg.ops.product import FEWEST, linear, suits


@contextmanager
def onednn_linears(model: nn.Module, sizes: Callable[[int], int] = lambda rows: rows) -> Iterator[None]:
    """Inside, fp32 linear layers on the CPU multiply by oneDNN in place of MKL: the same up to rounding.

    A graph made inside has one derivative, whenever its backward pass is run. Rows of x are made up to `sizes(rows)`,
    for callers whose numbers of rows are many: oneDNN keeps something for each.
    """
    layers = [layer for layer in model.modules() if _suits(layer)]
    for layer in layers:
        layer.forward = functools.partial(_forward, layer, sizes)
    try:
        yield
    finally:
        for layer in layers:
            vars(layer).pop("forward", None)


def _suits(layer: nn.Module) -> bool:
    return (
        type(layer) in (nn.Linear, Conv1D)
        and "forward" not in vars(layer)  # somebody has replaced it: theirs stays
        and suits(layer.weight)  # type: ignore[arg-type]
    )


def _forward(layer: nn.Module, sizes: Callable[[int], int], x: Tensor) -> Tensor:
    """`layer(x)`; x [..., in]."""
    if x.numel() < FEWEST * x.shape[-1] or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return type(layer).forward(layer, x)  # type: ignore[attr-defined]
    rows = x.numel() // x.shape[-1]
    flat = nn.functional.pad(x.reshape(rows, -1), (0, 0, 0, spare)) if (spare := sizes(rows) - rows) else x
    out = linear(flat, layer.weight, layer.bias, transposed=isinstance(layer, Conv1D))  # type: ignore[arg-type]
    return out[:rows].view(*x.shape[:-1], -1) if spare else out
