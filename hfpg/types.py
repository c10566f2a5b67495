"""The nouns. Data changes type at each stage: Prompts → Samples → Scores → Rollout → Estimates.

Letters used for shapes everywhere: B sequences (rows), P prompt tokens (left-padded), C completion tokens
(right-padded), T = P + C, K samples per prompt, V vocabulary, H hidden.

Every class is frozen; an optional field is absent by the algorithm's or the engine's choice, never "filled later".
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor


Text = str | list[dict[str, Any]]
"""A prompt or a completion as a person wrote it: a string, or a conversation (list of role/content messages)."""

R = TypeVar("R", bound="Rows")


def ends_in_answer(prompt: Text) -> bool:
    """Whether a conversation's last message is the assistant's: an answer that was begun, to be gone on with."""
    return not isinstance(prompt, str) and bool(prompt) and prompt[-1].get("role") == "assistant"


def text_of(text: Text) -> str:
    """What was written: a string itself; of a conversation, the text of all messages of the assistant."""
    if isinstance(text, str):
        return text
    return "\n".join(message_text(m) for m in text if m.get("role", "assistant") == "assistant")


def message_text(message: Mapping[str, Any]) -> str:
    """The text of one message, whose content is a string or a list of parts."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if part.get("type") == "text")


def plain_text(text: Text) -> str:
    """A prompt as one text: itself, or the text of a conversation's last message."""
    if isinstance(text, str):
        return text
    return message_text(text[-1]) if text else ""


@dataclass(frozen=True)
class Rows:
    """Base of the dataclasses whose every field has one entry per row: tensors [B, …] and lists of length B."""

    def __len__(self) -> int:
        """B: every class has a tensor field."""
        values = [getattr(self, f.name) for f in dataclasses.fields(self)]
        return next(len(v) for v in values if isinstance(v, Tensor))

    def take(self: R, rows: Int[Tensor, " N"]) -> R:
        """The given rows, in the given order."""
        picked: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                picked[field.name] = value[rows.to(value.device)]
            elif isinstance(value, dict):
                picked[field.name] = {key: [column[i] for i in rows.tolist()] for key, column in value.items()}
            elif isinstance(value, list):
                picked[field.name] = [value[i] for i in rows.tolist()]
            else:
                picked[field.name] = value
        return type(self)(**picked)

    def to(self: R, device: torch.device | str) -> R:
        """The same rows with every tensor on `device`."""
        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return type(self)(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in moved.items()})


def join(parts: Sequence[R]) -> R:
    """One object with the rows of several: prompts padded on the left to the widest, completions on the right.

    Padding is 0 and False. A field that is absent in any part is absent in the result.
    """
    if len(parts) == 1:
        return parts[0]

    def joined(name: str) -> Any:
        values = [getattr(part, name) for part in parts]
        if any(v is None for v in values):
            return None
        if isinstance(values[0], dict):
            keys = dict.fromkeys(key for value in values for key in value)
            silent = [[None] * len(part) for part in parts]
            return {k: [x for v, none in zip(values, silent, strict=True) for x in v.get(k, none)] for k in keys}
        if not isinstance(values[0], Tensor):
            return [item for value in values for item in value]
        if values[0].dim() > 1:
            width = max(v.shape[1] for v in values)
            values = [_pad(v, width - v.shape[1], left=name.startswith("prompt_")) for v in values]
        return torch.cat(values)

    return type(parts[0])(**{field.name: joined(field.name) for field in dataclasses.fields(parts[0])})


def _pad(x: Tensor, count: int, left: bool) -> Tensor:
    """`count` more columns of 0 in dimension 1."""
    zeros = x.new_zeros((x.shape[0], count, *x.shape[2:]))
    return torch.cat([zeros, x] if left else [x, zeros], 1)


@dataclass(frozen=True)
class Prompts(Rows):
    """Left-padded prompts, one row per sample to draw (a prompt with K samples stands in K consecutive rows)."""

    ids: Int[Tensor, "B P"]
    mask: Bool[Tensor, "B P"]
    sample_ids: Int[Tensor, " B"]  # unique in a run: the key of the row's random numbers
    group_ids: Int[Tensor, " B"]  # the same for the K samples of one prompt
    texts: list[Text]
    columns: dict[str, list]  # the data set's other columns, for the judge


@dataclass(frozen=True)
class Samples(Rows):
    """What the behaviour policy μ did: prompts and the completions it drew."""

    prompt_ids: Int[Tensor, "B P"]
    prompt_mask: Bool[Tensor, "B P"]
    completion_ids: Int[Tensor, "B C"]
    completion_mask: Bool[Tensor, "B C"]  # True where the policy chose the token: EOS yes, padding no; column 0 always
    finished: Bool[Tensor, " B"]  # ended by a stop token or string; False: cut by the length limit
    sample_ids: Int[Tensor, " B"]
    group_ids: Int[Tensor, " B"]
    sampler_logprobs: Float[Tensor, "B C"] | None = None  # what the engine says of μ
    sampler_entropy: Float[Tensor, "B C"] | None = None  # of the distribution that each token was drawn from, nats
    sampler_values: Float[Tensor, "B C"] | None = None  # V(s_t) of a value head on the policy's own trunk
    kept: UInt8[Tensor, "B C bytes"] | None = None  # top-k / top-p: the support fixed at sampling, V bits packed


@dataclass(frozen=True)
class Scores(Rows):
    """What the judge said: one score per completion, and 0 weight where nobody could say."""

    scores: Float[Tensor, " B"]
    weights: Float[Tensor, " B"]  # 1, or 0 for a sample without a score: all functions abstained, or one failed
    by_function: dict[str, list[float | None]]
    extra: dict[str, list]  # what reward functions logged per completion (`log_extra`)
    baseline_scores: Float[Tensor, " B"] | None = None  # of the greedy completion, or of the prompt itself; NaN: none
    baseline_finished: Bool[Tensor, " B"] | None = None
    baseline_lengths: Int[Tensor, " B"] | None = None
    token_scores: Float[Tensor, "B C"] | None = (
        None  # the part of a score that belongs to a token; sums to it, or less
    )


@dataclass(frozen=True)
class Rollout(Rows):
    """Everything one update needs; after `rescore` every rank holds all rows, in sample-id order."""

    prompt_ids: Int[Tensor, "B P"]
    prompt_mask: Bool[Tensor, "B P"]
    completion_ids: Int[Tensor, "B C"]
    completion_mask: Bool[Tensor, "B C"]
    finished: Bool[Tensor, " B"]
    sample_ids: Int[Tensor, " B"]
    group_ids: Int[Tensor, " B"]
    scores: Float[Tensor, " B"]
    weights: Float[Tensor, " B"]
    old_logprobs: Float[Tensor, "B C"]
    entropy: Float[Tensor, "B C"]
    ref_logprobs: Float[Tensor, "B C"] | None = None
    values: Float[Tensor, "B C"] | None = None  # V(s_t): the value *before* token t
    last_values: Float[Tensor, " B"] | None = None  # V after the last chosen token, what a cut completion had ahead
    sampler_logprobs: Float[Tensor, "B C"] | None = None
    sampler_entropy: Float[Tensor, "B C"] | None = None
    sampler_values: Float[Tensor, "B C"] | None = None
    kept: UInt8[Tensor, "B C bytes"] | None = None
    behaviour_logprobs: Float[Tensor, "B C"] | None = None  # log μ, where it is corrected for
    token_scores: Float[Tensor, "B C"] | None = None  # the part of a score that belongs to a token
    prompt_states: Float[Tensor, "B P H"] | None = None  # what layers that do not learn say of the tokens
    completion_states: Float[Tensor, "B C H"] | None = None
    stored: Bool[Tensor, " B"] | None = None  # rows of an earlier step that are used again; absent: none is
    baseline_scores: Float[Tensor, " B"] | None = None  # of the greedy completion, or of the prompt itself; NaN: none
    baseline_finished: Bool[Tensor, " B"] | None = None
    baseline_lengths: Int[Tensor, " B"] | None = None

    @property
    def new_weights(self) -> Float[Tensor, " B"]:
        """Row weights that count only what the policy has drawn for this step: for running statistics."""
        return self.weights if self.stored is None else torch.where(self.stored, 0, self.weights)

    @property
    def lengths(self) -> Int[Tensor, " B"]:
        """Real tokens per row, prompt and completion: what a forward pass costs."""
        return self.prompt_mask.sum(1) + self.completion_mask.sum(1)


@dataclass(frozen=True)
class Estimates(Rows):
    """Credit: advantages, and returns for the critic where there is one."""

    advantages: Float[Tensor, "B C"]
    returns: Float[Tensor, "B C"] | None = None


class Scored(NamedTuple):
    """What one forward pass of ActorCritic says of given completions, [B, C] and 0 outside the mask where not said."""

    logprobs: Tensor
    entropy: Tensor | None
    values: Tensor | None
    kl: Tensor | None = None  # exact over the vocabulary, to (or from) the distribution of another policy
    last_values: Tensor | None = None  # [B]: V after the last chosen token


class TokenLoss(NamedTuple):
    """An algorithm's loss per token, unreduced [B, C], and per-token quantities to report as token means."""

    loss: Tensor
    metrics: dict[str, Tensor]
