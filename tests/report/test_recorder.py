"""The files of a run: valid after a crash, free of what came later, free of tokens."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from hfpg.report.recorder import Recorder, versions


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path, Accelerator(cpu=True), "run")


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, as strict readers see them: one per \\n, no NaN."""

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not JSON")

    text = path.read_text(encoding="utf-8")
    assert text.endswith("\n") or not text
    return [json.loads(line, parse_constant=refuse) for line in text.split("\n")[:-1]]


def test_metrics_are_one_object_per_line_with_null_for_what_is_no_number(recorder: Recorder):
    recorder.metrics(1, {"score": 0.5, "kl": math.nan})
    recorder.metrics(2, {"score": math.inf, "kl": -math.inf, "count": 3})
    assert lines(recorder.folder / "metrics.jsonl") == [
        {"step": 1, "score": 0.5, "kl": None},
        {"step": 2, "score": None, "kl": None, "count": 3},
    ]


def test_completions_keep_their_text(recorder: Recorder):
    texts = ["é 漢 😀", 'quote " and \\', "two\nlines\r\n", "\u2028\u2029\x85\x1c\x0b\x0c", "", "\x00\x1b[31m"]
    recorder.completions([{"step": 1, "completion": text, "score": 0.5} for text in texts])
    assert [row["completion"] for row in lines(recorder.folder / "completions.jsonl")] == texts


def test_half_a_surrogate_pair_does_not_end_the_run(recorder: Recorder):
    """A reward function may log anything, also text cut in the middle of a character."""
    recorder.completions([{"step": 1, "completion": "x", "reason": "cut \ud83d"}])
    assert lines(recorder.folder / "completions.jsonl")[0]["completion"] == "x"


def test_a_score_that_is_no_number_is_valid_json(recorder: Recorder):
    recorder.completions([{"step": 1, "score": math.nan}])
    assert lines(recorder.folder / "completions.jsonl") == [{"step": 1, "score": None}]


def test_rewind_drops_what_came_later_in_both_files(recorder: Recorder):
    for step in (1, 2, 3, 2, 4):
        recorder.metrics(step, {"score": float(step)})
        recorder.completions([{"step": step, "completion": "x"}] * 2)
    recorder.rewind(2)
    assert [row["step"] for row in lines(recorder.folder / "metrics.jsonl")] == [1, 2, 2]
    assert [row["step"] for row in lines(recorder.folder / "completions.jsonl")] == [1, 1, 2, 2, 2, 2]
    recorder.metrics(3, {"score": 9.0})
    assert lines(recorder.folder / "metrics.jsonl")[-1] == {"step": 3, "score": 9.0}


@pytest.mark.parametrize("broken", ['{"step": 2, "sco', '{"score": 1}', "[2]", "2", "null", '{"step": null}', ""])
def test_rewind_drops_lines_that_a_crash_cut_short(recorder: Recorder, broken: str):
    recorder.metrics(1, {"score": 1.0})
    with (recorder.folder / "metrics.jsonl").open("a") as file:
        file.write(broken)
    recorder.rewind(5)
    recorder.metrics(2, {"score": 2.0})
    assert [row["step"] for row in lines(recorder.folder / "metrics.jsonl")] == [1, 2]


def test_rewind_after_a_crash_in_the_middle_of_a_character(recorder: Recorder):
    recorder.completions([{"step": 1, "completion": "x"}])
    with (recorder.folder / "completions.jsonl").open("ab") as file:
        file.write('{"step": 1, "completion": "é'.encode()[:-1])
    recorder.rewind(5)
    assert lines(recorder.folder / "completions.jsonl") == [{"step": 1, "completion": "x"}]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_rewind_keeps_completions_with_unusual_line_separators(recorder: Recorder, separator: str):
    """str.splitlines splits at these; JSON leaves them as they are."""
    recorder.completions([{"step": 1, "completion": f"a{separator}b"}])
    recorder.rewind(1)
    assert lines(recorder.folder / "completions.jsonl") == [{"step": 1, "completion": f"a{separator}b"}]


def test_rewind_without_files_is_nothing(recorder: Recorder):
    recorder.rewind(3)
    assert not list(recorder.folder.iterdir())


@pytest.mark.parametrize("start", ["-c", "", "-", "/x/ipykernel_launcher.py", "/x/colab_kernel_launcher.py"])
def test_what_no_command_starts_has_none(start: str, recorder: Recorder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", [start, "-f", "kernel-abc.json"])
    recorder.run_file({})
    assert json.loads((recorder.folder / "run.json").read_text())["command"] is None


def test_run_json_says_what_was_asked_and_blots_out_tokens(recorder: Recorder, monkeypatch: pytest.MonkeyPatch):
    token = "hf_" + "a" * 30
    monkeypatch.setattr("sys.argv", ["train.py", f"--token={token}", "a b"])
    recorder.run_file({"seed": 3, "args": {"generation_kwargs": {"token": token}}, "path": Path("x"), "text": token})
    text = (recorder.folder / "run.json").read_text()
    about = json.loads(text)
    assert token not in text and "a" * 30 not in text
    assert about["command"] == "python train.py --token=hf_*** 'a b'" and about["text"] == "hf_***"
    assert about["seed"] == 3 and about["path"] == "x" and about["versions"] == versions()
    assert {"python", "torch", "hfpg"} <= set(about["versions"])


def test_other_processes_write_nothing(recorder: Recorder):
    recorder.main = False
    recorder.metrics(1, {"score": 1.0})
    recorder.completions([{"step": 1}])
    recorder.run_file({})
    recorder.rewind(0)
    assert not list(recorder.folder.iterdir())


def test_trackers_get_the_metrics_with_their_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    accelerator, seen = Accelerator(cpu=True), []
    monkeypatch.setattr(accelerator, "log", lambda values, step: seen.append((values, step)))
    monkeypatch.setattr(accelerator, "init_trackers", lambda name: seen.append(name))
    monkeypatch.setattr(accelerator, "log_with", ["a tracker"])
    recorder = Recorder(tmp_path, accelerator, "run")
    recorder.metrics(4, {"score": 1.0})
    recorder.metrics(5, {"score": 2.0})
    assert seen == ["run", ({"score": 1.0}, 4), ({"score": 2.0}, 5)]
