"""Rows → left-padded Prompts; chat templates; an endless stream of prompts whose order is a function of the seed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import torch

from hfpg.config import ConfigError, nearest, require
from hfpg.files import read_rows
from hfpg.ops.keyed import permutation
from hfpg.types import Prompts, Samples, Text, ends_in_answer


logger = logging.getLogger(__name__)

ROW = "hfpg_row"
"""Column with a row's number in the data set that it was split from; no reward function sees it."""

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
        self._numbers: Sequence[int] = self.columns.pop(ROW, range(len(self.prompts)))
        refuse_bad_prompts(self.prompts, self._numbers)
        if getattr(tokenizer, "padding_side", "left") != "left":
            logger.info(
                "the tokenizer pads on the right; prompts are padded on the left here, the tokenizer stays as is"
            )
        self.encoded = encode_prompts(tokenizer, self.prompts)
        nothing = [i for i, ids in enumerate(self.encoded) if not ids]
        where = rows_named(nothing, self._numbers)
        require(not nothing, f"{len(nothing)} prompts have no token ({where}); remove these rows")
        if context is not None:
            self._fit(context, max_completion_length, overlong)
        self.fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def __len__(self) -> int:
        return len(self.prompts)

    def _fit(self, context: int, max_completion_length: int, overlong: str) -> None:
        """Raise, cut or drop the prompts that are too long."""
        longest = context - max_completion_length
        require(
            longest >= 1,
            f"max_completion_length={max_completion_length} leaves no room for a prompt in the {context} tokens that "
            f"the model can take; choose a shorter one, such as {max(1, context // 2)}",
        )
        rows = [i for i, ids in enumerate(self.encoded) if len(ids) > longest]
        if not rows:
            return
        seen = (
            f"{len(rows)} prompts have more than {longest} tokens ({rows_named(rows, self._numbers)}; the longest has "
        )
        seen += f"{max(len(self.encoded[i]) for i in rows)})"
        if overlong == "truncate":
            logger.warning("%s: their beginning is cut", seen)
            self.encoded = [ids[-longest:] for ids in self.encoded]
        elif overlong == "drop":
            logger.warning("%s: dropped", seen)
            keep = sorted(set(range(len(self))) - set(rows))
            require(
                bool(keep),
                f"{seen}: overlong_prompts='drop' leaves none; use 'truncate', or a smaller "
                f"max_completion_length than {max_completion_length}",
            )
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


def _is_rows(value: Any) -> bool:
    return hasattr(value, "column_names") or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def read_columns(dataset: Any, prompt_column: str) -> tuple[list[Text], dict[str, list]]:
    """The prompts and the other columns as plain lists."""
    splits = [name for name, rows in dataset.items() if _is_rows(rows)] if isinstance(dataset, dict) else []
    require(
        not splits,
        f"the data set is a {type(dataset).__name__} of splits; give the trainer one of them, such as "
        f"dataset[{splits[:1] and splits[0]!r}]",
    )
    if hasattr(dataset, "column_names") and hasattr(dataset, "__len__"):
        names = list(dataset.column_names)
        transformed = getattr(dataset, "format", {}).get("type") == "custom"
        if hasattr(dataset, "with_format") and not transformed:  # the rows themselves, no tensors
            dataset = dataset.with_format(None)
        table = {name: list(dataset[name]) for name in names}
    elif isinstance(dataset, list | tuple):
        require(len(dataset) > 0, "the data set is empty; it needs rows with a prompt")
        for number, row in enumerate(dataset):
            require(
                isinstance(row, dict),
                f"row {number} of the data set is {row!r:.60}; expected a dict such as {{'prompt': …}}",
            )
        names = list(dict.fromkeys(name for row in dataset for name in row))
        table = {name: [row.get(name) for row in dataset] for name in names}
    else:
        kind = type(dataset).__name__
        whole = {"dict": "Dataset.from_dict(data)", "DataFrame": f"Dataset.from_{type(dataset).__module__[:6]}(frame)"}
        raise ConfigError(
            f"a {kind} is not read; give the trainer `datasets.{whole[kind]}`"
            if kind in whole
            else f"{kind} is not supported: its order cannot be replayed after a restart. Use a datasets.Dataset or a "
            "list of dicts; of a stream, `Dataset.from_list(list(stream.take(10_000)))`"
        )
    wrong = [name for name in names if not isinstance(name, str)]
    require(not wrong, f"the data set has columns named {wrong}; a name is a text, such as 'prompt'")
    others = [name for name in names if name != ROW]
    require(
        prompt_column in names,
        f"the data set has no column {prompt_column!r}; it has {others}{nearest(prompt_column, others)}. Name it with "
        "prompt_column",
    )
    reserved = [name for name in names if name in RESERVED_COLUMNS]
    require(not reserved, f"column {reserved} is reserved: reward functions get arguments of that name; rename it")
    prompts = table.pop(prompt_column)
    require(len(prompts) > 0, "the data set is empty; it needs rows with a prompt")
    return prompts, table


def rows_named(rows: Sequence[int], numbers: Sequence[int]) -> str:
    """The first of some rows by their numbers in the data set, as a message says it."""
    return f"rows {[numbers[i] for i in rows[:3]]}, counted from 0"


def refuse_bad_prompts(prompts: Sequence[Any], numbers: Sequence[int]) -> None:
    """Raise ConfigError with row numbers for prompts that are missing, empty, or neither text nor conversation."""
    bad = [i for i, p in enumerate(prompts) if p is None or (isinstance(p, str) and not p.strip()) or p == []]
    where = rows_named(bad, numbers)
    require(not bad, f"{len(bad)} prompts are empty or missing ({where}); remove these rows")
    for i, prompt in enumerate(prompts):
        conversation = isinstance(prompt, list) and all(isinstance(m, dict) and "role" in m for m in prompt)
        require(
            isinstance(prompt, str) or conversation,
            f"the prompt of row {numbers[i]} is {prompt!r:.60}; expected text, or a list of messages such as "
            "[{'role': 'user', 'content': 'Hi'}]",
        )
        for text in [prompt] if isinstance(prompt, str) else [m.get("content") for m in prompt]:
            require(
                not isinstance(text, str) or not any("\ud800" <= c <= "\udfff" for c in text),
                f"the prompt of row {numbers[i]} has half of a surrogate pair: {text!r:.60}; read the file as UTF-8, "
                "or clean it with text.encode('utf-8', 'replace').decode()",
            )
        silent = [m for m in prompt if conversation and m.get("content") is None and not m.get("tool_calls")]
        if ends_in_answer(prompt) and not isinstance(prompt[-1].get("content"), str):
            silent = [prompt[-1]]  # there is no text to go on with
        require(
            not silent,
            f"a message in the prompt of row {numbers[i]} has no content: {silent[:1]!r:.80}; each needs a text, as "
            "in {'role': 'user', 'content': 'Hi'}",
        )


def encode_prompts(tokenizer: Any, prompts: Sequence[Text]) -> list[list[int]]:
    """Token ids of each prompt. A conversation goes through the chat template and ends where the assistant begins, or
    in the midst of the answer that is its last message. An EOS that the tokenizer sets behind a text is left out.
    """
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
        texts = [through_template(tokenizer, p) for p in prompts]
        # the template has written the special tokens already
        encoded = tokenizer(texts, add_special_tokens=False).input_ids
    else:
        texts = [str(p) for p in prompts]
        encoded = without_own_end(tokenizer, texts, [list(ids) for ids in tokenizer(texts).input_ids])
        doubled = [i for i, ids in enumerate(encoded) if len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id]
        if doubled:
            logger.warning(
                "%d prompts begin with %r, and the tokenizer adds another one (row %d, counted from 0): write prompts "
                "without it, or conversations, which go through the chat template",
                len(doubled), tokenizer.bos_token, doubled[0],
            )  # fmt: skip
    return [list(ids) for ids in encoded]


def without_own_end(tokenizer: Any, texts: Sequence[str], encoded: list[list[int]]) -> list[list[int]]:
    """Prompts without the EOS that some tokenizers set behind every text: a completion goes on after the prompt."""
    end = tokenizer.eos_token_id
    if end is None or not all(ids[-1:] == [end] for ids in encoded):
        return encoded
    bare = [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False).input_ids]
    if not all(ids[:-1][-len(own) :] == own for ids, own in zip(encoded, bare, strict=True)):
        return encoded  # it stands in the texts
    logger.warning("the tokenizer sets %r behind every text: it is left out of the prompts", tokenizer.eos_token)
    return [ids[:-1] for ids in encoded]


def through_template(tokenizer: Any, prompt: Text) -> str:
    """A conversation as the tokenizer's chat template writes it, up to where the assistant begins or stopped.

    Raises:
        ConfigError: the template is no Jinja, or cannot write this conversation.
    """
    try:
        how = "continue_final_message" if ends_in_answer(prompt) else "add_generation_prompt"
        return tokenizer.apply_chat_template(prompt, tokenize=False, **{how: True})
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise ConfigError(
            f"the chat template{line}: {error} (for {prompt!r:.80}); name a file with another one with "
            "--chat_template, or use text prompts"
        ) from error


def decode_completions(tokenizer: Any, samples: Samples, prompts: Sequence[Text]) -> list[Text]:
    """Completions as people read them, without special tokens.

    After a text (or an answer that was begun) what comes next, with the space before it: prompt + completion is what
    the policy wrote. After a conversation a message of the assistant, which begins a text of its own.
    """
    rows = [row[keep].tolist() for row, keep in zip(samples.completion_ids, samples.completion_mask, strict=True)]
    after = [
        last if isinstance(prompt, str) or ends_in_answer(prompt) else None
        for last, prompt in zip(samples.prompt_ids[:, -1].tolist(), prompts, strict=True)
    ]
    texts = decode_after(tokenizer, after, rows)
    return [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for text, prompt in zip(texts, prompts, strict=True)
    ]


def decode_after(tokenizer: Any, before: Sequence[int | None], rows: Sequence[list[int]]) -> list[str]:
    """Rows of token ids as text, each as it reads behind the token `before` it; None: as a text of its own.

    Of a token at the beginning, SentencePiece's tokenizers drop the space.
    """
    led = [ids if last is None else [last, *ids] for last, ids in zip(before, rows, strict=True)]
    whole = tokenizer.batch_decode(led, skip_special_tokens=True)
    leads = {last: tokenizer.decode([last], skip_special_tokens=True) for last in set(before) - {None}} | {None: ""}
    return [
        text.removeprefix(leads[last])
        if text.startswith(leads[last])
        else tokenizer.decode(ids, skip_special_tokens=True)  # the two tokens are parts of one character
        for last, ids, text in zip(before, rows, whole, strict=True)
    ]


def read_chat_template(path: str) -> str:
    """The text of a Jinja template file."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise ConfigError(f"chat_template={path!r} cannot be read: {why}; give the path of a Jinja file") from None


def step_ends(tokenizer: Any, marker: str, ids: list[int]) -> list[int]:
    """The place of the last token of each step: the token that completes a marker, and the last token of all."""
    found, seen = [], 0
    for place in range(len(ids)):
        count = tokenizer.decode(ids[: place + 1]).count(marker)
        if count > seen:
            found.append(place)
        seen = max(seen, count)
    return found if not ids or found[-1:] == [len(ids) - 1] else [*found, len(ids) - 1]


def load_prompts(source: str, held_out: int) -> tuple[Any, Any]:
    """Training and held-out rows of a Hub data set, a folder or a file: at most a fifth is held out.

    Each row keeps its number in the column `ROW`, for messages: the split shuffles.

    Raises:
        ConfigError: it cannot be loaded, or is too small to hold anything out.
    """
    require(held_out >= 1, f"eval_prompts={held_out} must be at least 1, such as 256")
    rows = read_rows(source)
    require(ROW not in rows.column_names, f"{source} has a column {ROW!r}, which hfpg adds itself; rename it")
    count = min(held_out, len(rows) // 5)
    require(count >= 1, f"{source} has {len(rows)} rows; it needs at least 5, a fifth is held out")
    split = rows.add_column(ROW, range(len(rows))).train_test_split(count, seed=0)
    return split["train"], split["test"]
