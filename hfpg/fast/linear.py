"""How the linear layers of a model multiply for the time of a forward pass."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hfpg.fast.product import FEWEST, linear, suits, tf32


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


@contextmanager
def own_products(model: nn.Module, lm: PreTrainedModel) -> Iterator[None]:
    """Inside, linear layers of `model` multiply by oneDNN on a CPU, and the LM head of `lm`, in it, precisely."""
    with onednn_linears(model), precise_head(lm):
        yield


@contextmanager
def half_linears(model: nn.Module) -> Iterator[None]:
    """Inside, under autocast, the linear layers of a model hold their fp32 weights in autocast's precision themselves.

    Autocast does that too, in a cache that every thread of the process can clear: too little for a CUDA graph, which
    reads the weights where they were when it was recorded. For the time in which the weights do not change.
    """
    kind = next(model.parameters()).device.type
    dtype = torch.get_autocast_dtype(kind)
    layers: list[Any] = [x for x in model.modules() if type(x) in (nn.Linear, Conv1D) and "forward" not in vars(x)]
    mine = [x for x in layers if x.weight.dtype == torch.float32] if torch.is_autocast_enabled(kind) else []
    for layer in mine:
        weight = layer.weight.detach().to(dtype)
        bias = None if layer.bias is None else layer.bias.detach().to(dtype)
        rows = weight.T if isinstance(layer, Conv1D) else weight
        vars(layer)["forward"] = functools.partial(_linear, rows, bias)
    try:
        yield
    finally:
        for layer in mine:
            vars(layer).pop("forward", None)


def _linear(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """x · weightᵀ + bias in the precision of the weight."""
    return nn.functional.linear(x.to(weight.dtype), weight, bias)


@contextmanager
def precise_head(lm: PreTrainedModel) -> Iterator[None]:
    """Inside, a linear LM head computes in the precision of its weights under autocast too; forward by TF32 on a GPU.

    A logit of 20 in bfloat16 is wrong by up to 0.06, and so is the log-prob: more than what a step of PPO moves it.
    For forward passes and for the backward passes that make parts of them again. Heads in less than single precision,
    and those that are more than a linear layer, stay as they are.
    """
    head = lm.get_output_embeddings()
    if type(head) is not nn.Linear or head.weight.dtype.itemsize < 4:
        yield
        return
    own, inner = vars(head), head.forward
    before = own.get("forward")

    def forward(x: Tensor) -> Tensor:
        coarse = torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, enabled=False), tf32(coarse):
            return inner(x.to(head.weight.dtype))

    own["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del own["forward"]
        else:
            own["forward"] = before


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
