"""Judges that run what the policy wrote: only in a sandbox that the user gives, never on the host.

hfpg ships no sandbox: a subprocess with a time limit is none. `Sandbox` is what one has to offer; a few lines join a
container, a micro-VM or a service to it (docs/rewards/rules.md).
"""

from __future__ import annotations

import ast
import json
import re
import secrets
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from hfpg.config import ConfigError, require
from hfpg.rewards.output import RewardError
from hfpg.rewards.rules import Rule, column_of, named, written
from hfpg.types import Text, text_of


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a program may use. The network and the host's files and environment are closed to it in any case."""

    seconds: float = 5.0
    memory_mb: int = 256
    output_bytes: int = 65536  # kept of stdout and of stderr, each


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a program ended. One that broke a limit was ended by the sandbox and has no exit code."""

    stdout: str = ""
    stderr: str = ""
    exit_code: int | None = None


@runtime_checkable
class Sandbox(Protocol):
    """Runs untrusted Python in isolation."""

    def run(self, code: str, stdin: str, limits: Limits) -> Result:
        """Run a program from a clean state.

        Whatever the program does is a `Result`. That the sandbox itself fails is an exception: it says nothing of
        the program, so it must not become a score.
        """


FENCE = re.compile(r"([ \t]*)(`{3,})([^`]*)")  # and whatever the info string says: ```python title="a.py"


def code_in(text: str) -> str:
    """The program in a completion: the last ``` block, or all of it where there is none.

    A block that the end of the text cuts is one; a fence with nothing behind it is none. A fence that is indented, as
    in a list, takes as much off its lines.
    """
    blocks: list[list[str]] = []
    ticks, indent = 0, 0  # of the fence of the open block; 0 ticks: none is open
    for line in text.replace("\r\n", "\n").splitlines(keepends=True):
        fence = FENCE.fullmatch(line)
        if fence is not None and not ticks:
            blocks.append([])
            indent, ticks = len(fence[1]), len(fence[2])
        elif fence is not None and len(fence[2]) >= ticks and not fence[3].strip():
            ticks = 0
        elif ticks:
            blocks[-1].append(line[min(indent, len(line) - len(line.lstrip(" \t"))) :])
    if ticks and not "".join(blocks[-1]).strip():
        blocks.pop()
    return "".join(blocks[-1]) if blocks else text


def code_tests(
    sandbox: Sandbox | None = None,
    column: str = "tests",
    *,
    limits: Limits | None = None,
    extract: Callable[[str], str] = code_in,
    name: str = "code_tests",
) -> Rule:
    """The share of its row's tests that the program in a completion passes; None where the row has no test.

    A test is a pair {"input": …, "output": …}: the program reads the input and must print the output (spaces at the
    ends of lines aside) and end with exit code 0; or a text of Python, such as assertions, that runs behind the
    program and must be reached and end without an exception. Such a text shares its process with the program, which
    may look for it: prefer pairs where the policy is strong. A pair of lists of one length is as many tests.

    Args:
        sandbox: where programs run. Without one the judge is refused: hfpg never runs them on the host.
        column: column of the data set with each row's list of tests (or one test).
        limits: of each run.
        extract: the program in a completion's text.
        name: what scores are logged under.
    Raises:
        ConfigError: no sandbox is given; later, of a test that is none, or is text and checks nothing.
    """
    require(
        sandbox is not None,
        f"{name} runs code that the policy wrote and has no sandbox; give sandbox=, an object with "
        "run(code, stdin, limits) that isolates it (hfpg never runs such code on the host)",
    )
    require(
        isinstance(sandbox, Sandbox),
        f"{name}: {type(sandbox).__name__} is no sandbox; it lacks run(code, stdin, limits) -> Result",
    )
    assert sandbox is not None
    allowed = limits or Limits()

    def run(code: str, stdin: str) -> Result:
        try:
            result = sandbox.run(code, stdin, allowed)
        except Exception as error:
            raise RewardError(f"{name}: the sandbox failed: {type(error).__name__}: {error}") from error
        if not isinstance(result, Result):
            raise RewardError(f"{name}: the sandbox returned a {type(result).__name__}; it must return a Result")
        return result

    def passes(program: str, test: Any) -> bool:
        if isinstance(test, str):
            reached = secrets.token_hex(16)  # a program that ends early with code 0 has passed nothing
            # exec: indentation or a quote that the program leaves open must not take the test in
            result = run(f"{program}\n\nexec({test!r})\n\nprint('\\n{reached}')\n", "")
            return result.exit_code == 0 and _lines(result.stdout)[-1:] == [reached]
        result = run(program, "" if test["input"] is None else str(test["input"]))  # absent, where others have one
        return result.exit_code == 0 and _lines(result.stdout) in [_lines(text) for text in written(test["output"])]

    def rule(completions: list[Text], **columns: Any) -> list[float | None]:
        scores: list[float | None] = []
        for completion, tests in zip(completions, column_of(column, columns, name), strict=True):
            tests = _tests(tests, name)
            program = extract(text_of(completion))
            scores.append(sum(passes(program, test) for test in tests) / len(tests) if tests else None)
        return scores

    return named(rule, name)


def _tests(cell: Any, name: str) -> list[Any]:
    """The tests of a row: mappings of one input and one output, and texts that check something."""
    found: list[Any] = []
    for test in cell if isinstance(cell, Sequence) and not isinstance(cell, str) else [cell]:
        if isinstance(test, str):
            found += [_asserting(test, name)] if test.strip() else []
        elif test:
            found += _pairs(test, name)
    return found


def _pairs(test: Any, name: str) -> list[Mapping[str, Any]]:
    if not (isinstance(test, Mapping) and {"input", "output"} <= set(test)):
        raise ConfigError(f'{name}: {test!r:.60} is no test; give {{"input": …, "output": …}} or Python as text')
    given, wanted = test["input"], test["output"]
    if isinstance(given, list) and isinstance(wanted, list) and len(given) == len(wanted):  # as `datasets` stores them
        return [pair for one, other in zip(given, wanted, strict=True) for pair in _pairs(_pair(one, other), name)]
    if wanted is None:
        raise ConfigError(f"{name}: {test!r:.60} has no output; a test says what must be printed")
    if isinstance(given, list | Mapping) or isinstance(wanted, Mapping):
        raise ConfigError(f"{name}: {test!r:.60}: input and output are what is read and printed; write both as text")
    return [test]


def _pair(given: Any, wanted: Any) -> dict[str, Any]:
    return {"input": given, "output": wanted}


def _asserting(test: str, name: str) -> str:
    """A text test without common indentation. ConfigError for one that every program would pass."""
    code = textwrap.dedent(test)
    try:
        decoded = json.loads(test)
    except ValueError:
        decoded = None
    if isinstance(decoded, list | dict):
        raise ConfigError(f"{name}: {test!r:.60} is JSON, not Python; decode the column with json.loads")
    try:
        statements = ast.parse(code).body
    except (SyntaxError, ValueError):
        return code  # of another Python than this one, it may be: the sandbox says
    if all(isinstance(it, ast.Expr) and isinstance(it.value, ast.Constant) for it in statements):
        raise ConfigError(f"{name}: {test!r:.60} checks nothing; write a test such as 'assert f(2) == 4'")
    return code


def _lines(text: str) -> list[str]:
    """Lines without spaces at their ends and without empty lines at the end of the text."""
    return [line.rstrip() for line in text.rstrip().splitlines()]
