"""The RLHF road as a person runs it, for two steps: a reward model from pairs, SFT, PPO, a gold judge that watches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hfpg import embedded
from hfpg.config import ConfigError
from recipes import rlhf_pipeline


ROOT = Path(__file__).parents[1]
SMALL = ["--max_steps", "2", "--eval_steps", "1", "--prompts_per_step", "8", "--eval_prompts", "8"]


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    texts = [(f"A warm and funny film, number {i}.", f"A dull film, number {i}.") for i in range(12)]
    path.write_text("".join(json.dumps({"chosen": a, "rejected": b}) + "\n" for a, b in texts))
    return path


def road(folder, *flags):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "recipes" / "rlhf_pipeline.py"), *SMALL, "--torch_threads", "1"]
    command += ["--work", str(folder / "work"), *map(str, flags)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)


def test_the_road_from_pairs_to_a_tuned_model(tmp_path, pairs):
    done = road(tmp_path, "--pairs", pairs)
    assert done.returncode == 0, done.stderr[-2000:]
    work = tmp_path / "work"
    for made in ("judge/training.json", "judge/README.md", "sft/model.safetensors", "ppo/best/model.safetensors"):
        assert (work / made).is_file(), made
    assert (work / "ppo" / "final" / "README.md").is_file()
    rows = [json.loads(line) for line in (work / "ppo" / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "eval_scores/judge_b" in row]
    assert len(evaluations) == 4 and abs(evaluations[0]["eval_kl_to_ref"]) < 1e-5  # the reference is the SFT model
    assert "eval_scores/judge" in evaluations[-1]
    assert "before → after 2 steps" in done.stdout and "pair accuracy" in done.stdout


def test_stages_that_exist_are_used_again(tmp_path, pairs):
    first = road(tmp_path, "--pairs", pairs, "--judge", embedded.JUDGE_A)
    assert first.returncode == 0, first.stderr[-2000:]
    assert not (tmp_path / "work" / "judge").exists(), "a judge that exists is not made"
    made = (tmp_path / "work" / "sft" / "model.safetensors").stat().st_mtime_ns
    again = road(tmp_path, "--pairs", pairs, "--judge", embedded.JUDGE_A, "--output_dir", tmp_path / "again")
    assert again.returncode == 0, again.stderr[-2000:]
    assert (tmp_path / "work" / "sft" / "model.safetensors").stat().st_mtime_ns == made
    metrics = (tmp_path / "again" / "metrics.jsonl").read_text()
    assert "eval_scores/judge-a" in metrics


def test_stages_of_something_else_are_not_used(tmp_path, stages):
    (tmp_path / "work" / "sft").mkdir(parents=True)
    stages("--sft_epochs", "2")  # of stages from before, nobody knows
    for flag, value in (("--model", "gpt2"), ("--pairs", "own.jsonl"), ("--sft_epochs", "3")):
        started, said = stages("--sft_epochs", "2", flag, value)
        assert started == [] and said.startswith("work holds stages made with {'") and "name another folder" in said
    (tmp_path / "work" / "sft").rmdir()
    assert stages("--model", "gpt2")[0], "nothing is made yet"


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """`run(flags)` records which scripts are started, and ends before the model loads."""
    started = []

    def start(command):
        started.append([Path(command[1]).name, *map(str, command[2:])])
        return subprocess.CompletedProcess(command, 1)

    def run(*flags):
        started.clear()
        monkeypatch.setattr(sys, "argv", ["rlhf_pipeline.py", "--work", "work", *map(str, flags)])
        with pytest.raises(ConfigError) as caught:
            rlhf_pipeline.main()
        return started, str(caught.value)

    monkeypatch.setattr(rlhf_pipeline.subprocess, "run", start)
    monkeypatch.chdir(tmp_path)
    return run


def test_what_is_not_given_is_made(tmp_path, stages):
    film = ["film_judge.py", "--output_dir", "work/judge"]
    assert stages() == ([film], "reward_models/film_judge.py made no reward model: see above")
    assert stages("--judge", "user/judge")[0] == [film], "its pairs are needed"
    own = ["train.py", "--model", "gpt2", "--dataset", "own.jsonl", "--output_dir", "work/judge"]
    assert stages("--model", "gpt2", "--pairs", "own.jsonl")[0] == [own]
    (tmp_path / "work" / "judge").mkdir(parents=True)
    (tmp_path / "work" / "judge" / "config.json").write_text("{}")
    assert stages()[0] == [film], "a reward model that was interrupted is made again"
    (tmp_path / "work" / "judge" / "training.json").write_text("{}")
    (tmp_path / "work" / "stages.json").unlink()
    assert stages("--pairs", "own.jsonl")[1] == "cannot read the preferences own.jsonl: No such file or directory"
    assert stages("--pairs", "own.jsonl")[0] == []
