"""A call of hfpg's decode loop: rows that shrink as they finish, over a cache that is written in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from hfpg.generation.slab import SlabLayer
from hfpg.generation.stock import Finished, KeyedSampler
from hfpg.ops.keyed import GumbelMax, mix
from hfpg.ops.logprobs import sampling_logits


MANY = 512  # rows, of which padding would cost more than shapes do
PADDING = 64  # columns of padding that a forward pass of their own would save: about what one more pass costs
GPU_PADDING = 8192  # a GPU is done with them before the next pass is launched


CACHES = ("cache", "past_key_values")  # what transformers calls it from 5.24 on, and before


def cache_of(inputs: dict[str, Any]) -> Any:
    """The cache among what `generate` has prepared, or None."""
    return next((inputs[name] for name in CACHES if inputs.get(name) is not None), None)


def decode_rows(rows: int) -> int:
    """What so many rows are made up to: two sizes per factor of two, eight where there are many.

    oneDNN prepares and keeps something for each.
    """
    step = 1 << max(2, rows.bit_length() - (2 if rows <= MANY else 4))
    return rows if rows <= 4 else -(-rows // step) * step


def buckets(lengths: Sequence[int], padding: int = PADDING) -> Iterator[tuple[int, int]]:
    """Ranges (start, end) of consecutive prompts to be read together, each with at most `padding` columns of it."""
    start = longest = total = 0
    for i, length in enumerate(lengths):
        longest, total = max(longest, length), total + length
        if longest * (i + 1 - start) - total > padding:
            yield start, i
            start, longest, total = i, length, length
    yield start, len(lengths)


class Decoding:
    """One call: whatever has an entry per row shrinks as rows finish, and `live` says which rows of the call are left.

    Args:
        ids: [B, P + C], the prompts filled in.
        inputs: what `generate` has prepared for the model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ids: Int[Tensor, "B T"],
        sampler: KeyedSampler,
        stop: Finished,
        inputs: dict[str, Any],
    ):
        self.model, self.ids, self.sampler, self.stop = model, ids, sampler, stop
        self.width, self.longest = sampler.width, ids.shape[1] - sampler.width
        self.live = torch.arange(len(ids), device=ids.device)
        self.keys, self.done, self.lengths = sampler.keys, stop.done.clone(), stop.lengths.clone()
        self.positions, mask = inputs["position_ids"], inputs["attention_mask"]
        self.mask = None if mask is None else torch.nn.functional.pad(mask, (0, self.longest), value=1)
        cache = cache_of(inputs)
        cache.layers = [SlabLayer(len(ids), self.width, self.columns) for _ in cache.layers]
        self.layers: list[SlabLayer] = cache.layers
        self.options = {k: v for k, v in inputs.items() if k not in ("position_ids", "attention_mask")}

    @property
    def columns(self) -> int:
        """Of the cache: the last token is not read."""
        return self.ids.shape[1] - 1

    def run(self, counts: Sequence[int]) -> Int[Tensor, "B T"]:
        """Draw until every row is finished or as long as it may be."""
        return self._go_on(self._first(counts))

    def _first(self, counts: Sequence[int]) -> Int[Tensor, " B"]:
        """Read the prompts and draw the first tokens."""
        logits, values = self._read_prompts(counts)
        self.positions = self.positions[:, -1:].clone()
        self.gumbel = GumbelMax(logits)
        return self._draw(logits, values, 0)

    def _go_on(self, tokens: Int[Tensor, " B"]) -> Int[Tensor, "B T"]:
        """Draw what follows the first tokens."""
        for step in range(1, self.longest + 1):
            alive = self._alive(tokens, step - 1)
            if alive == 0 or step == self.longest:
                break
            if decode_rows(alive) < len(tokens):
                tokens = self._drop(tokens, decode_rows(alive))
            self.positions += 1
            mask = None if self.mask is None else self.mask[:, : self.width + step]
            tokens = self._draw(*self._forward(tokens[:, None], self.positions, mask), step)
        self._settle()
        return self.ids[:, : self.width + self.sampler.record.steps]

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits [n, V] and values [n] after the last of the given tokens."""
        out = self.model(input_ids=ids, position_ids=positions, attention_mask=mask, return_dict=True, **self.options)
        return out.logits[:, -1], self.sampler.values()

    def _read_prompts(self, counts: Sequence[int]) -> tuple[Float[Tensor, "B V"], Float[Tensor, " B"] | None]:
        """Logits and values after the prompts, each read once for its `counts` rows."""
        ends = list(accumulate(counts))
        firsts = torch.tensor(ends, device=self.ids.device) - torch.tensor(counts, device=self.ids.device)
        lengths = [self.width] * len(counts)
        if self.mask is not None:
            lengths = self.mask[firsts, : self.width].sum(1).tolist()
        parts = []
        for start, end in buckets(lengths, PADDING if self.ids.device.type == "cpu" else GPU_PADDING):
            rows = slice(ends[start] - counts[start], ends[end - 1])
            parts.append(self._read_bucket(firsts[start:end], lengths[start:end], counts[start:end], rows))
        for layer in self.layers:
            layer.begin()
        logits, values = ([part for part in column if part is not None] for column in zip(*parts, strict=True))
        return torch.cat(logits), torch.cat(values) if values else None

    def _read_bucket(
        self, firsts: Tensor, lengths: Sequence[int], counts: Sequence[int], rows: slice
    ) -> tuple[Tensor, Tensor | None]:
        """One forward pass over prompts, without the columns that are padding in all of them; results by row."""
        width = max(1, *lengths)
        columns = slice(self.width - width, self.width)
        mask = None if self.mask is None or min(lengths) == width else self.mask[firsts, columns]
        source = None
        if rows.stop - rows.start > len(counts):
            source = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).to(self.ids.device)
        for layer in self.layers:
            layer.read(rows, source)
        logits, values = self._forward(self.ids[firsts, columns], self.positions[firsts, columns], mask)
        if source is None:
            return logits, values
        return logits[source], None if values is None else values[source]

    def _draw(self, logits: Tensor, values: Tensor | None, step: int | Int[Tensor, " 1"]) -> Int[Tensor, " b"]:
        """Token `step` of every live row, put on record."""
        sampler, temperature, kept = self.sampler, self.sampler.temperature, None
        if sampler.warpers:
            logits, kept = sampler.cut(self.ids, sampling_logits(logits, temperature))
            temperature = 1.0
        drawn = self.gumbel(logits, mix(self.keys + step), temperature, sampler.greedy)
        sampler.record.put(self.live, step, logprobs=drawn.logprobs, entropy=drawn.entropy, values=values, kept=kept)
        self.ids[self.live, self.width + step] = drawn.tokens
        return drawn.tokens

    def _alive(self, tokens: Tensor, step: int) -> int:
        """How many rows are not finished after these tokens."""
        if not self.stop.possible:
            return len(tokens)
        self.lengths += ~self.done
        newest = tokens[:, None] if self.stop.strings is None else self.ids[self.live, : self.width + step + 1]
        self.done |= self.stop.ended(newest)
        return len(tokens) - int(self.done.sum())

    def _drop(self, tokens: Tensor, size: int) -> Tensor:
        """Keep `size` rows: live rows behind them take the places of finished ones. Returns the tokens that stay."""
        self._settle()
        movers = size + (~self.done[size:]).nonzero()[:, 0]
        holes = self.done[:size].nonzero()[: len(movers), 0]
        for layer in self.layers:
            layer.drop(holes, movers, size)
        order = torch.arange(size, device=tokens.device)
        order[holes] = movers
        self._take(order)
        return tokens[order]

    def _take(self, order: Int[Tensor, " b"]) -> None:
        """The rows that stay, in their new order."""
        self.live, self.keys, self.positions = self.live[order], self.keys[order], self.positions[order]
        self.done, self.lengths = self.done[order], self.lengths[order]
        if self.mask is not None:
            self.mask = self.mask[order]
            if bool(self.mask[:, : self.width].all()):
                self.mask = None

    def _settle(self) -> None:
        """Tell the criterion what became of the live rows."""
        self.stop.done[self.live], self.stop.lengths[self.live] = self.done, self.lengths
