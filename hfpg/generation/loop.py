"""hfpg's decode loop, for `generate(custom_generate=…)`: the tokens of the stock loop, for less work.

A prompt is read once for all of its samples, and prompts of similar length are read together. Rows that are finished
leave the batch. Keys and values are written in place, and one pass over the logits gives a token, its log-probability
and the entropy. Because noise is keyed by (seed, sample id, position), none of this moves a token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.cache_utils import DynamicLayer

from hfpg.generation.slab import SlabLayer
from hfpg.generation.stock import Finished, KeyedSampler
from hfpg.ops.keyed import GumbelMax, mix
from hfpg.ops.logprobs import sampling_logits


MANY = 512  # rows, of which padding would cost more than shapes do
PADDING = 64  # columns of padding that a forward pass of their own would save: about what one more pass costs
INPUTS = {"attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep"}


class DecodeLoop:
    """What `generate` calls in place of its own loop, with everything prepared.

    What the loop cannot do is left to the stock loop, with the same processors and criteria.

    Args:
        group_ids: [B]; consecutive rows of one group with the same prompt share its forward pass.
        tell: hears why the stock loop is used, when it is.
    """

    def __init__(self, group_ids: Int[Tensor, " B"], tell: Callable[[str], None]):
        self.group_ids, self.tell = group_ids, tell

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **inputs: Any,
    ) -> Tensor:
        """Prompts and completions [B, P + C]; the rest is in the sampler's record and the criterion."""
        reason = unsupported(model, input_ids, logits_processor, stopping_criteria, generation_config, inputs)
        if reason is not None:
            self.tell(reason)
            return model._sample(
                input_ids,
                logits_processor=logits_processor,
                stopping_criteria=stopping_criteria,
                generation_config=generation_config,
                **inputs,
            )
        stop = next(criterion for criterion in stopping_criteria if isinstance(criterion, Finished))
        ids = input_ids.new_full((len(input_ids), generation_config.max_length), generation_config.pad_token_id)
        ids[:, : input_ids.shape[1]] = input_ids
        decoding = Decoding(model, ids, logits_processor[0], stop, inputs)
        return decoding.run(shared(input_ids, inputs["attention_mask"], self.group_ids))


def unsupported(
    model: PreTrainedModel,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    inputs: dict[str, Any],
) -> str | None:
    """Why this call of `generate` needs the stock loop, or None."""
    name, cache, positions = type(model).__name__, inputs.get("past_key_values"), inputs.get("position_ids")
    layers = getattr(cache, "layers", [])
    other_layers = sorted({type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer})
    other_inputs = sorted(set(inputs) - INPUTS)
    parameters = inspect.signature(model.forward).parameters
    own = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
    own_steps = [step for step in own if getattr(type(model), step) is not getattr(GenerationMixin, step)]
    others = [p for p in processors if not isinstance(p, KeyedSampler)]
    others += [c for c in criteria if not isinstance(c, Finished | MaxLengthCriteria)]
    for wrong, reason in (
        (cache is None, f"{name} is run without a cache"),
        (type(cache) is not DynamicCache, f"{name} has a {type(cache).__name__}, not a DynamicCache"),
        (getattr(cache, "offloading", False), "the cache is offloaded"),
        (other_layers or not layers, f"{name} has layers of another kind than full attention ({other_layers})"),
        (positions is None or positions.shape != input_ids.shape, f"{name} takes no position_ids of one number each"),
        ("attention_mask" not in parameters, f"{name} takes no attention_mask"),
        (other_inputs or "cache_position" in parameters, f"{name} needs {other_inputs or 'cache_position'}"),
        (own_steps or getattr(model, "_is_stateful", False), f"{name} prepares its steps itself ({own_steps})"),
        (config.prefill_chunk_size is not None, f"prefill_chunk_size={config.prefill_chunk_size} is set"),
        (others, f"there are other processors or criteria: {[type(o).__name__ for o in others]}"),
        (len(set(getattr(model, "hf_device_map", {}).values())) > 1, f"{name} is spread over devices"),
    ):
        if wrong:
            return reason
    return None


def shared(ids: Int[Tensor, "B P"], mask: Tensor | None, group_ids: Int[Tensor, " B"]) -> list[int]:
    """How many consecutive rows have the same prompt and group, prompt by prompt."""
    same = (ids[1:] == ids[:-1]).all(1) & (group_ids[1:] == group_ids[:-1])
    if mask is not None:
        same &= (mask[1:] == mask[:-1]).all(1)
    starts = [0, *((~same).nonzero()[:, 0] + 1).tolist(), len(ids)]
    return [end - start for start, end in zip(starts, starts[1:], strict=False)]


def rung(rows: int) -> int:
    """What so many rows are made up to: two sizes per factor of two, eight where there are many.

    oneDNN prepares and keeps something for each.
    """
    step = 1 << max(2, rows.bit_length() - (2 if rows <= MANY else 4))
    return rows if rows <= 4 else -(-rows // step) * step


def buckets(lengths: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ranges (start, end) of consecutive prompts to be read together, each with at most PADDING columns of padding."""
    start = longest = total = 0
    for i, length in enumerate(lengths):
        longest, total = max(longest, length), total + length
        if longest * (i + 1 - start) - total > PADDING:
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
        cache = inputs["past_key_values"]
        cache.layers = [SlabLayer(len(ids), self.width, ids.shape[1] - 1) for _ in cache.layers]
        self.layers: list[SlabLayer] = cache.layers
        self.options = {k: v for k, v in inputs.items() if k not in ("position_ids", "attention_mask")}

    def run(self, counts: Sequence[int]) -> Int[Tensor, "B T"]:
        """Draw until every row is finished or as long as it may be."""
        logits, values = self._read_prompts(counts)
        self.positions = self.positions[:, -1:].clone()
        draw = GumbelMax(logits)
        for step in range(self.longest):
            tokens = self._draw(draw, logits, values, step)
            alive = self._alive(tokens, step)
            if alive == 0 or step + 1 == self.longest:
                break
            if rung(alive) < len(tokens):
                tokens = self._drop(tokens, rung(alive))
            self.positions += 1
            mask = None if self.mask is None else self.mask[:, : self.width + step + 1]
            logits, values = self._forward(tokens[:, None], self.positions, mask)
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
        for start, end in buckets(lengths):
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

    def _draw(self, draw: GumbelMax, logits: Tensor, values: Tensor | None, step: int) -> Int[Tensor, " b"]:
        """The next token of every live row, put on record."""
        sampler, temperature, kept = self.sampler, self.sampler.temperature, None
        if sampler.warpers:
            logits, kept = sampler.cut(self.ids, sampling_logits(logits, temperature))
            temperature = 1.0
        drawn = draw(logits, mix(self.keys + step), temperature, sampler.greedy)
        sampler.record.put(self.live, logprobs=drawn.logprobs, entropy=drawn.entropy, values=values, kept=kept)
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
        self.live, self.keys, self.positions = self.live[order], self.keys[order], self.positions[order]
        self.done, self.lengths = self.done[order], self.lengths[order]
        if self.mask is not None:
            self.mask = self.mask[order]
            if bool(self.mask[:, : self.width].all()):
                self.mask = None
        return tokens[order]

    def _settle(self) -> None:
        """Tell the criterion what became of the live rows."""
        self.stop.done[self.live], self.stop.lengths[self.live] = self.done, self.lengths
