"""The reward protocol: what may be a reward, what it is called with, and what is said when it goes wrong."""

import asyncio
import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hfpg.config import ConfigError
from hfpg.rewards import Judge, RewardError
from hfpg.rewards.judge import Heard, Log, merge_rounds, merge_said
from hfpg.types import Scores


PROMPTS, COMPLETIONS, IDS = ["p0", "p1", "p2"], ["c", "cc", "ccc"], [[1], [1, 2], [1, 2, 3]]
COLUMNS = {"answer": [7, 8, 9]}


def judge(functions: Any, log: Log | None = None, **settings: Any) -> Scores:
    return Judge(functions, **settings)(PROMPTS, COMPLETIONS, IDS, COLUMNS, log=log)


def returning(value: Any) -> Callable[..., Any]:
    def given(completions, **kwargs):
        return value

    return given


def refusal(functions: Any) -> str:
    with pytest.raises(RewardError) as caught:
        judge(functions)
    return str(caught.value)


def length(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(c)) for c in completions]


# ── how it is called


def test_everything_arrives_by_keyword():
    seen: dict[str, Any] = {}

    def everything(**kwargs):
        seen.update(kwargs)
        return [0.0] * 3

    state = object()
    Judge(everything)(PROMPTS, COMPLETIONS, IDS, COLUMNS, trainer_state=state)
    assert set(seen) == {
        *("prompts", "completions", "completion_ids", "answer"),
        *("trainer_state", "log_extra", "log_metric"),
    }
    assert (seen["prompts"], seen["completions"], seen["completion_ids"]) == (PROMPTS, COMPLETIONS, IDS)
    assert seen["answer"] == [7, 8, 9] and seen["trainer_state"] is state


def test_a_function_gets_only_the_names_that_it_declares():
    def narrow(completions, answer, unrelated=5):
        return [a + unrelated for a in answer]

    assert judge(narrow).scores.tolist() == [12, 13, 14]


def test_trl_style_functions_work_unchanged():
    def accuracy_reward(completions: list[str], answer: list[int], **kwargs) -> list[float | None]:
        kwargs["log_extra"]("seen", answer)
        kwargs["log_metric"]("accuracy", 0.5)
        return [1.0 if len(c) == a - 6 else 0.0 for c, a in zip(completions, answer, strict=True)]

    log = Log()
    assert judge(accuracy_reward, log).scores.tolist() == [1, 1, 1]
    assert log.extra == {"seen": [7, 8, 9]} and log.metrics == {"accuracy": [0.5]}


def test_objects_lambdas_and_partials_are_functions_too():
    class Counter:
        def __call__(self, completions, **kwargs):
            return [len(c) for c in completions]

    def power(completions, exponent, **kwargs):
        return [len(c) ** exponent for c in completions]

    for function in (Counter(), lambda completions: [1, 2, 3], functools.partial(power, exponent=1)):
        assert judge(function).scores.tolist() == [1, 2, 3]


def test_the_arguments_are_copies():
    def vandal(prompts, completions, completion_ids, answer, **kwargs):
        prompts.clear()
        completions[0] = "x"
        completion_ids[0].append(99)
        answer.sort(reverse=True)
        return [0.0] * 3

    ids, columns = [[1], [1, 2], [1, 2, 3]], {"answer": [7, 8, 9]}
    prompts, completions = [[{"role": "user", "content": "a"}]] * 3, list(COMPLETIONS)
    scores = Judge([vandal, length])(prompts, completions, ids, columns)
    assert scores.by_function["length"] == [1, 2, 3]
    assert (completions, ids, columns) == (COMPLETIONS, IDS, COLUMNS) and len(prompts) == 3


# ── async


class Meeting:
    """Reward functions that each go on only when the other has begun: run one after the other, they never end."""

    def __init__(self) -> None:
        self.begun: list[str] = []

    def function(self, name: str) -> Callable[..., Any]:
        async def wait(completions, **kwargs):
            self.begun.append(name)
            for _ in range(2000):
                if len(self.begun) == 2:
                    return [float(len(c)) for c in completions]
                await asyncio.sleep(0.001)
            raise TimeoutError("the other did not come")

        wait.__name__ = name
        return wait


def test_async_functions_run_at_the_same_time():
    meeting = Meeting()
    scores = judge([meeting.function("a"), returning([10, 10, 10]), meeting.function("b")])
    assert scores.scores.tolist() == [12, 14, 16]
    assert [*scores.by_function] == ["a", "given", "b"]


def test_async_functions_work_inside_a_running_event_loop():
    """As in a notebook."""

    async def notebook() -> Scores:
        meeting = Meeting()
        return judge([meeting.function("a"), meeting.function("b")])

    assert asyncio.run(notebook()).scores.tolist() == [2, 4, 6]


def test_async_objects_and_partials():
    class Asker:
        async def __call__(self, completions, **kwargs):
            return [len(c) for c in completions]

        async def ask(self, completions):
            return [len(c) for c in completions]

    async def scaled(completions, by, **kwargs):
        return [by * len(c) for c in completions]

    for function in (Asker(), Asker().ask, functools.partial(scaled, by=1)):
        assert judge(function).scores.tolist() == [1, 2, 3]


def test_an_exception_in_an_async_function_is_named():
    async def server(completions, **kwargs):
        raise ConnectionError("refused")

    assert refusal([length, server]) == "reward function 'server' raised ConnectionError: refused"


# ── the score


def test_the_score_is_the_weighted_sum():
    scores = judge([length, returning([10, 20, 30])], weights=[2, -0.5])
    assert scores.scores.tolist() == [-3, -6, -9] and scores.weights.tolist() == [1, 1, 1]
    assert scores.by_function == {"length": [1, 2, 3], "given": [10, 20, 30]}


def test_an_abstention_is_left_out_of_the_sum_and_weighs_0_only_if_all_abstain():
    a, b = returning([1, None, None]), returning([None, 5, None])
    scores = judge([a, b], weights=[1.0, 0.1])
    assert scores.scores.tolist() == pytest.approx([1, 0.5, 0]) and scores.weights.tolist() == [1, 1, 0]
    assert scores.by_function == {"given_0": [1, None, None], "given_1": [None, 5, None]}


@pytest.mark.parametrize(
    "result",
    [
        (1, 0, 2),
        [True, False, 2],
        np.array([1, 0, 2]),
        np.array([1, 0, 2], dtype=np.float32),
        [np.float64(1), np.int64(0), np.bool_(True) + 1],
        torch.tensor([1.0, 0.0, 2.0]),
        torch.tensor([1.0, 0.0, 2.0], requires_grad=True),
        torch.tensor([1, 0, 2], dtype=torch.bfloat16),
        [torch.tensor(1.0), torch.tensor([0]), 2],
    ],
    ids=lambda r: type(r).__name__,
)
def test_numbers_of_every_kind_are_taken(result: Any):
    scores = judge(returning(result))
    assert scores.scores.tolist() == [1, 0, 2]
    assert all(type(value) is float for value in scores.by_function["given"])


@pytest.mark.parametrize(
    ("bad", "seen"),
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        ("0.5", "'0.5'"),
        (np.float32("nan"), "nan"),
        (1j, "1j"),
    ],
)
def test_what_is_no_score_is_named_with_function_and_sample(bad: Any, seen: str):
    message = refusal(returning([0.0, bad, 0.0]))
    assert message.startswith(f"reward function 'given' returned {seen} for sample 1 (\"'cc'\") ") or (
        message.startswith(f"reward function 'given' returned {seen} for sample 1 ('cc')")
    )
    assert message.endswith("a score is a finite number, or None for 'cannot judge'")


@pytest.mark.parametrize("bad", [torch.ones(3), np.ones(3), [1.0], 10**400], ids=["tensor", "array", "list", "huge"])
def test_a_score_that_is_no_single_float_is_named_too(bad: Any):
    assert refusal(returning([0.0, bad, 0.0])).startswith("reward function 'given' returned ")


def test_a_score_beyond_single_precision_is_no_infinite_score():
    try:
        assert torch.isfinite(judge(returning([0.0, 1e300, 0.0])).scores).all()
    except RewardError as error:
        assert "sample 1" in str(error)


def test_a_long_completion_is_cut_in_the_message():
    with pytest.raises(RewardError) as caught:
        Judge(returning([math.nan]))(["p"], ["x" * 10_000], [[1]], {})
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(("result", "count"), [([1.0], 1), ([1.0] * 4, 4), ([], 0), (np.zeros(2), 2)])
def test_a_wrong_number_of_scores(result: Any, count: int):
    message = refusal(returning(result))
    assert message.startswith(f"reward function 'given' returned {count} scores for 3 completions; it must return one")


@pytest.mark.parametrize("result", [0.5, None, "abc", torch.tensor(0.5), np.float64(1), {"score": 1}])
def test_a_result_that_is_no_list(result: Any):
    message = refusal(returning(result))
    assert message.startswith("reward function 'given' returned ")
    assert "it must return a list of 3 floats, one per completion (None: cannot judge)" in message


def test_an_exception_is_named_and_kept():
    def broken(completions, **kwargs):
        return completions[99]

    with pytest.raises(RewardError, match="reward function 'broken' raised IndexError: list index") as caught:
        judge([length, broken])
    assert isinstance(caught.value.__cause__, IndexError)  # the original traceback is there


def test_log_extra_of_the_wrong_length_is_said_at_once():
    """The completions table has one row per completion; half an hour later it would be an IndexError."""

    def chatty(completions, log_extra, **kwargs):
        log_extra("reason", ["only one"])
        return [0.0] * 3

    assert "reason" in refusal(chatty)


# ── what may be named


def test_names_are_numbered_where_they_are_not_unique():
    assert Judge([length]).names == ["length"]
    assert Judge([length, returning(1), length]).names == ["length_0", "given", "length_2"]


def test_a_numbered_name_never_takes_the_name_of_another():
    def renamed(name: str, value: float) -> Callable[..., Any]:
        function = returning([value] * 3)
        function.__name__ = name
        return function

    scores = judge([renamed("f", 1), renamed("f", 10), renamed("f_1", 100)])
    assert len(scores.by_function) == 3 and scores.scores.tolist() == [111] * 3


def test_a_file_and_its_function(tmp_path: Path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import dataclass\n\n@dataclass\nclass A:\n    x: int = 0\n\n"
        "def score(completions):\n    return [len(c) for c in completions]\n\ndef _hidden(): ...\n"
    )
    assert judge(f"{path}:score").by_function == {"score": [1, 2, 3]}
    with pytest.raises(ConfigError) as caught:
        Judge(f"{path}:scoer")
    assert str(caught.value) == f"reward '{path}:scoer': {path} has no 'scoer'; it has ['dataclass', 'A', 'score']"
    with pytest.raises(ConfigError, match=r"there is no file .*other\.py"):
        Judge(f"{tmp_path / 'other.py'}:score")


def test_two_files_of_the_same_name_stay_apart(tmp_path: Path):
    for name, value in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "judge.py").write_text(
            f"def {name}(completions):\n    return [{value}] * len(completions)\n"
        )
    scores = judge([f"{tmp_path / 'a' / 'judge.py'}:a", f"{tmp_path / 'b' / 'judge.py'}:b"])
    assert scores.scores.tolist() == [3, 3, 3]


def test_a_module_and_its_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "hfpg_test_package").mkdir()
    (tmp_path / "hfpg_test_package" / "__init__.py").touch()
    (tmp_path / "hfpg_test_package" / "judges.py").write_text("def short(completions):\n    return [0.5] * 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert judge("hfpg_test_package.judges:short").scores.tolist() == [0.5] * 3
    with pytest.raises(ConfigError, match="judges has no 'long'; it has \\['short'\\]"):
        Judge("hfpg_test_package.judges:long")
    with pytest.raises(ConfigError, match="No module named 'hfpg_test_package.nothing'; use 'file.py:name'"):
        Judge("hfpg_test_package.nothing:long")
    for name in [n for n in sys.modules if n.startswith("hfpg_test_package")]:
        monkeypatch.delitem(sys.modules, name)


def test_an_empty_module_name_is_refused():
    with pytest.raises(ConfigError, match="':score'"):
        Judge(":score")


def test_what_is_no_reward_at_all():
    with pytest.raises(ConfigError, match="the reward 3 is not callable; give a function, 'file.py:name' or a class"):
        Judge([length, 3])
    with pytest.raises(ConfigError, match="reward_funcs is empty; give at least one function"):
        Judge([])


def test_counts_must_agree():
    with pytest.raises(ConfigError, match="reward_weights has 1 entries for 2 reward functions; give one each"):
        Judge([length, length], weights=[1])
    with pytest.raises(ConfigError, match="reward_processing_classes has 1 entries for 2 rewards; give one each"):
        Judge([length, length], tokenizers=[None])


# ── the dry call


def dry(function: Any, prompts: list | None = None) -> None:
    Judge(function).dry_call(PROMPTS[:2] if prompts is None else prompts, [[1], [2]], {"answer": [7, 8]})


def dry_refusal(function: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        dry(function)
    return str(caught.value)


def test_a_good_function_passes_the_dry_call_and_its_words_are_forgotten():
    def logs(completions, log_extra, log_metric, **kwargs):
        log_extra("x", completions)
        log_metric("y", 1)
        return [None] * len(completions)

    assert dry([length, logs]) is None


def test_the_dry_call_has_completions_of_the_kind_of_the_prompts():
    seen = []

    def look(completions, **kwargs):
        seen.extend(completions)
        return [0] * len(completions)

    dry(look)
    dry(look, [[{"role": "user", "content": "a"}]] * 2)
    assert all(isinstance(c, str) and c for c in seen[:2])
    assert [c[0]["role"] for c in seen[2:]] == ["assistant"] * 2


def test_the_dry_call_names_a_missing_argument_and_the_columns():
    def needs(completions, solution):
        return [0.0] * len(completions)

    message = dry_refusal(needs)
    assert message.startswith("reward function 'needs' does not fit: missing a required argument: 'solution'; it is")
    assert message.endswith("(the data set's columns are ['answer'])")


def test_the_dry_call_names_what_would_fail_later():
    def broken(completions, **kwargs):
        raise KeyError("model")

    assert dry_refusal(broken) == (
        "reward function 'broken' raised KeyError: 'model' (in a dry call on 2 rows, before training)"
    )
    assert dry_refusal(returning([0.0, math.nan])).startswith(
        "reward function 'given' returned nan for sample 1 ('a fine answer'); a score is a finite number"
    )
    assert "returned 3 scores for 2 completions" in dry_refusal(returning([0.0] * 3))


def test_an_async_function_is_called_dry_too():
    async def broken(completions, **kwargs):
        raise KeyError("model")

    assert dry_refusal(broken).startswith("reward function 'broken' raised KeyError")


def test_what_several_ranks_said_is_merged_with_none_where_one_was_silent():
    said = merge_said(
        [
            Heard(2, {"f": [1.0, None]}, {"why": ["a", "b"]}, {"m": [0.0]}, ["broken"]),
            Heard(1, {"f": [3.0]}, {}, {"m": [1.0, 2.0]}, []),
        ]
    )
    assert said["errors"] == ["broken"] and said["rows"] == 3
    assert merge_rounds([said, said])["by_function"] == {"f": [1.0, None, 3.0] * 2}
    assert merge_rounds([said, said])["rows"] == 6
    assert said["by_function"] == {"f": [1.0, None, 3.0]}
    assert said["extra"] == {"why": ["a", "b", None]} and said["metrics"] == {"m": 1.0}


def test_a_function_of_weight_0_watches_and_does_not_vouch_for_a_row():
    judge = Judge([lambda completions, **k: [None, 2.0], lambda completions, **k: [7.0, 7.0]], [1.0, 0.0])
    found = judge(["p", "q"], ["a", "b"], [[1], [2]], {})
    assert found.weights.tolist() == [0.0, 1.0] and found.scores.tolist() == [0.0, 2.0]
