"""The reward protocol: what may be a reward, what it is called with, and what is said when it goes wrong."""

import asyncio
import functools
import math
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import TrainerState

from hfpg.config import ConfigError
from hfpg.rewards import Judge, RewardError
from hfpg.rewards.judge import DryCall, Heard, Log, _Beside, alike, beside, merge_rounds, merge_said
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

    state = TrainerState()
    Judge(everything)(PROMPTS, COMPLETIONS, IDS, COLUMNS, trainer_state=state)
    assert set(seen) == {
        *("prompts", "completions", "completion_ids", "answer"),
        *("trainer_state", "log_extra", "log_metric"),
    }
    assert (seen["prompts"], seen["completions"], seen["completion_ids"]) == (PROMPTS, COMPLETIONS, IDS)
    assert seen["answer"] == [7, 8, 9] and seen["trainer_state"] == state


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


def test_the_trainers_state_is_a_copy_too_and_never_missing():
    def vandal(completions, trainer_state, **kwargs):
        assert isinstance(trainer_state, TrainerState)
        trainer_state.global_step = 99
        trainer_state.log_history.clear()
        return [0.0] * 3

    state = TrainerState(global_step=7, log_history=[{"score": 1.0}])
    Judge(vandal)(PROMPTS, COMPLETIONS, IDS, COLUMNS, trainer_state=state)
    assert state.global_step == 7 and state.log_history == [{"score": 1.0}]
    judge(vandal)  # outside of a run: a state of step 0
    dry(lambda completions, trainer_state: [trainer_state.global_step / trainer_state.max_steps] * 2)


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


class Patient:
    """An async judge that waits for a minute, and says when it was begun and that it was cancelled."""

    def __init__(self) -> None:
        self.begun, self.cancelled = threading.Event(), False

    async def __call__(self, completions, **kwargs):
        self.begun.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return [0.0] * len(completions)


@pytest.mark.parametrize("beside", [True, False])
def test_an_interrupt_does_not_wait_for_an_async_judge(beside):
    patient = Patient()

    def interrupted(completions):
        assert patient.begun.wait(10)
        raise KeyboardInterrupt

    def interrupt():
        assert patient.begun.wait(10)
        time.sleep(0.1)  # the judge waits for its result by then
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    sender = threading.Thread(target=interrupt)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        if beside:
            judge([patient, interrupted])
        else:
            sender.start()
            judge(patient)
    assert time.monotonic() - begin < 20 and patient.cancelled


def test_an_interrupt_does_not_wait_for_one_that_cannot_be_cancelled(monkeypatch):
    begun, end = threading.Event(), threading.Event()

    async def stuck(completions):
        begun.set()
        end.wait(60)
        return [0.0] * 3

    def interrupted(completions):
        assert begun.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(_Beside, "GRACE", 0.1)
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        judge([stuck, interrupted])
    assert time.monotonic() - begin < 20
    end.set()


def test_a_cancelled_task_of_an_async_function_is_an_error_of_that_function():
    async def waits(completions):
        task = asyncio.ensure_future(asyncio.sleep(60))
        await asyncio.sleep(0)
        task.cancel()
        await task

    with pytest.raises(RewardError, match="'waits' raised RuntimeError: a task that it awaits was cancelled"):
        Judge([waits])(["p"], ["c"], [[1]], {})


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
    assert refusal(returning([0.0, bad, 0.0])) == (
        f"reward function 'given' returned {seen} for sample 1 ('cc'); a score is a finite number, or None for "
        "'cannot judge'"
    )


class Unspeakable:
    """Something whose repr fails."""

    def __repr__(self) -> str:
        raise KeyError("no name")


@pytest.mark.parametrize(
    ("bad", "seen"),
    [
        (torch.ones(3), "3 scores"),
        (np.ones(3), "3 scores"),
        ([1.0], "1 scores"),
        ([[1.0], 2.0], "a list with [1.0]"),
        (10**400, "1000000"),
        (10**5000, "<int>"),  # Python does not write it out
        ("x" * 1_000_000, "'xxx"),
        (["y" * 1_000_000, 0.0], "a list with 'yyy"),
        (Unspeakable(), "<Unspeakable>"),
        (torch.empty(2, device="meta"), "tensor("),
    ],
    ids=["tensor", "array", "list", "nested", "huge", "digits", "text", "texts", "repr", "meta"],
)
def test_a_score_that_is_no_single_float_is_named_too(bad: Any, seen: str):
    message = refusal(returning([0.0, bad, 0.0]))
    assert message.startswith(f"reward function 'given' returned {seen}") and "for sample 1 ('cc')" in message
    assert len(message) < 300


def test_a_score_beyond_single_precision_is_no_infinite_score():
    assert "returned 1e+300 for sample 1 ('cc')" in refusal(returning([0.0, 1e300, 0.0]))
    told = "the weighted scores of sample 1 ('cc') are too large to add up"
    for functions, weights in (
        ([returning([0, 3e38, 0])] * 2, [1.0, 1.0]),
        ([returning([0, 3e38, 0])], [10.0]),
        ([returning([0, [3e38, 3e38], 0])], [1.0]),
    ):
        with pytest.raises(RewardError) as caught:
            judge(functions, weights=weights)
        assert str(caught.value) == f"{told}; use smaller reward_weights"
        log = Log()
        found = judge(functions, log=log, weights=weights, on_error="drop")
        assert found.weights.tolist() == [1, 0, 1] and found.scores.tolist() == [0, 0, 0] and log.errors == [told]


@pytest.mark.parametrize(
    ("completion", "quoted"),
    [
        ("x" * 10_000, repr("x" * 80)),
        ([{"role": "assistant", "content": "y" * 1_000_000}], repr("y" * 80)),
        ("\x1b[2J\u202e[/b]</script>", repr("\x1b[2J\u202e[/b]</script>")),
        ("half \ud83d", r"'half \ud83d'"),
        ("", "''"),
    ],
    ids=["long", "conversation", "hostile", "surrogate", "empty"],
)
def test_the_message_has_the_first_80_characters_of_the_completion(completion: Any, quoted: str):
    with pytest.raises(RewardError) as caught:
        Judge(returning([math.nan]))(["p"], [completion], [[1]], {})
    message = str(caught.value)
    assert message.startswith(f"reward function 'given' returned nan for sample 0 ({quoted}); a score")
    assert message.isprintable() and message.encode("utf-8")


@pytest.mark.parametrize(("result", "count"), [([1.0], 1), ([1.0] * 4, 4), ([], 0), (np.zeros(2), 2)])
def test_a_wrong_number_of_scores(result: Any, count: int):
    message = refusal(returning(result))
    assert message.startswith(f"reward function 'given' returned {count} scores for 3 completions; it must return one")


@pytest.mark.parametrize(
    ("result", "seen"),
    [
        (0.5, "0.5"),
        (True, "True"),
        (None, "None"),
        ("abc", "'abc'"),
        (torch.tensor(0.5), "0.5"),
        (np.float64(1), "1.0"),
        (np.array(2), "2"),
        ({"score": 1}, "{'score': 1}"),
        ({1.0, 2.0, 3.0}, "{1.0, 2.0, 3.0}"),
        ((1.0 for _ in COMPLETIONS), "<generator object "),
        (torch.empty(3, device="meta"), "tensor("),
        (ValueError("made, not raised"), "ValueError('made, not raised')"),
    ],
)
def test_a_result_that_is_no_list(result: Any, seen: str):
    message = refusal(returning(result))
    assert message.startswith(f"reward function 'given' returned {seen}")
    assert message.endswith("; it must return a list of 3 floats, one per completion (None: cannot judge)")


def test_an_exception_is_named_and_kept():
    def broken(completions, **kwargs):
        return completions[99]

    with pytest.raises(RewardError, match="reward function 'broken' raised IndexError: list index") as caught:
        judge([length, broken])
    text = "".join(traceback.format_exception(caught.value))
    assert text.count("return completions[99]") == 1 and text.count("\nIndexError: list index out") == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x" * 1_000_000, "x" * 299 + "…"),
        ("two\n  lines", "two lines"),
        ("\x1b[2J\u202e\ud83d[/b]é", r"\x1b[2J\u202e\ud83d[/b]é"),
    ],
    ids=["long", "lines", "hostile"],
)
def test_what_an_exception_says_is_one_harmless_line(text: str, told: str):
    """It often quotes the completion."""

    def wordy(completions, **kwargs):
        raise ValueError(text)

    assert refusal(wordy) == f"reward function 'wordy' raised ValueError: {told}"


def test_of_a_function_that_drops_completions_the_traceback_is_shown_once(caplog: pytest.LogCaptureFixture):
    def broken(completions, **kwargs):
        return completions[99]

    dropping = Judge([length, broken], on_error="drop")
    for _ in range(3):
        assert dropping(PROMPTS, COMPLETIONS, IDS, COLUMNS).weights.tolist() == [0, 0, 0]
    assert caplog.text.count("return completions[99]") == 1
    assert "reward function 'broken' raised IndexError: list index out of range; its completions" in caplog.text


def test_log_extra_of_the_wrong_length_is_said_at_once():
    """The completions table has one row per completion; half an hour later it would be an IndexError."""

    def chatty(completions, log_extra, **kwargs):
        log_extra("reason", ["only one"])
        return [0.0] * 3

    assert refusal(chatty) == "log_extra('reason') got 1 values for 3 completions; give one each"


def test_what_is_logged_takes_no_name_that_is_hfpgs_own():
    """`step` in completions.jsonl says which lines a resumed run drops; `score` in the metrics is the best model's."""

    def chatty(completions, log_extra, log_metric, **kwargs):
        log_extra("step", ["one", "two", "three"])
        log_metric("score", 5)
        return [0.0] * 3

    log = Log()
    judge(chatty, log)
    assert log.extra == {"extra/step": ["one", "two", "three"]}
    assert beside({"score": 1.0}, log.metrics | {"own": [2.0]}) == {"logged/score": [5.0], "own": [2.0]}


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
    (tmp_path / "hfpg_test_package" / "broken.py").write_text("import no_such_library\n")
    with pytest.raises(ConfigError) as caught:
        Judge("hfpg_test_package.broken:score")
    assert str(caught.value) == (
        "reward 'hfpg_test_package.broken:score': hfpg_test_package.broken fails: ModuleNotFoundError: No module "
        "named 'no_such_library'; broken.py, line 1"
    )
    for name in [n for n in sys.modules if n.startswith("hfpg_test_package")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("x = 1\nimport no_such_library\n", "ModuleNotFoundError: No module named 'no_such_library'; mine.py, line 2"),
        ("\n\n1 / 0\n", "ZeroDivisionError: division by zero; mine.py, line 3"),
        ("def score(:\n", "SyntaxError: invalid syntax (mine.py, line 1)"),
        ("open('no_such_file.json')\n", "FileNotFoundError: [Errno 2] No such file or directory: 'no_such_file.json'"),
        ("import sys\nsys.exit(0)\n", "SystemExit: 0; mine.py, line 2"),
    ],
)
def test_a_file_that_cannot_be_imported_is_named_with_the_line(tmp_path: Path, code: str, sentence: str):
    path = tmp_path / "mine.py"
    path.write_text(code)
    with pytest.raises(ConfigError) as caught:
        Judge(f"{path}:score")
    assert str(caught.value).startswith(f"reward '{path}:score': {path} fails: {sentence}")


def test_an_empty_module_name_is_refused():
    with pytest.raises(ConfigError, match="':score'"):
        Judge(":score")
    with pytest.raises(ConfigError, match=r"reward 'mine\.py': which function of it\? Use 'mine\.py:name'"):
        Judge("mine.py")


def test_what_is_no_reward_at_all():
    with pytest.raises(ConfigError, match="the reward 3 is not callable; give a function, 'file.py:name' or a class"):
        Judge([length, 3])
    with pytest.raises(ConfigError, match="reward_funcs is empty; give at least one function"):
        Judge([])
    with pytest.raises(ConfigError, match="the reward 'max' does not say which arguments it takes; wrap it, as in"):
        Judge(max)


def test_counts_must_agree():
    with pytest.raises(ConfigError, match="reward_weights has 1 entries for 2 reward functions; give one each"):
        Judge([length, length], weights=[1])
    for weight in (math.nan, math.inf):
        with pytest.raises(ConfigError, match=rf"reward_weights=\[{weight}\]: a weight is a finite number"):
            Judge([length], weights=[weight])
    with pytest.raises(ConfigError, match="reward_processing_classes has 1 entries for 2 rewards; give one each"):
        Judge([length, length], tokenizers=[None])


# ── the dry call


def dry(function: Any, prompts: list | None = None, **settings: Any) -> DryCall:
    given = PROMPTS[:2] if prompts is None else prompts
    return Judge(function, **settings).dry_call(given, [[1], [2]], {"answer": [7, 8]})


def dry_refusal(function: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        dry(function)
    return str(caught.value)


def test_a_good_function_passes_the_dry_call_and_its_words_are_forgotten():
    def logs(completions, log_extra, log_metric, **kwargs):
        log_extra("x", completions)
        log_metric("y", 1)
        return [None] * len(completions)

    assert dry([length, logs]) == DryCall(logged=["y"], unsteady=[])


def test_a_logged_number_that_is_not_finite_is_left_out_and_said_once(caplog):
    values = iter([math.nan, 2.0, math.nan, math.inf])

    def logs(completions, log_metric):
        log_metric("lonely", next(values))
        return [0.0] * 3

    logs_of = [Log() for _ in range(4)]
    for log in logs_of:
        judge(logs, log)
    assert [log.metrics for log in logs_of] == [{"lonely": v} for v in ([], [2.0], [], [])]
    heard = [Heard(3, {}, {}, log.metrics, []) for log in logs_of]
    assert merge_said(heard)["metrics"] == {"lonely": 2.0} and merge_said(heard[:1])["metrics"] == {}
    assert merge_rounds([merge_said(heard[:1]), merge_said(heard[1:])])["metrics"] == {"lonely": 2.0}
    told = [
        f"log_metric('lonely') got {v}, which is no finite number; such values are left out" for v in ("nan", "inf")
    ]
    assert [record.getMessage()[: len(t)] for record, t in zip(caplog.records, told, strict=True)] == told


def test_the_dry_call_finds_hidden_randomness():
    draws = iter(range(99))

    def rounding(completions, **kwargs):
        return [1.0 + 1e-9 * next(draws)] * len(completions)

    def undecided(completions, **kwargs):
        return [None if next(draws) > 3 else 1.0] * len(completions)

    def noisy(completions, **kwargs):
        return [next(draws)] * len(completions)

    assert dry([length, rounding, undecided, noisy]).unsteady == ["undecided", "noisy"]
    assert alike([1.0, None], [1.0, None]) and not alike([1.0, None], [None, 1.0])


def test_the_dry_call_has_completions_of_the_kind_of_the_prompts():
    seen = []

    def look(completions, **kwargs):
        seen.extend(completions)
        return [0] * len(completions)

    dry(look)
    dry(look, [[{"role": "user", "content": "a"}]] * 2)
    assert all(isinstance(c, str) and c for c in seen[:4])
    assert [c[0]["role"] for c in seen[4:]] == ["assistant"] * 4


def test_the_dry_call_names_a_missing_argument_and_the_columns():
    def needs(completions, solution):
        return [0.0] * len(completions)

    assert dry_refusal(needs) == (
        "reward function 'needs' does not fit: missing a required argument: 'solution'; it is called with the "
        "keywords ['answer', 'completion_ids', 'completions', 'log_extra', 'log_metric', 'prompts', 'trainer_state'] "
        "(the data set's columns are ['answer'])"
    )
    message = dry_refusal(lambda completions, /: [0.0] * 2)
    assert "does not fit: " in message and "positional only" in message.replace("-", " ")


@pytest.mark.parametrize("on_error", ["raise", "drop"])
def test_the_dry_call_names_what_would_fail_later(on_error: str):
    def broken(completions, **kwargs):
        raise KeyError("model")

    line = broken.__code__.co_firstlineno + 1
    told = (
        "reward function 'broken' raised KeyError: 'model' (in a dry call on 2 rows, before training; test_judge.py, "
        f"line {line})"
    )
    with pytest.raises(ConfigError) as caught:
        dry(broken, on_error=on_error)
    assert str(caught.value) == told
    text = "".join(traceback.format_exception(caught.value))
    assert text.count('raise KeyError("model")') == 1
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


def test_a_metric_of_several_rounds_is_the_mean_of_all_values_and_not_of_means():
    first = merge_said([Heard(4, {}, {}, {"m": [1.0, 2.0, 3.0], "early": [1.0]}, [])])
    second = merge_said([Heard(1, {}, {}, {"m": [10.0]}, []), Heard(1, {}, {}, {}, [])])
    assert merge_rounds([first, second])["metrics"] == {"m": 4.0, "early": 1.0}
    assert merge_rounds([merge_rounds([first]), second])["metrics"]["m"] == 4.0


def test_a_function_of_weight_0_watches_and_does_not_vouch_for_a_row():
    judge = Judge([lambda completions, **k: [None, 2.0], lambda completions, **k: [7.0, 7.0]], [1.0, 0.0])
    found = judge(["p", "q"], ["a", "b"], [[1], [2]], {})
    assert found.weights.tolist() == [0.0, 1.0] and found.scores.tolist() == [0.0, 2.0]
