"""hfpg's decode loop, for `generate(custom_generate=…)`: the tokens of the stock loop, for less work.

A prompt is read once for all of its samples, and prompts of similar length are read together. Rows that are finished
leave the batch. Keys and values are written in place, and one pass over the logits gives a token, its log-probability
and the entropy. Because noise is keyed by (seed, sample id, position), none of this moves a token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from jaxtyping import Int
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

from hfpg.generation.decoding import CACHES, Decoding, cache_of
from hfpg.generation.graphs import Recorder, ReplayedDecoding, stands_still
from hfpg.generation.stock import Finished, KeyedSampler


INPUTS = {"attention_mask", "position_ids", *CACHES, "use_cache", "logits_to_keep"}


class DecodeLoop:
    """What `generate` calls in place of its own loop, with everything prepared.

    What the loop cannot do is left to the stock loop, with the same processors and criteria.

    Args:
        group_ids: [B]; consecutive rows of one group with the same prompt share its forward pass.
        tell: hears why the stock loop is used, when it is.
        recorder: of steps on a GPU.
    """

    def __init__(self, group_ids: Int[Tensor, " B"], tell: Callable[[str], None], recorder: Recorder):
        self.group_ids, self.tell, self.recorder = group_ids, tell, recorder

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
        counts = shared(input_ids, inputs["attention_mask"], self.group_ids)
        if stands_still(model, stop, generation_config):
            return ReplayedDecoding(model, ids, logits_processor[0], stop, inputs, self.recorder).run(counts)
        return Decoding(model, ids, logits_processor[0], stop, inputs).run(counts)


def unsupported(
    model: PreTrainedModel,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    inputs: dict[str, Any],
) -> str | None:
    """Why this call of `generate` needs the stock loop, or None."""
    name, cache, positions = type(model).__name__, cache_of(inputs), inputs.get("position_ids")
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
