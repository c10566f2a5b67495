"""Preference pairs: read, checked, dealt out, and written as the text that a judge reads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_dataset

from hfpg.config import ConfigError, nearest, require
from hfpg.fields import first_line
from hfpg.ops.keyed import permutation
from hfpg.rewards.learned import as_text
from hfpg.types import Text, message_text


@dataclass(frozen=True)
class Pairs:
    """N preferences, as columns. `prompts` holds "" (text) or [] (conversation) where the data have no prompt."""

    prompts: list[Text]
    chosen: list[Text]
    rejected: list[Text]
    margins: list[float]
    ties: list[bool]

    def __len__(self) -> int:
        return len(self.chosen)

    def take(self, rows: Sequence[int]) -> Pairs:
        """The pairs of these rows, in this order."""
        return Pairs(*([column[i] for i in rows] for column in vars(self).values()))

    def without_ties(self) -> Pairs:
        """The pairs that say which text is better.

        Raises:
            ConfigError: there is none.
        """
        kept = self.take([i for i, tie in enumerate(self.ties) if not tie])
        require(
            len(kept) > 0,
            f"all {len(self)} pairs are ties: they say of no text that it is better; give pairs with a preference",
        )
        return kept

    def sides(self, tokenizer: Any) -> tuple[list[str], list[str]]:
        """What a judge with this tokenizer reads of the chosen and of the rejected texts."""
        return tuple(  # type: ignore[return-value]
            [judged_text(tokenizer, p, c) for p, c in zip(self.prompts, side, strict=True)]
            for side in (self.chosen, self.rejected)
        )

    @property
    def templated(self) -> bool:
        """Whether the texts are conversations: the chat template writes their special tokens."""
        return not isinstance(self.chosen[0], str)


def judged_text(tokenizer: Any, prompt: Text, completion: Text) -> str:
    """Prompt and completion as one text, the way a classifier reads them in hfpg.

    Raises:
        ConfigError: a conversation, and no chat template.
    """
    require(
        (isinstance(prompt, str) and isinstance(completion, str)) or bool(getattr(tokenizer, "chat_template", None)),
        "the pairs are conversations, but the tokenizer has no chat template; name a file with --chat_template",
    )
    return as_text(tokenizer, prompt, completion)


def plain(text: Text) -> str:
    """A text or the contents of a conversation's messages: what is compared and measured."""
    return text if isinstance(text, str) else "\n".join(map(message_text, text))


def load_pairs(
    source: str, *, split: str = "train", config: str | None = None, margin_column: str = "margin"
) -> Pairs:
    """The pairs of a Hub data set or of a .json, .jsonl or .csv file.

    Raises:
        ConfigError: it cannot be loaded, or a row is no pair (see `read_pairs`).
    """
    kind = Path(source).suffix.lstrip(".").replace("jsonl", "json")
    local = kind in ("json", "csv")
    require(not local or Path(source).is_file(), f"there is no file {source!r}; give a file or the id of a data set")
    require(
        not local or bool(Path(source).read_bytes()[:4096].strip()),
        f"{source} is empty; it needs rows with the columns 'chosen' and 'rejected'",
    )
    try:
        rows = (
            load_dataset(kind, data_files=source, split="train")
            if local
            else load_dataset(source, config, split=split)
        )
    except Exception as error:  # datasets raises its own family, pyarrow's, the client's and the standard ones
        raise ConfigError(f"cannot load the data set {source!r}: {first_line(error)}") from error
    return read_pairs({name: list(rows[name]) for name in rows.column_names}, source, margin_column)


def read_pairs(table: dict[str, list[Any]], source: str = "the data set", margin_column: str = "margin") -> Pairs:
    """Pairs from columns: `chosen` and `rejected`, text or conversation, and if there is one `prompt`.

    The margin column, where it exists, holds m ≥ 0. A pair is a tie where both texts are equal, where a column `tie`
    is true, or where there are two scores, `score_chosen` and `score_rejected`, and they are equal.

    Raises:
        ConfigError: a column is missing, there is no row, a text is missing or neither text nor conversation, both
            kinds are mixed, a margin is negative or no number, or a tie neither true nor false; with row numbers.
    """
    names = list(table)
    for name in ("chosen", "rejected"):
        require(
            name in table,
            f"{source} has no column {name!r}; it has {names}{nearest(name, names)}. A pair has the columns 'chosen' "
            "and 'rejected', and if it likes 'prompt'",
        )
    require(
        margin_column in ("", "margin") or margin_column in table,
        f"{source} has no column {margin_column!r}; it has {names}{nearest(margin_column, names)}",
    )
    chosen, rejected = table["chosen"], table["rejected"]
    require(len(chosen) > 0, f"{source} is empty; it needs rows with the columns 'chosen' and 'rejected'")
    for name in {"prompt", "chosen", "rejected"} & set(table):
        _refuse_bad_texts(name, table[name], source)
    prompts = table.get("prompt") or [""] * len(chosen)
    rows = [_fit(*row, number) for number, row in enumerate(zip(prompts, chosen, rejected, strict=True))]
    require(
        len({isinstance(row[1], str) for row in rows}) == 1,
        f"some pairs of {source} are conversations and the others text; use one kind",
    )
    margins = _margins(table.get(margin_column), len(rows))
    told = _told_ties(table.get("tie") or [False] * len(rows))
    none = [None] * len(rows)
    scores = zip(table.get("score_chosen", none), table.get("score_rejected", none), strict=True)
    equal = [c is not None and c == r for c, r in scores]
    ties = [t or e or row[1] == row[2] for t, e, row in zip(told, equal, rows, strict=True)]
    return Pairs([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows], margins, ties)


def _refuse_bad_texts(name: str, texts: Sequence[Any], source: str) -> None:
    empty = [i for i, t in enumerate(texts) if t is None or t == [] or (isinstance(t, str) and not t.strip())]
    empty = [i for i in empty if name != "prompt" or texts[i] is None]
    require(not empty, f"{len(empty)} values of {name!r} in {source} are empty (rows {empty[:3]}); remove these rows")
    for i, text in enumerate(texts):
        conversation = isinstance(text, list) and all(isinstance(m, dict) and "role" in m for m in text)
        require(
            isinstance(text, str) or conversation,
            f"{name!r} of row {i} in {source} is {text!r:.60}; expected text, or a list of messages such as "
            "[{'role': 'user', 'content': 'Hi'}]",
        )
        bare = [m for m in text if m.get("content") is None and not m.get("tool_calls")] if conversation else []
        require(
            not bare,
            f"{name!r} of row {i} in {source} has the message {bare[:1]!r:.80} without content; a message is such as "
            "{'role': 'user', 'content': 'Hi'}",
        )


def _fit(prompt: Text, chosen: Text, rejected: Text, row: int) -> tuple[Text, Text, Text]:
    """One kind of text in a row.

    A text after a conversation is the assistant's answer. Conversations that begin with the text prompt as the
    user's message hold the prompt already.
    """
    if isinstance(prompt, list):
        answers = [
            [{"role": "assistant", "content": side}] if isinstance(side, str) else side for side in (chosen, rejected)
        ]
        return prompt, answers[0], answers[1]
    if isinstance(chosen, str) and isinstance(rejected, str):
        return prompt, chosen, rejected
    require(
        isinstance(chosen, list) and isinstance(rejected, list),
        f"row {row} has a conversation beside a text in 'chosen' and 'rejected'; use one kind",
    )
    held = [any(m.get("content") == prompt for m in side[:2]) for side in (chosen, rejected) if isinstance(side, list)]
    require(
        not prompt or all(held),
        f"row {row} has a text prompt and conversations that do not begin with it; make it a conversation, too",
    )
    return [], chosen, rejected


def _told_ties(column: Sequence[Any]) -> list[bool]:
    """The column `tie`: true or false, also as 0 and 1 or as a text; nothing is no."""
    known = {"true": True, "yes": True, "1": True, "1.0": True} | dict.fromkeys(("false", "no", "0", "0.0", ""), False)
    said = ["" if value is None else str(value).strip().lower() for value in column]
    bad = [i for i, word in enumerate(said) if word not in known]
    require(
        not bad,
        f"{len(bad)} values of 'tie' are neither true nor false (rows {bad[:3]}: {[column[i] for i in bad[:3]]}); use "
        "true or false",
    )
    return [known[word] for word in said]


def _margins(column: Sequence[Any] | None, rows: int) -> list[float]:
    if column is None:
        return [0.0] * rows
    good = [isinstance(m, int | float) and math.isfinite(m) and m >= 0 for m in column]
    bad = [i for i, fine in enumerate(good) if not fine]
    require(
        not bad,
        f"{len(bad)} margins are negative or no number (rows {bad[:3]}: {[column[i] for i in bad[:3]]}); a margin is "
        "how much better the chosen text is, such as 0.5; without margins: --margin_column ''",
    )
    return [float(m) for m in column]


def shared_prompt(chosen: Text, rejected: Text) -> Text:
    """The messages with which both conversations begin, up to the last one that is not the assistant's.

    They are the prompt where the data have no column of it; of texts, and without a user's message, there is none.
    """
    if isinstance(chosen, str) or isinstance(rejected, str):
        return []
    same = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)))
    messages = [message for message, _ in same]
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return messages if any(message["role"] == "user" for message in messages) else []


def hold_out(pairs: Pairs, count: int, seed: int) -> tuple[Pairs, Pairs, int]:
    """Training pairs, held-out pairs (at most a fifth), and how many pairs in between were dropped.

    Pairs of one prompt stay together, and training pairs that share a text with a held-out pair are dropped: a judge
    has never seen the texts that it is measured on. Ties do not count: they measure nothing. A prompt that has more
    pairs than may still be held out is learnt.

    Raises:
        ConfigError: too few pairs to hold one out, or all share a prompt or texts.
    """
    clear = len(pairs) - sum(pairs.ties)  # what can be measured
    most = clear // 5
    require(most >= 1, f"{clear} pairs are too few to hold some out: at least 5, or name an --eval_dataset")
    prompts = [p or shared_prompt(c, r) for p, c, r in zip(pairs.prompts, pairs.chosen, pairs.rejected, strict=True)]
    names = [plain(p) or f"row {i}" for i, p in enumerate(prompts)]
    members: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        members.setdefault(name, []).append(row)
    out: list[int] = []
    sizes = {name: sum(not pairs.ties[i] for i in rows) for name, rows in members.items()}
    taken = 0
    for name in dict.fromkeys(names[i] for i in permutation(len(pairs), seed, "hold out").tolist()):
        if taken < count and sizes[name] and taken + sizes[name] <= most:
            out += members[name]
            taken += sizes[name]
    fewest = min(filter(None, sizes.values()))
    require(
        len(out) > 0,
        f"at most a fifth of {clear} pairs, {most}, may be held out, and every prompt has {fewest} or more; "
        "pairs of one prompt stay together: name an --eval_dataset",
    )
    held, seen = set(out), {plain(side[i]) for i in out for side in (pairs.chosen, pairs.rejected)}
    rest = [i for i in range(len(pairs)) if i not in held]
    own = [i for i in rest if prompts[i] or not {plain(pairs.chosen[i]), plain(pairs.rejected[i])} & seen]
    require(
        len(own) > 0,
        f"no training pair is left beside {len(out)} held-out pairs: all share their texts; name an --eval_dataset, "
        "or hold out fewer with --held_out",
    )
    return pairs.take(own), pairs.take(sorted(out)), len(rest) - len(own)
