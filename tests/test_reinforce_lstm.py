"""The article's example as a person runs it: `recipes/reinforce_lstm.py`, small."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hfpg.config import ConfigError
from recipes import reinforce_lstm


ROOT = Path(__file__).parents[1]
SMALL = ["--texts", "400", "--max_steps", "2", "--prompts_per_step", "32", "--max_completion_length", "20"]
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
    lines = [re.split(r" {2,}", line.strip()) for line in done.stdout.splitlines()]
    assert ["method", "noise", "‖E g‖", "score", "words", "ends by itself"] in lines
    rows = {cells[0]: cells[1:] for cells in lines if len(cells) == 6 and cells[0] != "method"}
    assert list(rows) == ["none", "ema", "batch", "group", "greedy", "value"]
    noise = {name: float(row[0]) for name, row in rows.items()}
    assert noise["none"] > 1.3 * max(noise[name] for name in rows if name != "none")
    length = [float(row[1]) for row in rows.values()]
    assert max(length) < 1.5 * min(length), "baselines leave the mean of the gradient alone"
    assert {row[2].split()[0] for row in rows.values()} == {rows["none"][2].split()[0]}, "one start for all"
    assert float(rows["none"][4].split()[0]) > 0.5, "EOS was learnt, though it is the padding token: texts end"
    assert "The same prompts, before and after" in done.stdout


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--repeats", "1"], "repeats=1 must be at least 2"),
        (
            ["--texts", "100"],
            r"\d+ texts are given and 128 of them held out, .*; give more texts, such as 1280",
        ),
        (["--prompts_per_step", "30"], "prompts_per_step=30 completions are no whole groups of num_generations=4"),
        (["--baselines", "best"], "baseline='best' is unknown"),
        (["--eval_prompts", "-5"], "eval_prompts=-5 must be at least 1"),
        (["--target", "0"], "target=0 must be at least 1, such as 8"),
        (["--sft_epochs", "-1"], "sft_epochs=-1.0 must be at least 0, such as 8.0"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags, sentence, monkeypatch):
    words = ["--texts", "300", "--sft_epochs", "0.1", "--eval_prompts", "8", "--max_completion_length", "8", *flags]
    monkeypatch.setattr(sys, "argv", ["reinforce_lstm.py", *words])
    with pytest.raises(ConfigError, match=sentence):
        reinforce_lstm.main()
