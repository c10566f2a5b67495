"""What a reward function returned, read: a score per completion, or one sentence that says why it is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from hfpg.types import Text, text_of


LARGEST_SCORE = torch.finfo(torch.float32).max


class RewardError(RuntimeError):
    """A reward function failed or returned something that is no score."""


def shown(value: Any, limit: int = 60) -> str:
    """A foreign value, fit for a message: its repr, cut at `limit`."""
    try:
        text = repr(value)
    except Exception:  # somebody else's class, or an int of more digits than Python writes out
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def one_line(text: str, limit: int = 300) -> str:
    """Foreign words for a message: on one line, with unprintable characters written out, cut at `limit`."""
    start = " ".join(text[: 4 * limit].split())
    plain = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in start)
    return plain if len(plain) <= limit and len(text) <= 4 * limit else plain[: limit - 1] + "…"


def beginning(completion: Text) -> str:
    """The first 80 characters of a completion, quoted; whatever stands there is harmless in a terminal."""
    return repr(text_of(completion)[:80])


def _plain(value: Any) -> Any:
    """Tensors, arrays and numbers of other libraries as Python's own; what cannot be read stays as it is."""
    try:
        return value.tolist() if hasattr(value, "tolist") else value
    except (RuntimeError, ValueError, TypeError):  # a tensor without data, say
        return value


def _is_score(value: Any) -> bool:
    """A number that is finite in single precision."""
    return isinstance(value, int | float) and abs(value) <= LARGEST_SCORE


class Said(NamedTuple):
    """What one function said: a sum per completion (None: abstained; a text: why it is no score), and its parts.

    Parts are (place of the token, score), of the completions that were scored token by token or step by step.
    """

    sums: list[float | None | str]
    parts: list[list[tuple[int, float]]]


def read(
    name: str,
    output: Any,
    completions: Sequence[Text],
    completion_ids: Sequence[Sequence[int]],
    step_ends: Callable[[list[int]], list[int]] | None = None,
) -> Said:
    """The scores of one function's output.

    Raises:
        RewardError: no list, or not one entry per completion. What is wrong with a single entry stands in its place.
    """
    output = _plain(output)
    if not isinstance(output, list | tuple):
        raise RewardError(
            f"reward function {name!r} returned {shown(output)}; it must return a list of {len(completions)} floats, "
            "one per completion (None: cannot judge)"
        )
    if len(output) != len(completions):
        raise RewardError(
            f"reward function {name!r} returned {len(output)} scores for {len(completions)} completions; it must "
            "return one per completion (None: cannot judge)"
        )
    said = Said([], [])
    for i, value in enumerate(output):
        where = f"for sample {i} ({beginning(completions[i])})"
        total, parts = _one(name, value, where, list(completion_ids[i]), step_ends)
        said.sums.append(total)
        said.parts.append(parts)
    return said


def _one(
    name: str, value: Any, where: str, tokens: list[int], step_ends: Callable[[list[int]], list[int]] | None
) -> tuple[float | None | str, list[tuple[int, float]]]:
    """The sum and the parts of one entry, or what is wrong with it."""
    plain = _plain(value)
    if plain is not value and isinstance(plain, list) and len(plain) == 1:  # an array that holds one number is one
        plain = plain[0]
    if plain is None:
        return None, []
    if not isinstance(plain, list | tuple):
        if _is_score(plain):
            return float(plain), []
        return (
            f"reward function {name!r} returned {shown(plain)} {where}; a score is a finite number, or None for "
            "'cannot judge'",
            [],
        )
    plain = [_plain(part) for part in plain]
    wrong = [part for part in plain if not _is_score(part)]
    if wrong:
        told = f"reward function {name!r} returned a list with {shown(wrong[0])} {where}"
        return f"{told}; each entry is a finite number", []
    places = list(range(len(tokens)))
    if len(plain) != len(tokens) and step_ends is not None:
        places = step_ends(tokens)
    if len(plain) != len(places):
        steps = "" if step_ends is None else f" and {len(places)} steps"
        return (
            f"reward function {name!r} returned {len(plain)} scores {where}, which has {len(tokens)} tokens{steps}; "
            "give one per completion, one per token, or with step_marker one per step"
        ), []
    return float(sum(plain)), [(place, float(part)) for place, part in zip(places, plain, strict=True)]
