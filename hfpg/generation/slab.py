"""A cache of keys and values for a known number of rows and columns: written in place, never grown by copying."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer


class SlabLayer(DynamicLayer):
    """Keys and values of one layer, [rows, heads, columns, D] each; the model gets views of the part that is filled.

    Prompts are read first: they end at column `width`, and one that is read once is kept for all of its rows. After
    that every forward pass adds one column for all rows that are left.
    """

    def __init__(self, rows: int, width: int, columns: int):
        super().__init__()
        self.rows, self.width, self.columns = rows, width, columns
        self.filled = 0
        self.target: tuple[slice, Tensor | None] | None = None
        self.window: tuple[Tensor, int] | None = None

    def read(self, rows: slice, source: Int[Tensor, " n"] | None) -> None:
        """The next forward pass reads prompts of these rows; row i is that of prompt source[i], None: of prompt i."""
        self.filled, self.target = 0, (rows, source)

    def begin(self) -> None:
        """All prompts are read."""
        self.filled, self.target = self.width, None

    def fix(self, column: Int[Tensor, " 1"], window: int) -> None:
        """From now on a forward pass writes the column that the tensor says, and may attend to the first `window`.

        So one step is like the next, for a CUDA graph. What is not filled yet is for the caller's mask to hide.
        """
        if self.window is None:
            for slab in self.slabs:  # a weight of 0 times what memory held may be NaN
                slab[..., self.filled :, :] = 0
        self.window = column, window

    def drop(self, holes: Int[Tensor, " n"], movers: Int[Tensor, " n"], rows: int) -> None:
        """Keep the first `rows` rows, once the rows `movers` have been moved to `holes`."""
        self.rows = rows
        for slab in self.slabs:
            slab[holes, ..., : self.filled, :] = slab[movers, ..., : self.filled, :]

    # ── what the model asks for

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Room for all rows and columns; heads and D are those of the first keys and values.

        In the precision of autocast, to which attention would round them anyway: rotary embeddings leave keys in fp32.
        """
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        if torch.is_autocast_enabled(self.device.type) and self.dtype != torch.float64:
            self.dtype = torch.get_autocast_dtype(self.device.type)
        shapes = [(self.rows, *x.shape[1:-2], self.columns, x.shape[-1]) for x in (key_states, value_states)]
        self.slabs = [torch.empty(shape, dtype=self.dtype, device=self.device) for shape in shapes]

    def update(
        self, key_states: Float[Tensor, "b heads n D"], value_states: Float[Tensor, "b heads n E"], *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Keep new keys and values; returns all that these rows may attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.window is not None:
            column, window = self.window
            for slab, new in zip(self.slabs, (key_states, value_states), strict=True):
                slab[: self.rows].index_copy_(slab.dim() - 2, column, new.to(slab.dtype))
            self.keys, self.values = (slab[: self.rows, ..., :window, :] for slab in self.slabs)
            return self.keys, self.values
        start, self.filled = self.filled, self.filled + key_states.shape[-2]
        if self.target is not None:
            self._keep_prompts(*self.target, key_states, value_states)
            return key_states, value_states
        for slab, new in zip(self.slabs, (key_states, value_states), strict=True):
            slab[: self.rows, ..., start : self.filled, :] = new
        self.keys, self.values = (slab[: self.rows, ..., : self.filled, :] for slab in self.slabs)
        return self.keys, self.values

    def _keep_prompts(self, rows: slice, source: Tensor | None, *states: Tensor) -> None:
        start = self.width - self.filled
        for slab, new in zip(self.slabs, states, strict=True):
            slab[rows, ..., start : self.width, :] = (new if source is None else new[source]).to(slab.dtype)
            slab[rows, ..., :start, :] = 0  # masked, but a weight of 0 times what memory held may be NaN

    def get_seq_length(self) -> int:
        """Columns that are filled."""
        return self.filled
