"""Dataclasses from a YAML file and command-line flags: YAML first, then flags that win. One type check for both."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from transformers import HfArgumentParser

from hfpg.fields import ConfigError, check_least, first_line, nearest, require


class YamlValue(NamedTuple):
    """What stands behind a key: the value, the same with every scalar as it is written, and the line of the key."""

    value: Any
    texts: Any
    line: int


def read_yaml(path: str | Path) -> dict[str, YamlValue]:
    """Top-level keys of a YAML mapping with their values.

    Raises ConfigError with file and line for a file that is no mapping, cannot be parsed, or names a key twice.
    """
    found: dict[str, YamlValue] = {}
    line = 1
    try:
        text = Path(path).read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}:1: expected lines of the form `key: value`, found {text.strip()[:40]!r}")
        loader = yaml.SafeLoader("")
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            require(isinstance(key_node, yaml.ScalarNode), f"{path}:{line}: a key must be a name")
            require(key_node.value not in found, f"{path}:{line}: key {key_node.value!r} stands twice; keep one")
            texts = yaml.BaseLoader("").construct_object(value_node, deep=True)
            found[key_node.value] = YamlValue(loader.construct_object(value_node, deep=True), texts, line)
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else line
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # control characters, bytes that are no UTF-8, impossible dates
        raise ConfigError(f"{path}:{line}: not valid YAML: {first_line(error)}") from None
    return found


def json_mapping(text: str) -> dict:
    """A JSON object, such as '{"use_cache": true}'."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"expected a JSON object such as '{{\"use_cache\": true}}', found {text[:40]!r}"
        )
    return value


class PlainParser(argparse.ArgumentParser):
    """An argparse parser whose errors are ConfigErrors: the caller decides how to end."""

    def error(self, message: str) -> Any:
        raise ConfigError(message)


def peek(argv: Sequence[str], *names: str) -> argparse.Namespace:
    """The values of a few flags, None where absent, before the other flags are known."""
    before = PlainParser(add_help=False, allow_abbrev=False)
    for name in names:
        before.add_argument(f"--{name}")
    return before.parse_known_args(argv)[0]


def parse(
    classes: Sequence[type],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    defaults: Callable[[Any], dict[str, Any]] | None = None,
    elsewhere: Mapping[str, str] | None = None,
    prog: str | None = None,
) -> tuple[Any, ...]:
    """One instance of each dataclass from `--config FILE.yaml` and flags; flags win over the file.

    Args:
        classes: dataclasses with disjoint field names, such as `(ScriptArguments, PPO, TrainConfig)`.
        argv: command-line words; default: those of this process.
        description: the first lines of `--help`.
        defaults: given the first class's instance, values that file and flags win over: a recipe's own defaults.
        elsewhere: what to say of a name that is known, but not here.
        prog: the command, as `--help` says it.
    Raises:
        ConfigError: a name that two classes share, an unknown key or flag (all of them at once, each with the
            nearest known name), a value of the wrong type, a number below the `least` of its field.
    """
    owner: dict[str, type] = {}
    for cls in classes:
        for f in dataclasses.fields(cls):
            require(f.name not in owner, f"field {f.name!r} stands in {owner.get(f.name)} and in {cls}")
            owner[f.name] = cls
    argv = list(sys.argv[1:] if argv is None else argv)
    path = peek(argv, "config").config
    values: dict[str, tuple[Any, Any, str]] = {}
    told = elsewhere or {}
    if path is not None:
        found = read_yaml(path)
        unknown = [
            f"{path}:{it.line}: unknown key {name!r}{told.get(name) or nearest(name, list(owner))}"
            for name, it in found.items()
            if name not in owner
        ]
        require(not unknown, "\n".join(unknown))
        values = {name: (it.value, it.texts, f"{path}:{it.line}") for name, it in found.items()}
    silent = argv if defaults is None else [word for word in argv if word not in ("-h", "--help")]  # knows no defaults
    made = _build(classes, values, silent, description, told, prog)
    if defaults is not None:
        own = {name: (value, value, "defaults") for name, value in defaults(made[0]).items()}
        made = _build(classes, own | values, argv, description, told, prog)
    return made


def _build(
    classes: Sequence[type],
    values: dict[str, tuple[Any, Any, str]],
    argv: Sequence[str],
    description: str | None,
    elsewhere: Mapping[str, str],
    prog: str | None,
) -> tuple[Any, ...]:
    """Instances from values (each with its text and the place it stands at) and from flags, which win."""
    how: Any = dict(prog=prog, usage="%(prog)s [--config FILE.yaml] [--FIELD VALUE …]", formatter_class=_Help)
    parser = _Parser(classes, description=description, allow_abbrev=False, **how)
    parser.add_argument("--config", default=None, help="YAML file with any of these fields; flags win over it.")
    namespace = argparse.Namespace()
    for action in parser._actions:
        if action.dest in values and action.nargs != 0:  # not --no_X, which has the name of --X and no value
            value = _convert(action, *values[action.dest])
            setattr(namespace, action.dest, value)
            action.default = value  # `--help` tells what the run would use
            action.required = False
    namespace, rest = parser.parse_known_args(argv, namespace)
    known = [f"--{f.name}" for cls in classes for f in dataclasses.fields(cls)]
    flags = {word: word.split("=")[0] for word in rest if word.startswith("--")} or {word: word for word in rest}
    told = {
        word: elsewhere.get(name.removeprefix("--").replace("-", "_")) or nearest(name, known)
        for word, name in flags.items()
    }
    require(not rest, "\n".join(f"unknown flag {word!r}{what}" for word, what in told.items()))
    made = tuple(
        cls(**{f.name: getattr(namespace, f.name) for f in dataclasses.fields(cls) if f.init}) for cls in classes
    )
    for settings in made:
        check_least(settings)
    return made


def _convert(action: argparse.Action, value: Any, texts: Any, where: str) -> Any:
    """A YAML value by the type that the flag has: one type check for both."""
    if value is None:
        require(action.default is None, f"{where}: {action.dest} must have a value; the default is {action.default!r}")
        return None
    if action.nargs in ("+", "*"):
        items = zip(value, texts, strict=True) if isinstance(value, list) else [(value, texts)]
        return [_convert_one(action, item, text, where) for item, text in items]
    return _convert_one(action, value, texts, where)


def _convert_one(action: argparse.Action, value: Any, text: Any, where: str) -> Any:
    kind: Any = action.type or str
    if kind is json_mapping and isinstance(value, dict):
        return value
    try:
        require(not isinstance(value, list | dict), f"{where}: {action.dest}: expected one value, found {value!r:.60}")
        converted = kind(str(text if kind is str else value))  # a version 1.10 is no number, and No is a word
    except (ValueError, argparse.ArgumentTypeError) as error:
        if isinstance(error, ConfigError):
            raise
        if isinstance(error, argparse.ArgumentTypeError):
            raise ConfigError(f"{where}: {action.dest}: {error}") from None
        name = getattr(kind, "__name__", str(kind))
        raise ConfigError(f"{where}: {action.dest}: invalid {name} value: {value!r:.60}") from None
    require(
        action.choices is None or converted in action.choices,
        f"{where}: {action.dest}={value!r} is unknown; choose from {list(action.choices or [])}",
    )
    return converted


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Every default, and the description with its lines as they are."""


class _Parser(HfArgumentParser):
    """HfArgumentParser whose errors are ConfigErrors (the caller decides how to end), and with dict fields as JSON."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for action in self._actions:
            if action.type is dict:
                action.type = json_mapping
        self._negative_number_matcher = re.compile(r"-\d*\.?\d+(e[+-]?\d+)?$", re.I)  # argparse's knows no 1e-3

    def add_argument(self, *names: Any, least: float | None = None, **how: Any) -> argparse.Action:
        """A flag; `least`, from a field's metadata, is for `check_least`."""
        return super().add_argument(*names, **how)

    def error(self, message: str) -> Any:
        raise ConfigError(message)
