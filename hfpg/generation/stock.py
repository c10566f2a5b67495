"""Keyed sampling as a logits processor and a stopping criterion, for transformers' own decode loop.

The plain twin of `hfpg.generation.loop`, which reads the same settings and fills the same record.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria, StopStringCriteria

from hfpg.ops.keyed import gumbel_max, mix, row_keys
from hfpg.ops.logprobs import chosen_logprobs, entropy, pack_bits, sampling_logits


class Record:
    """What is known of every token drawn, [B, C] each: filled column by column, for all rows or those still drawn."""

    def __init__(self, rows: int, longest: int):
        self.rows, self.longest, self.steps = rows, longest, 0
        self.columns: dict[str, Tensor] = {}

    def put(self, rows: Int[Tensor, " b"] | slice, step: int | Int[Tensor, " 1"], **values: Tensor | None) -> None:
        """Column `step`, by name; None is not known. Whoever gives a tensor says himself how many steps there were."""
        for name, value in values.items():
            if value is None:
                continue
            if name not in self.columns:
                self.columns[name] = value.new_zeros(self.rows, self.longest, *value.shape[1:])
            self.columns[name][rows, step] = value
        if isinstance(step, int):
            self.steps = step + 1

    def masked(self, name: str, mask: Bool[Tensor, "B C"]) -> Float[Tensor, "B C"] | None:
        """A column [B, C], 0 outside the mask; None where it is not known."""
        column = self.columns.get(name)
        return None if column is None else torch.where(mask, column[:, : mask.shape[1]], 0)


class KeyedSampler(LogitsProcessor):
    """Chooses the token inside `generate`: all other logits become −inf. What it knows of each choice is in `record`.

    Args:
        width: columns of the prompts.
        longest: most tokens of a completion.
        value_head: from what the LM head reads [n, H] to V(s_t) [n].
        read: receives what the LM head reads (see `captured_head_input`); needed with a value head.
    """

    def __init__(
        self,
        seed: int,
        sample_ids: Int[Tensor, " B"],
        width: int,
        longest: int,
        temperature: float,
        warpers: Sequence[Any],
        greedy: bool = False,
        value_head: Callable[[Tensor], Tensor] | None = None,
        read: list[Tensor] | None = None,
    ):
        self.greedy = greedy
        # negative ids belong to evaluations: their noise does not depend on the seed, so that runs can be compared
        training, evaluation = row_keys(seed, "sample", sample_ids), row_keys(0, "evaluate", sample_ids)
        self.keys = torch.where(sample_ids >= 0, training, evaluation)
        self.width, self.temperature, self.warpers = width, temperature, warpers
        self.value_head, self.read = value_head, [] if read is None else read
        self.record = Record(len(sample_ids), longest)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits [B, V] with one finite entry a row, drawn from softmax(scores / τ) over the kept set."""
        logits, kept = self.cut(input_ids, sampling_logits(scores, self.temperature))
        position = input_ids.shape[1] - self.width
        tokens = logits.argmax(1) if self.greedy else gumbel_max(logits, mix(self.keys + position))
        self.record.put(
            slice(None),
            position,
            logprobs=chosen_logprobs(logits, tokens),
            entropy=entropy(logits),
            values=self.values(),
            kept=kept,
        )
        return torch.full_like(scores, -torch.inf).scatter(1, tokens[:, None], 0.0)

    def cut(self, input_ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits with −inf outside the set that top-k and top-p keep, and that set as bits; None where all is kept."""
        for warper in self.warpers:
            logits = warper(input_ids, logits)
        return logits, pack_bits(logits > -torch.inf) if self.warpers else None

    def values(self) -> Tensor | None:
        """V(s_t) of the states that the LM head has just read, or None without a value head or an LM head."""
        if self.value_head is None or not self.read:
            return None
        hidden = self.read[-1][:, -1]
        self.read.clear()
        return self.value_head(hidden)


class Finished(StoppingCriteria):
    """True for rows that have drawn a stop token or completed a stop string; remembers at which length."""

    def __init__(
        self,
        rows: int,
        width: int,
        stop_ids: Sequence[int],
        strings: StopStringCriteria | None,
        device: torch.device | str = "cpu",
    ):
        self.width, self.strings = width, strings
        self.stop_ids = torch.tensor(list(stop_ids), device=device, dtype=torch.long)
        self.done = torch.zeros(rows, dtype=torch.bool, device=device)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Rows [B] that are finished after the newest token."""
        now = self.ended(input_ids)
        self.lengths = torch.where(now & ~self.done, input_ids.shape[1] - self.width, self.lengths)
        self.done = self.done | now
        return self.done

    def ended(self, ids: Int[Tensor, "b n"]) -> Bool[Tensor, " b"]:
        """Rows whose newest token ends them; the older ones matter to stop strings alone."""
        now = (ids[:, -1:] == self.stop_ids).any(1)
        return now if self.strings is None else now | self.strings(ids, None)

    @property
    def possible(self) -> bool:
        """Whether anything but the length limit ends a row."""
        return len(self.stop_ids) > 0 or self.strings is not None

    def length(self, longest: int) -> Int[Tensor, " B"]:
        """Chosen tokens per row: up to and with the one that ended it, or all when none did."""
        return torch.where(self.done, self.lengths, longest)
