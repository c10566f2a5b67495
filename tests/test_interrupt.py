"""Signals at bad moments: what was trained is saved, and a resumed run is the unbroken one."""

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
import torch

from hfpg import checkpoint, interrupt, resume
from hfpg.generation.hf import HFGenerator
from tests import build


def kill(number=signal.SIGTERM):
    os.kill(os.getpid(), number)


def nth(function, call, before):
    """The function, with `before` done first at its n-th call."""
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            before()
        return function(*args, **kwargs)

    return counted


def parameters(run):
    return torch.cat([p.detach().flatten() for p in run.learner.actor.parameters()])


def rows(folder):
    """metrics.jsonl without what a clock said."""
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "per_second", "floor")
    return [{k: v for k, v in row.items() if not any(word in k for word in timed)} for row in found]


def whole_and_resumed(folder, stop, **settings):
    """A run that `stop(run)` arranges to be ended by a signal, goes on in a new trainer; and the unbroken run."""
    settings = dict(max_steps=5, eval_dataset=[{"prompt": "ab"}, {"prompt": "ba"}], eval_steps=2) | settings
    whole = build.trainer(folder / "whole", **settings)
    whole.train()
    run = build.trainer(folder / "run", **settings)
    stop(run)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        run.train()
    again = build.trainer(folder / "run", **settings)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(whole), parameters(again)) and whole.run == again.run
    assert rows(folder / "whole") == rows(folder / "run")
    return run


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_inside_an_update_waits_for_its_end(number, tmp_path, monkeypatch, capfd):
    def stop(run):
        monkeypatch.setattr(run.learner, "step", nth(run.learner.step, 6, lambda: kill(number)))

    run = whole_and_resumed(tmp_path, stop)
    assert run.state.global_step == 3, "two optimizer steps a turn"
    assert "stopping when this update is done" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("of", "name", "call", "step"),
    [
        ("learner", "step", 8, 4),  # before an evaluation that is due
        ("trainer", "sample", 2, 4),  # inside it: only evaluations call this
        ("events", "evaluated", 2, 4),  # when it is recorded, and not done
        ("recorder", "metrics", 4, 3),  # inside a report
    ],
)
def test_every_line_of_an_interrupted_step_is_there_once(of, name, call, step, tmp_path, monkeypatch):
    def stop(run):
        part = run if of == "trainer" else getattr(run, of)
        monkeypatch.setattr(part, name, nth(getattr(part, name), call, kill))

    run = whole_and_resumed(tmp_path, stop)
    assert run.state.global_step == step


def test_a_second_signal_ends_an_update_at_once(tmp_path, monkeypatch):
    run = build.trainer(tmp_path, max_steps=5)

    def twice():
        kill()
        kill()

    monkeypatch.setattr(run.learner, "step", nth(run.learner.step, 5, twice))
    with pytest.raises(SystemExit):
        run.train()
    assert run.state.global_step == 2 and (tmp_path / "interrupted" / "model.safetensors").is_file()


def test_an_update_that_takes_too_long_is_not_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(interrupt, "GRACE", 0.2)
    run = build.trainer(tmp_path, max_steps=5)

    def long():
        kill()
        for _ in range(500):
            time.sleep(0.01)

    monkeypatch.setattr(run.learner, "step", nth(run.learner.step, 5, long))
    with pytest.raises(SystemExit):
        run.train()
    assert (tmp_path / "interrupted" / "model.safetensors").is_file()
    build.trainer(tmp_path, max_steps=1).train(resume_from_checkpoint=True)
    said = capsys.readouterr().out.replace("\n", " ")
    assert f"starting at step 0 (weights of an update that was cut short are in {tmp_path / 'interrupted'})" in said


def test_an_impatient_second_signal_does_not_undo_the_saving(tmp_path, monkeypatch, capfd):
    run = build.trainer(tmp_path, max_steps=5)
    monkeypatch.setattr(run, "rescore", nth(run.rescore, 3, kill))

    def saving(*args):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            kill(number)
        return checkpoint.save_checkpoint(*args)

    monkeypatch.setattr(resume, "save_checkpoint", saving)
    with pytest.raises(SystemExit) as ended:
        run.train()
    assert ended.value.code == 143 and (tmp_path / "checkpoint-2" / "hfpg_state.json").is_file()
    assert "what was trained is being saved; please wait" in capfd.readouterr().err


def test_a_closed_terminal_saves_unless_the_process_was_told_to_ignore_it(tmp_path, monkeypatch):
    run = build.trainer(tmp_path / "a", max_steps=4)
    monkeypatch.setattr(run, "rescore", nth(run.rescore, 3, lambda: kill(signal.SIGHUP)))
    with pytest.raises(SystemExit) as ended:
        run.train()
    assert ended.value.code == 129 and (tmp_path / "a" / "checkpoint-2").is_dir()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        run = build.trainer(tmp_path / "b", max_steps=4)
        monkeypatch.setattr(run, "rescore", nth(run.rescore, 3, lambda: kill(signal.SIGHUP)))
        run.train()
        assert run.state.global_step == 4
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_run_whose_reader_has_gone_is_saved(tmp_path):
    """As `hfpg train … | head` does: the first print into the broken pipe ends the run."""
    command = [sys.executable, "-c", RUN_OF_MANY_STEPS, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as run:
        assert run.stdout is not None
        while not (tmp_path / "metrics.jsonl").exists():
            run.stdout.read(1)
        run.stdout.close()
        assert run.wait(60) != 0
    assert len(list(tmp_path.glob("checkpoint-*/hfpg_state.json"))) == 1


RUN_OF_MANY_STEPS = "import sys; from tests import build; build.trainer(sys.argv[1], max_steps=5000).train()"


def test_a_run_whose_terminal_is_closed_is_saved(tmp_path):
    """Every write to it is an error from then on, also that of the bar which is taken down before the save."""
    child, terminal = pty.fork()
    if child == 0:
        os.execve(sys.executable, [sys.executable, "-c", RUN_OF_MANY_STEPS, str(tmp_path)], dict(os.environ))
    while not (tmp_path / "metrics.jsonl").exists():
        os.read(terminal, 4096)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 129
    assert len(list(tmp_path.glob("checkpoint-*/hfpg_state.json"))) == 1


def test_a_slow_judge_is_not_waited_for_to_the_end(tmp_path, monkeypatch):
    judged = []

    def slow(completions):
        judged.append(len(completions))
        time.sleep(0.3 if len(judged) > 1 else 0)
        return [0.0] * len(completions)

    run = build.trainer(tmp_path, reward=slow, judge_chunks=8)
    draw = HFGenerator.__call__
    monkeypatch.setattr(HFGenerator, "__call__", nth(draw, 8, kill))
    with pytest.raises(SystemExit):
        run.train()
    assert len(judged) < 5, "the first is the dry call; of eight parts, those that had begun"
