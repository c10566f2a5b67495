"""Sampling with transformers' `generate`, keyed: the same tokens for every batch split, rank count and padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hfpg.config import nearest, require
from hfpg.ops.keyed import gumbel_max, mix, row_keys
from hfpg.ops.logprobs import chosen_logprobs, pack_bits, sampling_logits
from hfpg.pretrained import causal_lm
from hfpg.types import Prompts, Samples, join


# Options of `generate` that leave the distribution of the tokens alone. Every other one is refused for training: the
# policy that is scored must be the policy that was sampled.
HARMLESS_OPTIONS = ("use_cache", "cache_implementation", "cache_config", "prefill_chunk_size", "disable_compile")


class HFGenerator:
    """Draws completions with `policy.generate` and keyed Gumbel-max noise.

    Token t of a sample is a pure function of (seed, sample id, t) and of the policy's logits, so a run does not
    depend on how rows are batched or spread over processes. Temperature, top-k and top-p are applied here; the set
    that top-k / top-p kept is stored with the sample, and every policy is renormalised over it when it is scored.

    Args:
        tokenizer: needed for `stop_strings` only.
        stop_token_ids: tokens that end a completion; None: those of the model's generation config.
        max_tokens: rows × (prompt + completion) of one call of `generate`; a memory bound without effect on tokens.
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
    ):
        self.tokenizer, self.seed, self.max_completion_length = tokenizer, seed, max_completion_length
        self.temperature, self.max_tokens = temperature, max_tokens
        self.stop_token_ids, self.stop_strings = stop_token_ids, list(stop_strings or [])
        self.options = dict(generation_kwargs or {})
        for name in self.options:
            require(
                name in HARMLESS_OPTIONS,
                f"generation_kwargs has {name!r}: sampling would follow another distribution than the one that is "
                f"scored and trained{nearest(name, HARMLESS_OPTIONS)}; remove it (temperature, top_k, top_p, "
                "stop_token_ids and stop_strings are fields of TrainConfig)",
            )
        self.warpers = [TopKLogitsWarper(top_k)] if top_k > 0 else []
        self.warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []

    @torch.no_grad()
    def __call__(self, policy: Any, prompts: Prompts, greedy: bool = False) -> Samples:
        """One completion per row of `prompts`, by at most a few calls of `generate`."""
        lm = causal_lm(policy)
        size = max(1, self.max_tokens // (prompts.ids.shape[1] + self.max_completion_length))
        groups = [torch.arange(len(prompts))[i : i + size] for i in range(0, len(prompts), size)]
        parts = [self._generate(lm, prompts.take(rows), greedy) for rows in groups]
        return join(parts)

    @torch.no_grad()
    def greedy(self, policy: Any, prompts: Prompts) -> Samples:
        """The likeliest token each time, with the same stops and limits."""
        return self(policy, prompts, greedy=True)

    def _generate(self, lm: PreTrainedModel, prompts: Prompts, greedy: bool) -> Samples:
        width = prompts.ids.shape[1]
        sampler = KeyedSampler(self.seed, prompts.sample_ids, width, self.temperature, self.warpers, greedy)
        stop = Finished(width, self.stops(lm), self._string_criteria())
        pad = next(iter(self.stops(lm)), 0)  # any valid id: padding is known by position, never by id
        config = GenerationConfig(
            do_sample=False,  # the keyed sampler leaves one token possible; the argmax takes it
            max_new_tokens=self.max_completion_length,
            pad_token_id=pad,
            **{"use_cache": True, **self.options},
        )
        with fresh_generation_config(lm):
            out = lm.generate(
                input_ids=prompts.ids,
                attention_mask=prompts.mask.long(),
                generation_config=config,
                logits_processor=LogitsProcessorList([sampler]),
                stopping_criteria=StoppingCriteriaList([stop]),
            )
        ids = out[:, width:]
        steps = torch.arange(ids.shape[1], device=ids.device)
        mask = steps < stop.length(ids.shape[1])[:, None]
        return Samples(
            prompt_ids=prompts.ids,
            prompt_mask=prompts.mask,
            completion_ids=torch.where(mask, ids, pad),
            completion_mask=mask,
            finished=stop.done.clone(),
            sample_ids=prompts.sample_ids,
            group_ids=prompts.group_ids,
            sampler_logprobs=torch.where(mask, torch.stack(sampler.logprobs, 1), 0),
            kept=torch.stack(sampler.kept, 1) if sampler.kept else None,
        )

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


class KeyedSampler(LogitsProcessor):
    """Chooses the token inside `generate`: all other logits become −inf. Keeps what it knows of each choice."""

    def __init__(
        self,
        seed: int,
        sample_ids: Tensor,
        width: int,
        temperature: float,
        warpers: Sequence[Any],
        greedy: bool = False,
    ):
        self.greedy = greedy
        # negative ids belong to evaluations: their noise does not depend on the seed, so that runs can be compared
        training, evaluation = row_keys(seed, "sample", sample_ids), row_keys(0, "evaluate", sample_ids)
        self.keys = torch.where(sample_ids >= 0, training, evaluation)
        self.width, self.temperature, self.warpers = width, temperature, warpers
        self.logprobs: list[Tensor] = []
        self.kept: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B, V] with one finite entry a row, drawn from softmax(scores / τ) over the kept set."""
        logits = sampling_logits(scores, self.temperature)
        for warper in self.warpers:
            logits = warper(input_ids, logits)
        if self.warpers:
            self.kept.append(pack_bits(logits > -torch.inf))
        position = input_ids.shape[1] - self.width
        tokens = logits.argmax(1) if self.greedy else gumbel_max(logits, mix(self.keys + position))
        self.logprobs.append(chosen_logprobs(logits, tokens))
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)


class Finished(StoppingCriteria):
    """True for rows that have drawn a stop token or completed a stop string; remembers at which length."""

    def __init__(self, width: int, stop_ids: Sequence[int], strings: StopStringCriteria | None):
        self.width, self.stop_ids, self.strings = width, list(stop_ids), strings
        self.done = torch.zeros(0, dtype=torch.bool)
        self.lengths = torch.zeros(0, dtype=torch.long)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Rows [B] that are finished after the newest token."""
        if not len(self.done):
            self.done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
            self.lengths = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
        now = torch.isin(input_ids[:, -1], torch.tensor(self.stop_ids, device=input_ids.device, dtype=torch.long))
        if self.strings is not None:
            now = now | self.strings(input_ids, scores)
        self.lengths = torch.where(now & ~self.done, input_ids.shape[1] - self.width, self.lengths)
        self.done = self.done | now
        return self.done

    def length(self, longest: int) -> Tensor:
        """Chosen tokens per row: up to and with the one that ended it, or all when none did."""
        return torch.where(self.done, self.lengths, longest)


@contextmanager
def fresh_generation_config(lm: PreTrainedModel) -> Iterator[None]:
    """`generate` fills unset options from the model's own config (top_k = 50, penalties, …): hide it."""
    own = lm.generation_config
    lm.generation_config = GenerationConfig()
    try:
        yield
    finally:
        lm.generation_config = own
