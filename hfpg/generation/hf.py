"""Sampling with transformers' `generate`, keyed: the same tokens for every batch split, rank count and padding."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_managed_module

from hfpg.config import ConfigError, nearest, require
from hfpg.fast.linear import onednn_linears, precise_head
from hfpg.fields import first_line, fits, in_words
from hfpg.generation.decoding import decode_rows
from hfpg.generation.graphs import Recorder
from hfpg.generation.loop import DecodeLoop
from hfpg.generation.stock import Finished, KeyedSampler
from hfpg.pretrained import causal_lm
from hfpg.probes import captured_head_input
from hfpg.types import Prompts, Samples, join


logger = logging.getLogger(__name__)

# Options of `generate` that leave the distribution of the tokens alone. Every other one is refused for training: the
# policy that is scored must be the policy that was sampled.
HARMLESS_OPTIONS: dict[str, Any] = {"use_cache": bool, "disable_compile": bool, "prefill_chunk_size": int}
HARMLESS_OPTIONS |= {"cache_implementation": str, "cache_config": dict}  # name → kind
SETTINGS = dict(
    max_new_tokens="max_completion_length", max_length="max_completion_length", eos_token_id="stop_token_ids"
)
SETTINGS |= {name: name for name in ("temperature", "top_k", "top_p", "stop_strings")}
SETTINGS |= {"num_return_sequences": "the algorithm's num_generations"}  # option of `generate` → what sets it
LOGITS, GPU_LOGITS = 32 << 20, 1 << 30  # bytes


class HFGenerator:
    """Draws completions with `policy.generate` and keyed Gumbel-max noise.

    Token t of a sample is a pure function of (seed, sample id, t) and of the policy's logits, so a run does not
    depend on how rows are batched or spread over processes. Temperature, top-k and top-p are applied here; the set
    that top-k / top-p kept is stored with the sample, and every policy is renormalised over it when it is scored.

    `generate` runs hfpg's own decode loop (`hfpg.generation.loop`). Where that loop does not support a model or an
    option, transformers' own draws the same tokens, and the log says so once. With `own_loop = False` it always does.

    Args:
        tokenizer: needed for `stop_strings` only.
        stop_token_ids: tokens that end a completion; None: those of the model's generation config.
        max_tokens: rows × (prompt + completion) of one call of `generate`; a memory bound without effect on tokens.
        value_head: from what the LM head reads [n, H] to V(s_t) [n]; its values come with the samples. May be set
            later.
    Raises:
        ConfigError: an option in `generation_kwargs` that changes the distribution; no stop token anywhere is fine.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        seed: int,
        max_completion_length: int,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop_token_ids: Sequence[int] | None = None,
        stop_strings: Sequence[str] | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        max_tokens: int = 32768,
        value_head: Callable[[Tensor], Tensor] | None = None,
    ):
        self.tokenizer, self.seed, self.max_completion_length = tokenizer, seed, max_completion_length
        self.temperature, self.max_tokens, self.value_head = temperature, max_tokens, value_head
        self.stop_token_ids = stop_token_ids
        self.stop_strings = [stop_strings] if isinstance(stop_strings, str) else list(stop_strings or [])
        self.options = dict(generation_kwargs or {})
        check_options(self.options)
        self.warpers = [TopKLogitsWarper(top_k)] if top_k > 0 else []
        self.warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        self.own_loop = True
        self._told = False
        self._recorder = Recorder()

    @torch.no_grad()
    def __call__(self, policy: Any, prompts: Prompts, greedy: bool = False) -> Samples:
        """One completion per row of `prompts`, by at most a few calls of `generate`."""
        lm = causal_lm(policy)
        lengths = prompts.mask.sum(1)
        order = lengths.argsort(stable=True)  # prompts of similar length into one call: little padding
        calls = self._calls(lengths[order].tolist(), prompts.group_ids[order].tolist(), most_rows(lm, len(prompts)))
        with onednn_linears(lm, decode_rows) if self.own_loop else nullcontext(), precise_head(lm):
            parts = [self._generate(lm, narrowest(prompts.take(order[call])), greedy) for call in calls]
        samples = join(parts).take(order.argsort())
        return dataclasses.replace(samples, prompt_ids=prompts.ids, prompt_mask=prompts.mask)

    @torch.no_grad()
    def greedy(self, policy: Any, prompts: Prompts) -> Samples:
        """The likeliest token each time, with the same stops and limits."""
        return self(policy, prompts, greedy=True)

    def _calls(self, lengths: Sequence[int], groups: Sequence[int], most: int) -> list[slice]:
        """Rows, from short prompts to long ones, in calls within the budget; a group is cut only where it must be."""
        calls, start, end = [], 0, 0
        sizes = [len(list(rows)) for _, rows in itertools.groupby(groups)]
        most += max(sizes) - 1
        for size in sizes:
            first, end = end, end + size
            fit = max(1, min(most, self.max_tokens // (lengths[first] + self.max_completion_length)))
            if end - start > fit and first > start:
                calls.append(slice(start, first))
                start = first
            while end - start > fit:
                calls.append(slice(start, start + fit))
                start += fit
        return [*calls, slice(start, end)]

    def _generate(self, lm: PreTrainedModel, prompts: Prompts, greedy: bool) -> Samples:
        width, stops = prompts.ids.shape[1], self.stops(lm)
        pad = next(iter(stops), 0)  # any valid id: padding is known by position, never by id
        law = (self.seed, prompts.sample_ids, width, self.max_completion_length, self.temperature, self.warpers)
        stop = Finished(len(prompts), width, stops, self._string_criteria(), prompts.ids.device)
        config = GenerationConfig(
            do_sample=False,  # the keyed sampler leaves one token possible; the argmax takes it
            max_new_tokens=self.max_completion_length,
            pad_token_id=pad,
            **{"use_cache": True, **self.options},
        )
        listening: AbstractContextManager[list[Tensor]] = nullcontext([])
        if self.value_head is not None:
            listening = captured_head_input(lm)
        with fresh_generation_config(lm), listening as read:
            sampler = KeyedSampler(*law, greedy, self.value_head, read)
            out = lm.generate(
                input_ids=prompts.ids,
                attention_mask=prompts.mask.long(),
                generation_config=config,
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([stop]),
                custom_generate=self._loop(lm, prompts.group_ids),
            )
        return drawn(prompts, out[:, width:], pad, sampler, stop)

    def _loop(self, lm: PreTrainedModel, group_ids: Int[Tensor, " B"]) -> DecodeLoop | None:
        """hfpg's loop, or None for the stock one."""
        if not self.own_loop:
            return None
        if is_deepspeed_zero3_enabled() or is_fsdp_managed_module(lm):
            self._tell("the parameters are sharded, so all processes must take the same number of steps")
            return None
        return DecodeLoop(group_ids, self._tell, self._recorder)

    def _tell(self, reason: str) -> None:
        if not self._told:
            logger.info("completions are drawn by transformers' own decode loop, not by hfpg's faster one: %s", reason)
        self._told = True

    def stops(self, lm: PreTrainedModel) -> list[int]:
        """The ids that end a completion: the setting, else the model's own, else the tokenizer's EOS."""
        found = self.stop_token_ids
        if found is None:
            found = lm.generation_config.eos_token_id
        if found is None:
            found = getattr(self.tokenizer, "eos_token_id", None)
        return [] if found is None else [found] if isinstance(found, int) else list(found)

    def _string_criteria(self) -> StopStringCriteria | None:
        return StopStringCriteria(self.tokenizer, self.stop_strings) if self.stop_strings else None


def check_options(options: dict[str, Any]) -> None:
    """Raise ConfigError unless every option of `generate` leaves the draws alone and has a value that it can have."""
    for name, value in options.items():
        _refuse_option(str(name))
        kind = HARMLESS_OPTIONS[name]
        require(fits(value, kind), f"generation_kwargs has {name}={value!r:.60}; it must be {in_words(kind)}")
    try:
        GenerationConfig(**options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"generation_kwargs={options!r:.80}: {first_line(error)}") from error


def _refuse_option(name: str) -> None:
    require(
        name not in SETTINGS,
        f"generation_kwargs has {name!r}, which is set by {SETTINGS.get(name)}; remove it and set that",
    )
    require(
        hasattr(GenerationConfig(), name),
        f"generation_kwargs has {name!r}, which is no option of generate{nearest(name, list(HARMLESS_OPTIONS))}; what "
        f"may stand there is {', '.join(HARMLESS_OPTIONS)}",
    )
    require(
        name in HARMLESS_OPTIONS,
        f"generation_kwargs has {name!r}: sampling would follow another distribution than the one that is scored and "
        f"trained; remove it (what may stand there is {', '.join(HARMLESS_OPTIONS)})",
    )


def most_rows(lm: PreTrainedModel, rows: int) -> int:
    """Rows of one call, so that calls are of even size and a step's logits stay in memory that is used again.

    On the CPU, glibc hands blocks above 32 MB back to the system, and fresh pages are slow, unless `hfpg.fast.heap`
    says otherwise. Matrix products want 64 rows all the same.
    """
    most = LOGITS if lm.device.type == "cpu" else GPU_LOGITS
    limit = max(64, most // (4 * lm.get_input_embeddings().weight.shape[0]))
    return math.ceil(rows / math.ceil(rows / limit))


def narrowest(prompts: Prompts) -> Prompts:
    """Without the columns that are padding in every row."""
    width = max(1, int(prompts.mask.sum(1).max()))
    return dataclasses.replace(prompts, ids=prompts.ids[:, -width:], mask=prompts.mask[:, -width:])


def drawn(prompts: Prompts, ids: Int[Tensor, "B C"], pad: int, sampler: KeyedSampler, stop: Finished) -> Samples:
    """Samples from the ids that `generate` returned and what sampler and criterion remember."""
    steps = torch.arange(ids.shape[1], device=ids.device)
    mask = steps < stop.length(ids.shape[1])[:, None]
    kept = sampler.record.columns.get("kept")
    return Samples(
        prompt_ids=prompts.ids,
        prompt_mask=prompts.mask,
        completion_ids=torch.where(mask, ids, pad),
        completion_mask=mask,
        finished=stop.done.clone(),
        sample_ids=prompts.sample_ids,
        group_ids=prompts.group_ids,
        sampler_logprobs=sampler.record.masked("logprobs", mask),
        sampler_entropy=sampler.record.masked("entropy", mask),
        sampler_values=sampler.record.masked("values", mask),
        kept=None if kept is None else kept[:, : ids.shape[1]],
    )


@contextmanager
def fresh_generation_config(lm: PreTrainedModel) -> Iterator[None]:
    """`generate` fills unset options from the model's own config (top_k = 50, penalties, …): hide it.

    And no word of padding: GPT-2 takes a drawn token of its padding's id for one, and warns of a mask that is not
    needed. The id itself stays: some configurations refuse None.
    """
    own, trunk, warning = lm.generation_config, lm.base_model, "warn_if_padding_and_no_attention_mask"
    lm.generation_config = GenerationConfig()
    vars(trunk)[warning] = lambda *_, **__: None
    try:
        yield
    finally:
        lm.generation_config = own
        del vars(trunk)[warning]
