"""The reward protocol: several functions, sync or async, weighted into one score per completion.

A reward function is called with keywords, `f(prompts=, completions=, completion_ids=, **dataset_columns)` plus
`trainer_state`, `log_extra(column, values)` and `log_metric(name, value)`; one without `**kwargs` gets only the names
that it declares. It returns one float per completion, or None for "cannot judge". TRL reward functions work unchanged.
In place of a float there may be a list of them: one per token of the completion, or one per step (`step_marker`).
"""

from __future__ import annotations

import asyncio
import copy
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from hfpg.config import ConfigError, require
from hfpg.rewards.learned import ClassifierReward
from hfpg.types import Scores, Text


LARGEST_SCORE = torch.finfo(torch.float32).max


class RewardError(RuntimeError):
    """A reward function failed or returned something that is no score."""


@dataclass(frozen=True)
class RewardFunction:
    """A named reward function and the keywords that it takes (None: all)."""

    name: str
    call: Callable[..., Any]
    takes: frozenset[str] | None
    is_async: bool

    @staticmethod
    def of(spec: Any, tokenizer: Any = None) -> RewardFunction:
        """From a callable, "file.py:name", "package.module:name", a classifier's folder or Hub id, or a classifier.

        Raises:
            ConfigError: what is named does not exist, or is neither callable nor a sequence classifier.
        """
        if isinstance(spec, str):
            spec = import_function(spec) if ":" in spec else ClassifierReward(spec, tokenizer)
        elif isinstance(spec, torch.nn.Module) and hasattr(spec, "config"):
            spec = ClassifierReward(spec, tokenizer)
        require(
            callable(spec), f"the reward {spec!r:.60} is not callable; give a function, 'file.py:name' or a classifier"
        )
        name = str(getattr(spec, "name", None) or getattr(spec, "__name__", type(spec).__name__))
        parameters = inspect.signature(spec).parameters.values()
        everything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        takes = None if everything else frozenset(p.name for p in parameters)
        slow = any(map(inspect.iscoroutinefunction, (spec, type(spec).__call__)))
        return RewardFunction(name, spec, takes, slow)

    def arguments(self, everything: dict[str, Any]) -> dict[str, Any]:
        """Copies of the arguments that this function takes: what it does to them stays with it."""
        taken = {k: v for k, v in everything.items() if self.takes is None or k in self.takes}
        return {k: copy.deepcopy(v) if isinstance(v, list) else v for k, v in taken.items()}


def import_function(spec: str, what: str = "reward") -> Any:
    """The object that "file.py:name" or "package.module:name" names; `what` it is, for the error messages."""
    where, _, name = spec.rpartition(":")
    require(bool(where and name), f"{what} {spec!r}: use 'file.py:name' or 'package.module:name'")
    if where.endswith(".py"):
        path = Path(where)
        require(path.is_file(), f"{what} {spec!r}: there is no file {where}")
        module_spec = importlib.util.spec_from_file_location(f"hfpg_{what}_{path.stem}", path)
        assert module_spec is not None and module_spec.loader is not None  # a .py file always has a loader
        module = importlib.util.module_from_spec(module_spec)
        sys.modules[module_spec.name] = module
        try:
            module_spec.loader.exec_module(module)
        except Exception as error:
            raise ConfigError(f"{what} {spec!r}: {where} fails: {type(error).__name__}: {error}") from error
    else:
        try:
            module = importlib.import_module(where)
        except ModuleNotFoundError as error:
            raise ConfigError(f"{what} {spec!r}: {error}; use 'file.py:name' or 'package.module:name'") from None
    names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
    require(hasattr(module, name), f"{what} {spec!r}: {where} has no {name!r}; it has {names[:8]}")
    return getattr(module, name)


@dataclass
class Log:
    """What reward functions say beside the score, during one call of the judge."""

    count: int | None = None  # completions that are judged
    errors: list[str] = field(default_factory=list)  # one for every completion that a failure has dropped
    extra: dict[str, list] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """One value per completion, for the completions file."""
        values = list(values)
        if self.count is not None and len(values) != self.count:
            raise RewardError(
                f"log_extra({column!r}) got {len(values)} values for {self.count} completions; give one each"
            )
        self.extra[column] = values

    def log_metric(self, name: str, value: float) -> None:
        """One number, averaged over calls and ranks, for the metrics."""
        self.metrics.setdefault(name, []).append(float(value))


class Judge:
    """All reward functions of a run and their weights.

    The score of a completion is Σ w_f s_f over the functions that did not abstain from it; a completion that every
    function abstained from has score 0 and row weight 0, so it enters no mean and no gradient.

    A failed score is never a number: with `on_error="raise"` an exception, NaN, inf or a wrong count ends the run;
    with "drop" the completions concerned get row weight 0 and are counted. `step_ends(completion_ids)`: the place of
    the last token of each step, for functions that score steps.
    """

    def __init__(
        self,
        reward_funcs: Any,
        weights: Sequence[float] | None = None,
        tokenizers: Any = None,
        device: torch.device | str = "cpu",
        on_error: Literal["raise", "drop"] = "raise",
        step_ends: Callable[[list[int]], list[int]] | None = None,
    ):
        self.on_error, self.step_ends = on_error, step_ends
        specs = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
        require(len(specs) > 0, "reward_funcs is empty; give at least one function")
        own = list(tokenizers) if isinstance(tokenizers, list | tuple) else [tokenizers] * len(specs)
        require(
            len(own) == len(specs),
            f"reward_processing_classes has {len(own)} entries for {len(specs)} rewards; give one each (or None)",
        )
        self.functions = [RewardFunction.of(spec, tok) for spec, tok in zip(specs, own, strict=True)]
        self.functions = [
            replace(function, name=name)
            for function, name in zip(self.functions, numbered([f.name for f in self.functions]), strict=True)
        ]
        self.weights = [1.0] * len(specs) if weights is None else [float(w) for w in weights]
        require(
            len(self.weights) == len(specs),
            f"reward_weights has {len(self.weights)} entries for {len(specs)} reward functions; give one each",
        )
        require(any(self.weights), f"reward_weights={self.weights} leaves no function that scores; use 1.0 for one")
        for function in self.functions:
            if hasattr(function.call, "to") and not getattr(function.call, "placed", False):  # it has a model
                function.call.to(device)

    @property
    def names(self) -> list[str]:
        """The functions' names, in order; two of the same name are numbered."""
        return [f.name for f in self.functions]

    def dry_call(self, prompts: list[Text], completion_ids: list[list[int]], columns: dict[str, list]) -> None:
        """Call every function on a few real rows with made-up completions, before the policy is loaded.

        Raises:
            ConfigError: a signature that does not fit the columns, an exception, or a result that is no score.
        """
        words = ["good", "a fine answer"]
        completions = [
            words[i % 2] if isinstance(p, str) else [{"role": "assistant", "content": words[i % 2]}]
            for i, p in enumerate(prompts)
        ]
        given = dict(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        given.update(trainer_state=None, log_extra=Log().log_extra, log_metric=Log().log_metric)
        for function in self.functions:
            try:
                inspect.signature(function.call).bind(**function.arguments(given))
            except TypeError as error:
                raise ConfigError(
                    f"reward function {function.name!r} does not fit: {error}; it is called with the keywords "
                    f"{sorted(given)} (the data set's columns are {sorted(columns)})"
                ) from None
        try:
            log = Log()
            self(prompts, completions, completion_ids, columns, log=log)
            if log.errors:  # what is dropped in a run is refused before it
                raise RewardError(log.errors[0])
        except RewardError as error:
            raise ConfigError(f"{error} (in a dry call on {len(prompts)} rows, before training)") from error

    def __call__(
        self,
        prompts: list[Text],
        completions: list[Text],
        completion_ids: list[list[int]],
        columns: dict[str, list],
        trainer_state: Any = None,
        log: Log | None = None,
    ) -> Scores:
        """Scores of B completions.

        Raises:
            RewardError: an exception in a function, a wrong number of scores, NaN, inf, or no number.
        """
        log = Log() if log is None else log
        log.count = len(completions)
        everything = dict(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        everything.update(trainer_state=trainer_state, log_extra=log.log_extra, log_metric=log.log_metric)
        outputs = _run_all(self.functions, everything)
        scores, weights = torch.zeros(len(prompts)), torch.zeros(len(prompts))
        per_token = torch.zeros(len(prompts), max(map(len, completion_ids), default=0))
        failed: dict[int, str] = {}
        table: dict[str, list[float | None]] = {}
        for function, output, weight in zip(self.functions, outputs, self.weights, strict=True):
            said = self._read(function.name, output, completions, completion_ids)
            table[function.name] = [s if isinstance(s, float) else None for s in said.sums]
            for i, value in enumerate(said.sums):
                if weight == 0 or value is None:  # weight 0 watches: it neither scores nor vouches for a row
                    continue
                if isinstance(value, str):
                    failed.setdefault(i, value)
                    continue
                scores[i] += weight * value
                weights[i] = 1.0
                for place, part in said.parts[i]:
                    per_token[i, place] += weight * part
        for i in failed:
            scores[i] = weights[i] = per_token[i] = 0.0
        log.errors.extend(failed.values())
        return Scores(scores=scores, weights=weights, by_function=table, extra=log.extra, token_scores=per_token)

    def _read(self, name: str, output: Any, completions: list[Text], completion_ids: list[list[int]]) -> Said:
        """One function's output, checked; with on_error="drop" a failure stands as text in place of a score."""
        try:
            if isinstance(output, Exception):
                raise output
            said = read(name, output, completions, completion_ids, self.step_ends)
        except RewardError as error:
            if self.on_error == "raise":
                raise
            return Said([str(error)] * len(completions), [[]] * len(completions))
        wrong = [text for text in said.sums if isinstance(text, str)]
        if wrong and self.on_error == "raise":
            raise RewardError(wrong[0])
        return said


class Heard(NamedTuple):
    """What one rank's judge said in one call beside the scores."""

    rows: int
    by_function: dict[str, list[float | None]]
    extra: dict[str, list]
    metrics: dict[str, list[float]]
    errors: list[str]


def merge_said(parts: Sequence[Heard]) -> dict[str, Any]:
    """What the judge said in several calls or on several ranks, in order.

    `by_function` and `extra` have one value per row (None where a call was silent), `metrics` the mean of all calls;
    `errors` one text for each of the completions that failures dropped, out of `rows`.
    """

    def columns(name: str) -> dict[str, list]:
        tables = [getattr(part, name) for part in parts]
        silent = [[None] * part.rows for part in parts]
        names = dict.fromkeys(n for table in tables for n in table)
        return {n: [v for t, none in zip(tables, silent, strict=True) for v in t.get(n, none)] for n in names}

    names = dict.fromkeys(name for part in parts for name in part.metrics)
    logged = {n: [v for part in parts for v in part.metrics.get(n, [])] for n in names}
    means = {n: sum(values) / len(values) for n, values in logged.items()}
    errors = [text for part in parts for text in part.errors]
    rows = sum(part.rows for part in parts)
    return dict(by_function=columns("by_function"), extra=columns("extra"), metrics=means, errors=errors, rows=rows)


def merge_rounds(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `merge_said` gave in several rounds of one step, as one."""
    parts = []
    for said in rounds:
        logged = {name: [value] for name, value in said["metrics"].items()}
        parts.append(Heard(said["rows"], said["by_function"], said["extra"], logged, said["errors"]))
    return merge_said(parts)


def _run_all(functions: Sequence[RewardFunction], everything: dict[str, Any]) -> list[Any]:
    """Every function's result, or the RewardError that it ended in, in order; the async ones run concurrently."""

    def named(function: RewardFunction, error: Exception) -> RewardError:
        if isinstance(error, RewardError):
            return error  # it says already what is wrong
        if isinstance(error, ConfigError):
            return RewardError(f"reward function {function.name!r}: {error}")
        made = RewardError(f"reward function {function.name!r} raised {type(error).__name__}: {error}")
        made.__cause__ = error
        return made

    async def one(function: RewardFunction) -> Any:
        try:
            return await function.call(**function.arguments(everything))
        except Exception as error:
            return named(function, error)

    async def concurrently(waiting: Sequence[RewardFunction]) -> list[Any]:
        return await asyncio.gather(*map(one, waiting))

    slow = [f for f in functions if f.is_async]
    # a thread of its own: a notebook has an event loop running already in this one
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(lambda: asyncio.run(concurrently(slow))) if slow else None
        results: dict[str, Any] = {}
        for function in functions:
            if not function.is_async:
                try:
                    results[function.name] = function.call(**function.arguments(everything))
                except Exception as error:
                    results[function.name] = named(function, error)
        if future is not None:
            results.update(zip((f.name for f in slow), future.result(), strict=True))
    return [results[f.name] for f in functions]


def numbered(names: Sequence[str]) -> list[str]:
    """The names, with a number behind those that stand more than once; all different."""
    found: list[str] = []
    for place, name in enumerate(names):
        tries = [name] if names.count(name) == 1 else []
        tries += [f"{name}_{place + i}" for i in range(2 * len(names))]
        found.append(next(t for t in tries if t not in found and (t == name or t not in names)))
    return found


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
    if isinstance(output, torch.Tensor) or hasattr(output, "tolist"):
        output = output.tolist()
    if not isinstance(output, list | tuple):
        raise RewardError(
            f"reward function {name!r} returned {output!r:.60}; it must return a list of {len(completions)} floats, "
            "one per completion (None: cannot judge)"
        )
    if len(output) != len(completions):
        raise RewardError(
            f"reward function {name!r} returned {len(output)} scores for {len(completions)} completions; it must "
            "return one per completion (None: cannot judge)"
        )
    said = Said([], [])
    for i, value in enumerate(output):
        where = f"for sample {i} ({str(completions[i])[:80]!r})"
        total, parts = _one(name, value, where, list(completion_ids[i]), step_ends)
        said.sums.append(total)
        said.parts.append(parts)
    return said


def _one(
    name: str, value: Any, where: str, tokens: list[int], step_ends: Callable[[list[int]], list[int]] | None
) -> tuple[float | None | str, list[tuple[int, float]]]:
    """The sum and the parts of one entry, or what is wrong with it."""
    try:
        single = getattr(value, "size", None) == 1 or getattr(value, "numel", int)() == 1
        plain = value.item() if single else value.tolist() if hasattr(value, "tolist") else value
    except (RuntimeError, ValueError):  # a tensor that cannot be read
        plain = value
    if plain is None:
        return None, []
    if not isinstance(plain, list | tuple):
        if _is_score(plain):
            return float(plain), []
        return (
            f"reward function {name!r} returned {plain!r} {where}; a score is a finite number, or None for "
            "'cannot judge'",
            [],
        )
    wrong = [part for part in plain if not _is_score(part)]
    if wrong:
        return f"reward function {name!r} returned a list with {wrong[0]!r} {where}; each entry is a finite number", []
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
