"""Rows → left-padded Prompts; chat templates; an endless stream of prompts whose order is a function of the seed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset

from hfpg.config import ConfigError, nearest, require
from hfpg.ops.keyed import permutation
from hfpg.types import Prompts, Text


logger = logging.getLogger(__name__)

RESERVED_COLUMNS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")


class PromptData:
    """A data set checked and tokenised once, before any work can be lost.

    Args:
        dataset: `datasets.Dataset` or a list of dicts, with a prompt column (text, or a conversation: a list of
            role/content messages). Other columns reach the reward functions by name.
        tokenizer: of the policy.
        context: longest prompt + completion that the model can take, or None.
    Raises:
        ConfigError: a streaming data set, no prompt column, empty or missing prompts (with the row numbers), a
            reserved column name, a conversation without a chat template, prompts that are too long.
    """

    def __init__(
        self,
        dataset: Any,
        tokenizer: Any,
        *,
        prompt_column: str = "prompt",
        max_completion_length: int = 0,
        context: int | None = None,
        overlong: str = "raise",
    ):
        self.prompts, self.columns = read_columns(dataset, prompt_column)
        refuse_bad_prompts(self.prompts)
        if getattr(tokenizer, "padding_side", "left") != "left":
            logger.info(
                "the tokenizer pads on the right; prompts are padded on the left here, the tokenizer stays as is"
            )
        self.encoded = encode_prompts(tokenizer, self.prompts)
        nothing = [i for i, ids in enumerate(self.encoded) if not ids]
        require(not nothing, f"{len(nothing)} prompts have no token (rows {nothing[:3]}); remove these rows")
        self._fit(None if context is None else context - max_completion_length, overlong)
        self.fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def __len__(self) -> int:
        return len(self.prompts)

    def _fit(self, longest: int | None, overlong: str) -> None:
        if longest is None:
            return
        require(
            longest >= 1,
            f"max_completion_length leaves {longest} tokens of the context for the prompt; choose a shorter one",
        )
        rows = [i for i, ids in enumerate(self.encoded) if len(ids) > longest]
        if not rows:
            return
        seen = f"{len(rows)} prompts have more than {longest} tokens (rows {rows[:3]}; the longest has "
        seen += f"{max(len(self.encoded[i]) for i in rows)})"
        if overlong == "truncate":
            logger.warning("%s: their beginning is cut", seen)
            self.encoded = [ids[-longest:] for ids in self.encoded]
        elif overlong == "drop":
            logger.warning("%s: dropped", seen)
            keep = sorted(set(range(len(self))) - set(rows))
            self.prompts = [self.prompts[i] for i in keep]
            self.encoded = [self.encoded[i] for i in keep]
            self.columns = {name: [values[i] for i in keep] for name, values in self.columns.items()}
        else:
            raise ConfigError(
                f"{seen}: context minus max_completion_length; set overlong_prompts to 'truncate' or 'drop', or a "
                "smaller max_completion_length"
            )

    def rows(self, indices: Sequence[int], sample_ids: torch.Tensor, samples_per_prompt: int, device: Any) -> Prompts:
        """Left-padded Prompts for the given rows, each repeated `samples_per_prompt` times.

        `sample_ids` [len(indices) · K] are the keys of the samples; the group id is the first of each K.
        """
        repeated = [i for i in indices for _ in range(samples_per_prompt)]
        width = max(len(self.encoded[i]) for i in indices)
        ids = torch.full((len(repeated), width), self.fill)
        mask = torch.zeros(len(repeated), width, dtype=torch.bool)
        for row, i in enumerate(repeated):
            ids[row, width - len(self.encoded[i]) :] = torch.tensor(self.encoded[i])
            mask[row, width - len(self.encoded[i]) :] = True
        first = sample_ids.view(-1, samples_per_prompt)[:, :1]
        return Prompts(
            ids=ids.to(device),
            mask=mask.to(device),
            sample_ids=sample_ids.to(device),
            group_ids=first.expand(-1, samples_per_prompt).reshape(-1).to(device),
            texts=[self.prompts[i] for i in repeated],
            columns={name: [values[i] for i in repeated] for name, values in self.columns.items()},
        )


def order(start: int, count: int, rows: int, seed: int) -> list[int]:
    """Rows number start … start+count−1 of an endless stream over a data set of `rows` rows.

    Epoch e goes through `permutation(rows, seed, "prompts", e)`: a pure function of (seed, epoch), so the position of
    the stream is one integer and nothing else has to be saved.
    """
    chosen: list[int] = []
    while len(chosen) < count:
        epoch, offset = divmod(start + len(chosen), rows)
        chosen += permutation(rows, seed, "prompts", epoch)[offset : offset + count - len(chosen)].tolist()
    return chosen


def share(count: int, rank: int, world: int) -> range:
    """The contiguous part of `count` prompts that one rank samples; parts differ by at most one."""
    return range(count * rank // world, count * (rank + 1) // world)


def read_columns(dataset: Any, prompt_column: str) -> tuple[list[Text], dict[str, list]]:
    """The prompts and the other columns as plain lists."""
    if hasattr(dataset, "column_names") and hasattr(dataset, "__len__"):
        names = list(dataset.column_names)
        table = {name: list(dataset[name]) for name in names}
    elif isinstance(dataset, list | tuple):
        require(len(dataset) > 0, "the data set is empty; it needs at least prompts_per_step rows")
        for number, row in enumerate(dataset):
            require(
                isinstance(row, dict),
                f"row {number} of the data set is {row!r:.60}; expected a dict such as {{'prompt': …}}",
            )
        names = list(dict.fromkeys(name for row in dataset for name in row))
        table = {name: [row.get(name) for row in dataset] for name in names}
    else:
        raise ConfigError(
            f"{type(dataset).__name__} is not supported: its order cannot be replayed after a restart. Use a "
            "datasets.Dataset or a list of dicts; of a stream, `Dataset.from_list(list(stream.take(10_000)))`"
        )
    require(
        prompt_column in names,
        f"the data set has no column {prompt_column!r}; it has {names}{nearest(prompt_column, names)}. Name it with "
        "prompt_column",
    )
    reserved = [name for name in names if name in RESERVED_COLUMNS]
    require(not reserved, f"column {reserved} is reserved: reward functions get arguments of that name; rename it")
    prompts = table.pop(prompt_column)
    require(len(prompts) > 0, "the data set is empty; it needs at least prompts_per_step rows")
    table.pop("prompt", None)
    return prompts, table


def refuse_bad_prompts(prompts: Sequence[Any]) -> None:
    """Raise ConfigError with row numbers for prompts that are missing, empty, or neither text nor conversation."""
    bad = [i for i, p in enumerate(prompts) if p is None or (isinstance(p, str) and not p.strip()) or p == []]
    require(not bad, f"{len(bad)} prompts are empty or missing (rows {bad[:3]}); remove these rows")
    for i, prompt in enumerate(prompts):
        conversation = isinstance(prompt, list) and all(isinstance(m, dict) and "role" in m for m in prompt)
        require(
            isinstance(prompt, str) or conversation,
            f"the prompt of row {i} is {prompt!r:.60}; expected text, or a list of messages such as "
            "[{'role': 'user', 'content': 'Hi'}]",
        )


def encode_prompts(tokenizer: Any, prompts: Sequence[Text]) -> list[list[int]]:
    """Token ids of each prompt. A conversation goes through the chat template and ends where the assistant begins."""
    conversations = [i for i, p in enumerate(prompts) if not isinstance(p, str)]
    require(
        not conversations or bool(getattr(tokenizer, "chat_template", None)),
        "the prompts are conversations, but the tokenizer has no chat template; name a file with --chat_template, or "
        "use text prompts",
    )
    require(
        len(conversations) in (0, len(prompts)),
        f"{len(conversations)} of {len(prompts)} prompts are conversations and the others text; use one kind",
    )
    if conversations:
        texts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False) for p in prompts]
        # the template has written the special tokens already
        encoded = tokenizer(texts, add_special_tokens=False).input_ids
    else:
        encoded = tokenizer(list(prompts)).input_ids
    return [list(ids) for ids in encoded]


def decode_completions(tokenizer: Any, ids: torch.Tensor, mask: torch.Tensor, prompts: Sequence[Text]) -> list[Text]:
    """Completions as people read them: text, or a one-message conversation where the prompt was one."""
    texts = tokenizer.batch_decode(
        [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)], skip_special_tokens=True
    )
    return [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for text, prompt in zip(texts, prompts, strict=True)
    ]


def read_chat_template(path: str) -> str:
    """The text of a Jinja template file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"chat_template={path!r} cannot be read: {error.strerror}; give the path of a Jinja file"
        ) from None


def step_ends(tokenizer: Any, marker: str, ids: list[int]) -> list[int]:
    """The place of the last token of each step: the token that completes a marker, and the last token of all."""
    found, seen = [], 0
    for place in range(len(ids)):
        count = tokenizer.decode(ids[: place + 1]).count(marker)
        if count > seen:
            found.append(place)
        seen = max(seen, count)
    return found if not ids or found[-1:] == [len(ids) - 1] else [*found, len(ids) - 1]


def plain_text(prompt: Text) -> str:
    """A prompt as one text: itself, or the content of a conversation's last message."""
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def load_prompts(source: str, held_out: int) -> tuple[Any, Any]:
    """Training and held-out rows of a Hub data set or a .json, .jsonl or .csv file: at most a fifth is held out.

    Raises:
        ConfigError: it cannot be loaded, or is too small to hold anything out.
    """
    require(held_out >= 1, f"eval_prompts={held_out} must be at least 1, such as 256")
    kind = Path(source).suffix.lstrip(".").replace("jsonl", "json")
    try:
        files = {"path": kind, "data_files": source} if kind in ("json", "csv") else {"path": source}
        rows = load_dataset(**files, split="train")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the data set {source!r}: {str(error).splitlines()[0]}") from error
    count = min(held_out, len(rows) // 5)
    require(count >= 1, f"{source} has {len(rows)} rows; it needs at least 5, a fifth is held out")
    split = rows.train_test_split(count, seed=0)
    return split["train"], split["test"]
