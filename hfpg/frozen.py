"""Training the top layers only: what the frozen layers below say of a sequence is computed once and used again.

The layers are found by their path in the model, so this holds for any architecture whose layers stand in one list.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hfpg.config import require
from hfpg.pretrained import causal_lm, is_peft
from hfpg.text_config import text_config


def freeze_below(policy: Any, trainable_layers: int) -> None:
    """Let only the top layers of a model learn: embeddings, layers below, the last norm and the LM head are frozen.

    Raises:
        ConfigError: no list of layers, fewer layers than asked for, layers that share parameters with those below, or
            an adapter, which says itself what is trained.
    """
    require(
        not is_peft(policy),
        f"trainable_layers={trainable_layers} freezes layers of the model, and an adapter is trained here; give "
        "layers_to_transform to its LoraConfig instead",
    )
    lm = causal_lm(policy)
    layers = layer_list(lm.base_model)
    name = type(lm).__name__
    require(layers is not None, f"trainable_layers={trainable_layers}: {name} has no list of layers to choose from")
    assert layers is not None
    require(
        1 <= trainable_layers <= len(layers),
        f"trainable_layers={trainable_layers} must lie between 1 and {len(layers)}, the layers of this {name}",
    )
    works = next(n for n in range(trainable_layers, len(layers) + 1) if not shared_with_below(layers, n))
    require(
        works == trainable_layers,
        f"trainable_layers={trainable_layers}: these layers of {name} share parameters with layers below them, which "
        f"would learn too; use trainable_layers={works}",
    )
    lm.requires_grad_(False)
    for layer in list(layers)[len(layers) - trainable_layers :]:
        layer.requires_grad_(True)


def layer_list(trunk: nn.Module) -> nn.ModuleList | None:
    """The decoder layers: the list as long as the configuration says, nearest to the trunk.

    They may be of several classes (Jamba). Where none is as long, the list of modules of one class that holds most of
    the trunk's parameters.
    """
    named = [(name.count("."), m) for name, m in trunk.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    count = getattr(text_config(getattr(trunk, "config", None)), "num_hidden_layers", None)
    right = [(depth, m) for depth, m in named if len(m) == count]
    nearest = min((depth for depth, _ in right), default=0)
    lists = [m for depth, m in right if depth == nearest]
    lists = lists or [m for _, m in named if len({type(x) for x in m}) == 1]
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()), default=None)


def shared_with_below(layers: nn.ModuleList, count: int) -> bool:
    """Whether the top `count` layers have parameters in common with those below (Zamba's transformer block)."""
    below = {id(p) for layer in list(layers)[: len(layers) - count] for p in layer.parameters()}
    return any(id(p) in below for layer in list(layers)[len(layers) - count :] for p in layer.parameters())


def input_embeddings(trunk: nn.Module) -> nn.Module | None:
    """The trunk's embeddings of its tokens; None where it does not say."""
    try:
        return trunk.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # such as the wrapper around BART's decoder
        return None


def frozen_layers(trunk: nn.Module) -> int:
    """How many layers, from the first, have nothing to learn, with the embeddings below them; 0 where one has."""
    layers = layer_list(trunk)
    embeddings = input_embeddings(trunk)
    if layers is None or embeddings is None or any(p.requires_grad for p in embeddings.parameters()):
        return 0
    learning = [any(p.requires_grad for p in layer.parameters()) for layer in layers]
    return learning.index(True) if True in learning else 0


@contextmanager
def skipping(
    trunk: nn.Module, start: int, stop: int, states: Float[Tensor, "R L H"] | None = None
) -> Iterator[_Skipped | None]:
    """Inside, layers start … stop − 1 of the trunk are not computed.

    What they give is `states`, or what they get. Yields the stand-in of the first, whose `read` is what it got.
    """
    layers = layer_list(trunk)
    if layers is None or start == stop:
        yield None
        return
    originals = list(layers)[start:stop]
    stands = [_Skipped(layer, None) for layer in originals]
    stands[-1].__dict__["states"] = states
    for place, stand in enumerate(stands, start):
        layers._modules[str(place)] = stand
    try:
        yield stands[0]
    finally:
        for place, layer in enumerate(originals, start):
            layers._modules[str(place)] = layer


@torch.no_grad()
def states_below(trunk: nn.Module, count: int, inputs: dict[str, Any]) -> Float[Tensor, "R L H"]:
    """What the first `count` layers of the trunk say; those above are not computed."""
    return _below(trunk, count, inputs)


def _below(trunk: nn.Module, count: int, inputs: dict[str, Any]) -> Tensor:
    layers = layer_list(trunk)
    assert layers is not None
    with skipping(trunk, count, len(layers)) as first:
        trunk(**inputs)
    assert first is not None
    return first.__dict__["read"]


def learns_below(trunk: nn.Module, count: int, inputs: dict[str, Any]) -> bool:
    """True if something below layer `count` gets a gradient, of which the layers themselves tell nothing."""
    try:
        with torch.enable_grad():
            return _below(trunk, count, inputs).requires_grad
    except (TypeError, ValueError, IndexError, AttributeError, RuntimeError, KeyError):
        return True


def resumes(trunk: nn.Module, count: int, inputs: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
    """The trunk's output computed whole, and from its states; None where it cannot be computed from them."""
    try:
        with torch.no_grad():
            whole = trunk(**inputs).last_hidden_state
            states = states_below(trunk, count, inputs)
            with skipping(trunk, 0, count, states):
                return whole, trunk(**inputs).last_hidden_state
    except (TypeError, ValueError, IndexError, AttributeError, RuntimeError, KeyError):
        return None


class _Skipped(nn.Module):
    """Stands for a layer that is not computed: gives the states, or hands on what it gets."""

    def __init__(self, layer: nn.Module, states: Tensor | None):
        super().__init__()
        # no submodule: nobody is to find the layer's parameters here
        self.__dict__.update(layer=layer, states=states, read=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["layer"], name)  # models ask their layers for things such as `attention_type`

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The states where they are given, else the input."""
        self.__dict__["read"] = hidden_states
        states = self.__dict__["states"]
        return hidden_states if states is None else states.to(hidden_states.dtype)
