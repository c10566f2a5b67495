"""The reward protocol: several functions, sync or async, weighted into one score per completion.

A reward function is called with keywords, `f(prompts=, completions=, completion_ids=, **dataset_columns)` plus
`trainer_state`, `log_extra(column, values)` and `log_metric(name, value)`; one without `**kwargs` gets only the names
that it declares. It returns one float per completion, or None for "cannot judge". TRL reward functions work unchanged.
In place of a float there may be a list of them: one per token of the completion, or one per step (`step_marker`).
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import importlib
import importlib.util
import inspect
import logging
import math
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from transformers import TrainerState

from hfpg.config import ConfigError, require
from hfpg.rewards.learned import ClassifierReward
from hfpg.rewards.output import RewardError, Said, beginning, one_line, read, shown
from hfpg.types import Scores, Text


logger = logging.getLogger(__name__)

V = TypeVar("V")

ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
RECORDED = ("step", "prompt", "completion", "score")  # columns of completions.jsonl that are hfpg's own


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
            require(not spec.endswith(".py"), f"reward {spec!r}: which function of it? Use '{spec}:name'")
            spec = import_function(spec) if ":" in spec else ClassifierReward(spec, tokenizer)
        elif isinstance(spec, Path) or (isinstance(spec, torch.nn.Module) and hasattr(spec, "config")):
            spec = ClassifierReward(spec, tokenizer)
        require(
            callable(spec),
            f"the reward {shown(spec)} is not callable; give a function, 'file.py:name' or a classifier",
        )
        name = str(getattr(spec, "name", None) or getattr(spec, "__name__", type(spec).__name__))
        try:
            parameters = inspect.signature(spec).parameters.values()
        except (TypeError, ValueError):  # some of Python's own functions do not say what they take
            raise ConfigError(
                f"the reward {name!r} does not say which arguments it takes; wrap it, as in "
                f"`def judge(completions, **columns): return [{name}(c) for c in completions]`"
            ) from None
        everything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        takes = None if everything else frozenset(p.name for p in parameters)
        slow = any(map(inspect.iscoroutinefunction, (spec, type(spec).__call__)))
        return RewardFunction(name, spec, takes, slow)

    def arguments(self, everything: dict[str, Any]) -> dict[str, Any]:
        """Copies of the arguments that this function takes: what it does to them stays with it."""
        return {k: _copied(v) for k, v in everything.items() if self.takes is None or k in self.takes}


def _copied(value: Any) -> Any:
    """A copy of an argument. Of the trainer's state, the history's rows are copied, not what stands in them."""
    if isinstance(value, TrainerState):
        state = copy.copy(value)
        state.log_history = [dict(row) for row in value.log_history]
        return state
    return copy.deepcopy(value) if isinstance(value, list) else value


def import_function(spec: str, what: str = "reward") -> Any:
    """The object that "file.py:name" or "package.module:name" names; `what` it is, for the error messages."""
    where, _, name = spec.rpartition(":")
    require(bool(where and name), f"{what} {spec!r}: use 'file.py:name' or 'package.module:name'")
    file = Path(where) if where.endswith(".py") else None
    require(file is None or file.is_file(), f"{what} {spec!r}: there is no file {where}")
    try:
        module = importlib.import_module(where) if file is None else _import_file(file, what)
    except (Exception, SystemExit) as error:  # a script that ends the program when it is imported
        if isinstance(error, ModuleNotFoundError) and f"{where}.".startswith(f"{error.name}."):
            raise ConfigError(f"{what} {spec!r}: {error}; use 'file.py:name' or 'package.module:name'") from None
        told = f"{type(error).__name__}: {one_line(str(error))}{_place(error)}"
        raise ConfigError(f"{what} {spec!r}: {where} fails: {told}") from error
    names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
    require(hasattr(module, name), f"{what} {spec!r}: {where} has no {name!r}; it has {names[:8]}")
    return getattr(module, name)


def _import_file(path: Path, what: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"hfpg_{what}_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # a .py file always has a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _place(error: BaseException | None) -> str:
    """Where in the user's own code an exception came from, as "; judge.py, line 12"; nothing where it did not."""
    if error is None:
        return ""
    ours = (str(Path(__file__).parents[1]), "<frozen importlib", importlib.__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    theirs = [f for f in frames if "site-packages" not in f.filename]
    return f"; {Path(theirs[0].filename).name}, line {theirs[0].lineno}" if theirs else ""


@dataclass
class Log:
    """What reward functions say beside the score, during one call of the judge."""

    count: int | None = None  # completions that are judged
    errors: list[str] = field(default_factory=list)  # one for every completion that a failure has dropped
    extra: dict[str, list] = field(default_factory=dict)
    metrics: dict[str, list[float]] = field(default_factory=dict)

    def log_extra(self, column: str, values: Sequence[Any]) -> None:
        """One value per completion, for the completions file; a column of its own name there becomes `extra/NAME`."""
        values = list(values)
        if self.count is not None and len(values) != self.count:
            raise RewardError(
                f"log_extra({column!r}) got {len(values)} values for {self.count} completions; give one each"
            )
        self.extra[f"extra/{column}" if column in RECORDED else str(column)] = values

    def log_metric(self, name: str, value: float) -> None:
        """One number, averaged over calls and ranks, for the metrics. What is not finite is left out, and said once.

        A watched number that a call lacks (the accuracy of no judged row) must not end a run, nor spoil the mean.
        """
        number, values = float(value), self.metrics.setdefault(str(name), [])
        if math.isfinite(number):
            values.append(number)
        else:
            _say_left_out(str(name), str(number))


@functools.cache
def _say_left_out(name: str, value: str) -> None:
    """Once for each name and value."""
    logger.warning(
        "log_metric(%r) got %s, which is no finite number; such values are left out of its mean", one_line(name), value
    )


class DryCall(NamedTuple):
    """What a call on a few rows has shown."""

    logged: list[str]  # names that functions gave to log_metric
    unsteady: list[str]  # functions that scored the same completions differently when asked again


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
        finite = all(map(math.isfinite, self.weights))
        require(finite, f"reward_weights={self.weights}: a weight is a finite number, such as 1.0")
        require(any(self.weights), f"reward_weights={self.weights} leaves no function that scores; use 1.0 for one")
        self._told: set[str] = set()  # functions whose traceback was shown
        for function in self.functions:
            if hasattr(function.call, "to") and not getattr(function.call, "placed", False):  # it has a model
                function.call.to(device)

    @property
    def names(self) -> list[str]:
        """The functions' names, in order; two of the same name are numbered."""
        return [f.name for f in self.functions]

    def dry_call(
        self,
        prompts: list[Text],
        completion_ids: list[list[int]],
        columns: dict[str, list],
        dataset: str = "data set",
    ) -> DryCall:
        """Call every function twice on a few real rows with made-up completions, before the policy is loaded.

        Raises:
            ConfigError: a signature that does not fit the columns, an exception, or a result that is no score,
                whatever `on_error` says.
        """
        words = ["good", "a fine answer"]
        completions: list[Text] = [
            words[i % 2] if isinstance(p, str) else [{"role": "assistant", "content": words[i % 2]}]
            for i, p in enumerate(prompts)
        ]
        self._check_signatures(sorted(columns), dataset)
        log, on_error = Log(), self.on_error
        try:
            self.on_error = "raise"
            first, again = (self(prompts, completions, completion_ids, columns, log=log) for _ in range(2))
        except RewardError as error:
            at = _place(error.__cause__)  # where a script says it in one sentence, no traceback does
            raise ConfigError(f"{error} (in a dry call on {len(prompts)} rows, before training{at})") from error
        finally:
            self.on_error = on_error
        unsteady = [n for n in self.names if not alike(first.by_function[n], again.by_function[n])]
        return DryCall(list(log.metrics), unsteady)

    def _check_signatures(self, columns: list[str], dataset: str) -> None:
        """Every function can be called with what it will get."""
        given = sorted({*ARGUMENTS, *columns})
        for function in self.functions:
            taken = dict.fromkeys(n for n in given if function.takes is None or n in function.takes)
            try:
                inspect.signature(function.call).bind(**taken)
            except TypeError as error:
                raise ConfigError(
                    f"reward function {function.name!r} does not fit: {error}; it is called with the keywords {given} "
                    f"(the {dataset}'s columns are {columns})"
                ) from None

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
        state = TrainerState(max_steps=1) if trainer_state is None else trainer_state
        own = (prompts, completions, completion_ids, state, log.log_extra, log.log_metric)
        outputs = _run_all(self.functions, columns | dict(zip(ARGUMENTS, own, strict=True)))
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
        for i in (~(scores.isfinite() & per_token.isfinite().all(1))).nonzero().flatten().tolist():
            told = f"the weighted scores of sample {i} ({beginning(completions[i])}) are too large to add up"
            if self.on_error == "raise":
                raise RewardError(f"{told}; use smaller reward_weights")
            failed.setdefault(i, told)
        for i in failed:
            scores[i] = weights[i] = per_token[i] = 0.0
        log.errors.extend(failed.values())
        return Scores(scores=scores, weights=weights, by_function=table, extra=log.extra, token_scores=per_token)

    def _read(self, name: str, output: Any, completions: list[Text], completion_ids: list[list[int]]) -> Said:
        """One function's output, checked; with on_error="drop" a failure stands as text in place of a score."""
        try:
            if isinstance(output, RewardError):
                raise output
            said = read(name, output, completions, completion_ids, self.step_ends)
        except RewardError as error:
            if self.on_error == "raise":
                raise
            if error.__cause__ is not None and name not in self._told:
                self._told.add(name)
                logger.warning("%s; its completions are dropped", error, exc_info=error.__cause__)
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

    `by_function` and `extra` have one value per row (None where a call was silent); `logged` all values of each metric
    and `metrics` their mean; `errors` one text for each of the completions that failures dropped, out of `rows`.
    """

    def columns(name: str) -> dict[str, list]:
        tables = [getattr(part, name) for part in parts]
        silent = [[None] * part.rows for part in parts]
        names = dict.fromkeys(n for table in tables for n in table)
        return {n: [v for t, none in zip(tables, silent, strict=True) for v in t.get(n, none)] for n in names}

    names = dict.fromkeys(name for part in parts for name in part.metrics)
    logged = {n: [v for part in parts for v in part.metrics.get(n, [])] for n in names}
    means = {n: sum(values) / len(values) for n, values in logged.items() if values}
    errors = [text for part in parts for text in part.errors]
    rows = sum(part.rows for part in parts)
    tables = dict(by_function=columns("by_function"), extra=columns("extra"))
    return tables | dict(logged=logged, metrics=means, errors=errors, rows=rows)


def merge_rounds(rounds: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `merge_said` gave in several rounds of one step, as one."""
    return merge_said([Heard(s["rows"], s["by_function"], s["extra"], s["logged"], s["errors"]) for s in rounds])


def beside(own: Collection[str], logged: Mapping[str, V]) -> dict[str, V]:
    """What log_metric got, by the names of the metrics: one that hfpg uses itself becomes `logged/NAME`."""
    return {f"logged/{name}" if name in own else name: value for name, value in logged.items()}


class _Beside:
    """A coroutine that runs in a thread of its own: a notebook has an event loop running already in this one."""

    GRACE = 5.0  # seconds that what is cancelled has to close its connections

    def __init__(self, work: Coroutine[Any, Any, Any]):
        self.loop, self.future = asyncio.new_event_loop(), Future[Any]()
        # one that is stuck and cannot be cancelled must not keep Python from ending
        self.thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self.thread.start()

    def _run(self, work: Coroutine[Any, Any, Any]) -> None:
        try:
            with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
                self.future.set_result(runner.run(work))
        except BaseException as error:
            self.future.set_exception(error)

    def cancel(self) -> None:
        """End it where it waits."""

        def every() -> None:
            for task in asyncio.all_tasks(self.loop):
                task.cancel()

        with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended by itself
            self.loop.call_soon_threadsafe(every)
        self.thread.join(self.GRACE)


def _named(function: RewardFunction, error: Exception | SystemExit) -> RewardError:
    """What a function raised, with its name."""
    if isinstance(error, RewardError):
        return error  # it says already what is wrong
    if isinstance(error, ConfigError):
        return RewardError(f"reward function {function.name!r}: {error}")
    made = RewardError(f"reward function {function.name!r} raised {type(error).__name__}: {one_line(str(error))}")
    made.__cause__ = error
    return made


def _run(function: RewardFunction, everything: dict[str, Any]) -> Any:
    try:
        return function.call(**function.arguments(everything))
    except (Exception, SystemExit) as error:  # sys.exit in somebody's function would end the run unexplained
        if getattr(error, "code", None) == 128 + signal.SIGTERM:  # not the function's own: the run ends
            raise
        return _named(function, error)


async def _run_async(function: RewardFunction, everything: dict[str, Any]) -> Any:
    try:
        return await function.call(**function.arguments(everything))
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():  # it is the run that ends
            raise
        return _named(function, RuntimeError(f"a task that it awaits was cancelled {error}".strip()))
    except (Exception, SystemExit) as error:
        return _named(function, error)


def _run_all(functions: Sequence[RewardFunction], everything: dict[str, Any]) -> list[Any]:
    """Every function's result, or the RewardError that it ended in, in order; the async ones run concurrently."""

    async def concurrently(waiting: Sequence[RewardFunction]) -> list[Any]:
        return await asyncio.gather(*(_run_async(function, everything) for function in waiting))

    slow = [f for f in functions if f.is_async]
    beside = _Beside(concurrently(slow)) if slow else None
    try:
        results = {f.name: _run(f, everything) for f in functions if not f.is_async}
        if beside is not None:
            results.update(zip((f.name for f in slow), beside.future.result(), strict=True))
    except BaseException:  # Ctrl-C does not wait for a judge that may take minutes
        if beside is not None:
            beside.cancel()
        raise
    return [results[f.name] for f in functions]


def numbered(names: Sequence[str]) -> list[str]:
    """The names, with a number behind those that stand more than once; all different."""
    found: list[str] = []
    for place, name in enumerate(names):
        tries = [name] if names.count(name) == 1 else []
        tries += [f"{name}_{place + i}" for i in range(2 * len(names))]
        found.append(next(t for t in tries if t not in found and (t == name or t not in names)))
    return found


def alike(a: Sequence[float | None], b: Sequence[float | None]) -> bool:
    """The same scores up to rounding, and the same abstentions."""
    if [x is None for x in a] != [y is None for y in b]:
        return False
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return all(math.isclose(x, y, rel_tol=1e-5, abs_tol=1e-6) for x, y in pairs)
