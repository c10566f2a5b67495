"""Judges that run code: only in the sandbox they are given. It is a fake here, or runs programs of these tests."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from hfpg.config import ConfigError
from hfpg.rewards import Judge, Limits, Result, RewardError, Sandbox, code_tests
from hfpg.rewards.sandbox import code_in


class Fake:
    """Answers by a function of (code, stdin) and remembers what it was asked."""

    def __init__(self, answer: Callable[[str, str], Any]):
        self.answer, self.asked = answer, []

    def run(self, code: str, stdin: str, limits: Limits) -> Result:
        self.asked.append((code, stdin, limits))
        return self.answer(code, stdin)


def doubling(code: str, stdin: str) -> Result:
    """As if code that says "double" doubled what it reads."""
    return Result(stdout=f"{int(stdin) * 2} \n\n" if "double" in code else "?", exit_code=0)


PAIRS = [{"input": "2", "output": "4"}, {"input": "3\n", "output": "6\n"}, {"input": 4, "output": 9}]


def test_without_a_sandbox_it_is_refused_by_name():
    for given in ({}, {"sandbox": None}):
        with pytest.raises(ConfigError, match=r"code_tests runs code .* and has no sandbox; give sandbox=.* the host"):
            code_tests(**given)
    with pytest.raises(ConfigError, match=r"python_tests: int is no sandbox; it lacks run\(code, stdin, limits\)"):
        code_tests(3, name="python_tests")  # type: ignore[arg-type]


def test_nothing_ever_runs_on_the_host(monkeypatch: pytest.MonkeyPatch):
    for module, function in ((subprocess, "Popen"), (os, "system"), (os, "fork"), (os, "posix_spawn")):
        monkeypatch.setattr(module, function, lambda *a, **k: pytest.fail("ran on the host"))
    for name in ("exec", "eval", "compile"):
        monkeypatch.setattr("builtins." + name, lambda *a, **k: pytest.fail("ran on the host"))
    broken = Fake(lambda code, stdin: 1 / 0)
    for call in (lambda: code_tests(), lambda: code_tests(broken)(completions=["x"], tests=[PAIRS])):
        with pytest.raises((ConfigError, RewardError)):
            call()
    assert len(broken.asked) == 1


def test_the_score_is_the_share_of_tests_passed():
    fake = Fake(doubling)
    assert isinstance(fake, Sandbox)
    limits = Limits(seconds=1)
    rule = code_tests(fake, limits=limits)
    said = "Here:\n```python\nx = 1\n```\nor better\n```py\nprint(double())\n```\nDone."
    found = rule(completions=[said, "no", "double", "double"], tests=[PAIRS, PAIRS, PAIRS[0], PAIRS[2:]], prompts=[])
    assert found == [2 / 3, 0, 1, 0]
    assert fake.asked[:3] == [("print(double())\n", stdin, limits) for stdin in ("2", "3\n", "4")]
    assert rule(completions=[[{"role": "assistant", "content": said}]], tests=[PAIRS]) == [2 / 3]


def test_rows_without_tests_are_not_judged():
    fake = Fake(doubling)
    assert code_tests(fake)(completions=["a"] * 4, tests=[None, [], "", [None]]) == [None] * 4 and not fake.asked
    with pytest.raises(ConfigError, match="code_tests reads the column 'cases', which the data set lacks"):
        code_tests(fake, "cases")(completions=["a"], tests=[PAIRS])


@pytest.mark.parametrize(
    "result", [Result(stdout="4", exit_code=1), Result(stdout="4", exit_code=None), Result(stdout="5", exit_code=0)]
)
def test_a_program_that_fails_or_breaks_a_limit_fails_its_test(result: Result):
    assert code_tests(Fake(lambda code, stdin: result))(completions=["x"], tests=[PAIRS[:1]]) == [0]


def test_assertions_must_be_reached():
    def last_print(code: str, stdin: str) -> Result:
        """As if the program ran to its end, unless it says exit."""
        assert code.startswith(("def f(): exit\n\nexec('assert f()')", "def f(): 1\n\nexec('assert f()')"))
        token = code.rsplit("\\n", 1)[1].removesuffix("')\n")
        return Result(stdout="noise" if "exit" in code else f"noise\n{token}\n", exit_code=0)

    fake = Fake(last_print)
    rule = code_tests(fake)
    assert rule(completions=["def f(): 1", "def f(): exit"], tests=["assert f()", ["assert f()"]]) == [1, 0]
    first, second = (code.rsplit("\\n", 1)[1] for code, _, _ in fake.asked)
    assert first != second


def test_a_sandbox_that_fails_is_no_score():
    def down(code: str, stdin: str) -> Result:
        raise ConnectionError("no daemon")

    wrong = lambda code, stdin: "4"  # noqa: E731
    for answer, said in ((down, "the sandbox failed: ConnectionError: no daemon"), (wrong, "returned a str")):
        with pytest.raises(RewardError, match=f"code_tests: .*{said}"):
            code_tests(Fake(answer))(completions=["x"], tests=[PAIRS])
        with pytest.raises(RewardError, match=said):
            Judge(code_tests(Fake(answer)))(["p"], ["x"], [[1]], {"tests": [PAIRS]})


def test_what_is_no_test_is_named():
    for test in (5, {"input": "2"}):
        with pytest.raises(ConfigError, match="is no test; give"):
            code_tests(Fake(doubling))(completions=["x"], tests=[[test]])


def in_python(code: str, stdin: str) -> Result:
    """As a sandbox of the user's would; the programs are those of these tests."""
    done = subprocess.run([sys.executable, "-I", "-c", code], input=stdin, capture_output=True, text=True, timeout=30)
    return Result(stdout=done.stdout, exit_code=done.returncode)


SQUARE = "def sq(x):\n    return x * x\n\nif __name__ == '__main__' and (line := input('')): print(sq(int(line)))"
TESTED = {
    "right": ("def sq(x):\n    return x * x", "assert sq(2) == 4", 1),
    "wrong": ("def sq(x):\n    pass", "assert sq(2) == 4", 0),
    "indented test": ("def sq(x):\n    pass", "    assert sq(2) == 4", 0),
    "indented test, right": ("def sq(x):\n    return x * x", "    y = sq(2)\n    assert y == 4", 1),
    "open block": ("if False:\n  x = 1", "  assert 1 == 2", 0),
    "open quote": ('x = """', 'assert 1 == 2\n"""', 0),
    "columns of lists": (SQUARE, {"input": ["2", "3"], "output": ["4", "9"]}, 1),
    "columns of lists, one wrong": (SQUARE, [{"input": ["2", "3"], "output": ["4", "8"]}], 0.5),
    "a column of floats": (SQUARE, [{"input": "2", "output": 4.0}], 1),
    "nothing but spaces": (SQUARE, "  \n", None),
}


@pytest.mark.parametrize(("program", "tests", "score"), TESTED.values(), ids=TESTED)
def test_what_a_program_passes_in_a_python(program, tests, score):
    assert code_tests(Fake(in_python))(completions=[program], tests=[tests]) == [score]


@pytest.mark.parametrize(
    ("test", "sentence"),
    [
        ('["assert sq(2) == 4"]', "is JSON, not Python; decode the column with json.loads"),
        ('[{"input": "2", "output": "4"}]', "is JSON, not Python"),
        ("# todo", "checks nothing; write a test such as 'assert f"),
        ("'4'", "checks nothing"),
        ([{"input": {"a": 1}, "output": "4"}], "write both as text"),
        ([{"input": ["1", "2"], "output": "4"}], "write both as text"),
    ],
)
def test_what_every_program_or_none_would_pass_is_refused(test, sentence):
    with pytest.raises(ConfigError, match=sentence):
        code_tests(Fake(doubling))(completions=["x"], tests=[test])


def test_the_program_is_the_last_block_or_all():
    assert code_in("print(1)") == "print(1)"
    assert code_in("a\n```\none\n```\nb\n  ```python3 \ntwo\n```\n") == "two\n"
    assert code_in("inline ```x``` is none") == "inline ```x``` is none"
    assert code_in("1. So:\n\n   ```\n   if n:\n       print(n)\n\n  x\n   ```\n") == "if n:\n    print(n)\n\nx\n"


def test_fences_are_found_however_they_are_written():
    assert code_in("Here:\r\n```python\r\none\r\ntwo\r\n```\r\nDone.") == "one\ntwo\n"
    assert code_in('```python title="a.py"\none\n```\n') == "one\n"
    assert code_in("```{.python .numberLines}\none\n``` \n") == "one\n"
    assert code_in("````md\n```\none\n```\n````") == "```\none\n```\n"


def test_a_block_that_the_end_of_the_text_cuts_is_the_last_one():
    assert code_in("```python\none\n```\nor\n```python\ntwo") == "two"
    assert code_in("```python\nnever closed") == "never closed"
    assert code_in("```\none\n```\n```\n") == code_in("```\none\n```\n```") == "one\n"
    assert code_in("```") == "```"


def test_its_name_is_its_own():
    judge = Judge(code_tests(Fake(doubling)))
    assert judge.names == ["code_tests"]
    assert judge(["p"], ["double"], [[1]], {"tests": [PAIRS[:1]]}).scores.tolist() == [1]
