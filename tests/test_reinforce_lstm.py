"""The article's example as a person runs it: `recipes/reinforce_lstm.py`, small."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hfpg.algorithms import Reinforce
from hfpg.config import ConfigError
from recipes.reinforce_lstm import Script, gradient_noise
from tests import tiny
from tests.build import trainer


ROOT = Path(__file__).parents[1]
SMALL = ["--texts", "400", "--max_steps", "1", "--prompts_per_step", "32", "--max_completion_length", "20"]
SMALL += ["--eval_prompts", "64", "--repeats", "6"]


def test_every_baseline_is_measured_and_saves_noise(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "100", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(ROOT / "recipes" / "reinforce_lstm.py"), *SMALL]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not done.stderr.strip() and not list(tmp_path.iterdir()), "it says nothing else, and leaves nothing"
    before, after = map(float, re.search(r"NLL (\S+) → (\S+) nats", done.stdout).groups())
    assert before == pytest.approx(6.93, abs=0.05), "log 1024: a fresh LSTM is almost uniform"
    assert after < before - 1
    lines = [[cell.strip() for cell in line.strip("│").split("│")] for line in done.stdout.splitlines()]
    rows = {cells[0]: cells[1:] for cells in lines if len(cells) == 6}
    assert list(rows) == ["none", "ema", "batch", "group", "greedy", "value"]
    noise = {name: float(row[0]) for name, row in rows.items()}
    assert noise["none"] > 1.3 * max(noise[name] for name in rows if name != "none")
    length = [float(row[1]) for row in rows.values()]
    assert max(length) < 1.5 * min(length), "baselines leave the mean of the gradient alone"
    assert {row[2].split()[0] for row in rows.values()} == {rows["none"][2].split()[0]}, "one start for all"
    assert float(rows["none"][4].split()[0]) > 0.5, "EOS was learnt, though it is the padding token: texts end"
    assert "The same prompts, before and after" in done.stdout


@pytest.mark.parametrize("baseline", ["none", "greedy", "group"])
def test_measuring_changes_nothing_that_training_does(tmp_path, baseline):
    method = Reinforce(baseline=baseline, num_generations=4 if baseline == "group" else 1, kl_coef=0.0)
    runs = [trainer(tmp_path / name, model=tiny.model("lstm"), algorithm=method) for name in ("plain", "measured")]
    noise, _ = gradient_noise(runs[1], repeats=3)
    assert noise > 0
    for run in runs:
        run.train()
    for plain, measured in zip(*(run.learner.actor.parameters() for run in runs), strict=True):
        assert torch.equal(plain, measured)


def test_a_value_head_learns_while_the_policy_stays(tmp_path):
    run = trainer(tmp_path, model=tiny.model("lstm"), algorithm=Reinforce(baseline="value", kl_coef=0.0))
    gradient_noise(run, repeats=2)
    for now, start in zip(run.learner.actor.policy.parameters(), tiny.model("lstm").parameters(), strict=True):
        assert torch.equal(now, start)
    assert run.learner.actor.value.linear.weight.abs().max() > 0


def test_every_rollout_is_a_new_one(tmp_path, monkeypatch):
    """Keys that come again would give the same tokens again, and too small a variance."""
    run, keys = trainer(tmp_path, model=tiny.model("lstm"), algorithm=Reinforce(kl_coef=0.0)), []
    collect = run.collect
    monkeypatch.setattr(run, "collect", lambda: keys.append((drawn := collect())[0].sample_ids) or drawn)
    gradient_noise(run, repeats=3, warm_up=2)
    assert len(torch.cat(keys).unique()) == 5 * 8
    run.train()
    assert len(torch.cat(keys).unique()) == (5 + 2) * 8


@pytest.mark.parametrize("wrong", [dict(repeats=1), dict(texts=100), dict(target=0)])
def test_what_cannot_be_measured_is_refused(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ConfigError, match=f"{name}={value} must be at least"):
        Script(**wrong)
