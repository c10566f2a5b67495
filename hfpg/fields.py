"""What the fields of settings may hold: types, choices, finite numbers; and one sentence where they do not."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import numbers
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id


class ConfigError(ValueError):
    """A setting that cannot be: the message holds the value seen, the rule broken and a value that works."""


def require(holds: bool, message: str) -> None:
    """Raise ConfigError(message) unless the rule holds."""
    if not holds:
        raise ConfigError(message)


def is_repo_id(name: str | None) -> bool:
    """Whether a repository of the Hub may be called so."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name is not None


def check_choices(settings: Any) -> None:
    """Check the fields of a dataclass instance against their annotations: types, and the choices of a `Literal`.

    A whole number serves as a float, a Path as a text, a tuple as a list; NumPy's numbers become Python's, which JSON
    can write. Annotations not in `WORDS` allow anything.

    Raises:
        ConfigError: a value that its annotation does not allow, with one that works where that can be guessed.
    """
    hints = typing.get_type_hints(type(settings))
    for f in dataclasses.fields(settings):
        kind, value = hints[f.name], getattr(settings, f.name)
        if fits(value, kind):
            object.__setattr__(settings, f.name, plain(value))  # a method's settings are frozen
            continue
        if typing.get_origin(kind) is Literal:
            raise ConfigError(f"{f.name}={value!r} is unknown; choose from {list(typing.get_args(kind))}")
        guess = _guess(value, kind)
        works = f.default if guess is None and f.default is not dataclasses.MISSING else guess
        raise ConfigError(
            f"{f.name}={value!r:.60} is a {type(value).__name__}; it must be {in_words(kind)}"
            f"{'' if works is None else f', such as {works!r}'}"
        )


WORDS: dict[Any, tuple[str, Any]] = {
    bool: ("True or False", bool),
    int: ("a whole number", numbers.Integral),
    float: ("a number", numbers.Real),
    str: ("a text", str | Path),
    dict: ("a dict", dict),
    type(None): ("None", type(None)),
}
"""What stands in an annotation → how a message says it, and what is taken for it."""


def plain(value: Any) -> Any:
    """A value, and those in a list, with a number of another library as Python's own."""
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, numbers.Real) and not isinstance(value, int | float):
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    return value


def fits(value: Any, kind: Any) -> bool:
    """Whether a value is what an annotation says; True is no number."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is Literal:
        return value in inner
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in inner)
    if typing.get_origin(kind) is list:
        return isinstance(value, list | tuple) and all(fits(one, inner[0]) for one in value)
    if kind not in WORDS:
        return True
    return isinstance(value, WORDS[kind][1]) and (kind is bool or not isinstance(value, bool))


def in_words(kind: Any) -> str:
    """An annotation as a message says it."""
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is list:
        return f"a list, each item {in_words(inner[0])}"
    if typing.get_origin(kind) is Literal:
        return f"one of {list(inner)}"
    return " or ".join(map(in_words, inner)) if inner else WORDS[kind][0]


def _guess(value: Any, kind: Any) -> Any:
    """What somebody meant who gave "5" or 5.0 for 5, or 5 for [5]; None where there is no telling."""
    for one in typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else [kind]:
        if typing.get_origin(one) is list and fits([value], one):
            return [value]
        if one in (int, float) and isinstance(value, str | float):
            with contextlib.suppress(ValueError, OverflowError):
                return one(value)
    return None


def check_numbers(settings: Any) -> None:
    """Raise ConfigError where a field of a dataclass instance holds NaN or an infinity."""
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        works = f"such as {f.default}" if isinstance(f.default, int | float) else "or absent"
        finite = not isinstance(value, float) or math.isfinite(value) or value == f.default
        require(finite, f"{f.name}={value} must be a finite number, {works}")


def check_least(settings: Any) -> None:
    """Raise ConfigError where a field is below the `least` that its metadata says."""
    for f in dataclasses.fields(settings):
        value, least = getattr(settings, f.name), f.metadata.get("least")
        require(least is None or value >= least, f"{f.name}={value} must be at least {least}, such as {f.default}")


def resumed_from(value: Any) -> str | None:
    """What `resume_from_checkpoint` says: None: start fresh; "True": the newest checkpoint; else the path of one."""
    text = "" if value is None else str(value)
    return {"": None, "false": None, "true": "True"}.get(text.lower(), text)


def refuse_unread(settings: Any, why: str, *names: str) -> None:
    """Raise ConfigError where a field that nothing reads here is not at its default, that of the instance's class.

    `why` goes on the sentence "x=1 is …".
    """
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        unread = f.name in names and f.default is not dataclasses.MISSING and value != f.default
        require(not unread, f"{f.name}={value!r} is {why}")


def first_line(error: BaseException) -> str:
    """What an error of another library says, in one line; beside its name where that says more."""
    lines = str(error).strip().splitlines()[:1]
    said = isinstance(error, OSError | ValueError) and lines
    return lines[0] if said else ": ".join([type(error).__name__, *lines])


def nearest(name: str, known: Sequence[str]) -> str:
    """'; did you mean X?' for the known name closest to this one, or nothing."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""
