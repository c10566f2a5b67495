"""The first recipe as a person runs it: `accelerate launch recipes/ppo_gpt2.py`."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import pipeline

from hfpg import TrainConfig
from hfpg.algorithms import PPO
from hfpg.distributed import launch
from hfpg.pretrained import load_policy
from tests import tiny


ROOT = Path(__file__).parents[1]
SMALL = ["--max_steps", "2", "--prompts_per_step", "8", "--eval_prompts", "8", "--torch_threads", "1"]


def recipe(*flags, launcher=("-m", "accelerate.commands.launch"), cwd=ROOT):
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"} | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *launcher, str(ROOT / "recipes" / "ppo_gpt2.py"), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=250)


def test_the_command_of_the_readme(tmp_path):
    done = recipe(*SMALL, "--completions_steps", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "model: hfpg/tiny-gpt2-reviews, embedded in hfpg" in done.stdout
    assert "step    2/2  score" in done.stdout and "ETA" in done.stdout and "\x1b" not in done.stdout
    assert "before → after 2 steps" in done.stdout and "scores/judge_b" in done.stdout
    run = tmp_path / "runs" / "ppo-tiny-gpt2-reviews"
    assert 'pipeline("text-generation", model="runs/ppo-tiny-gpt2-reviews/final")' in done.stdout
    text = pipeline("text-generation", model=str(run / "final"))("A charming", max_new_tokens=3)[0]["generated_text"]
    assert text.startswith("A charming")
    about = json.loads((run / "run.json").read_text())
    assert about["model"] == "hfpg/tiny-gpt2-reviews" and about["config"]["max_steps"] == 2
    assert {"metrics.jsonl", "completions.jsonl", "checkpoint-2"} <= {p.name for p in run.iterdir()}
    card = (run / "final" / "README.md").read_text()
    assert "rewarded by judge-a." in card and str(tmp_path) not in card
    again = recipe(*SMALL, cwd=tmp_path)
    assert again.returncode == 0 and (tmp_path / "runs" / "ppo-tiny-gpt2-reviews-2").is_dir(), "nothing is overwritten"


def test_the_users_own_model_reward_and_data(tmp_path):
    model = tiny.model()
    model.save_pretrained(tmp_path / "model")
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "judge.py").write_text("def judge(completions, number, **k):\n    return [float(n) for n in number]\n")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny.rows(60)))
    (tmp_path / "run.yaml").write_text("max_steps: 3\nprompts_per_step: 8\nepochs: 1\nlearning_rate: 1e-4\n")
    flags = ["--config", "run.yaml", "--model", "model", "--reward", "judge.py:judge", "--dataset", "data.jsonl"]
    flags += ["--output_dir", "out", "--max_steps", "2", "--torch_threads", "1", "--max_completion_length", "5"]
    flags += ["--value_warmup", "0"]  # both steps move the policy
    config = ("--config_file", str(ROOT / "recipes" / "accelerate" / "cpu.yaml"))
    done = recipe(*flags, launcher=("-m", "accelerate.commands.launch", *config), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    about = json.loads((tmp_path / "out" / "run.json").read_text())
    assert about["config"]["max_steps"] == 2, "flags win over the file"
    assert about["config"]["learning_rate"] == 1e-4 and about["algorithm"]["epochs"] == 1, (
        "the file wins over defaults"
    )
    assert about["algorithm"]["minibatches"] == 2 and about["rewards"] == ["judge"], "judge B knows film reviews only"
    tuned = load_policy(str(tmp_path / "out" / "final"))
    gap = max((a - b).abs().max() for a, b in zip(tuned.parameters(), model.parameters(), strict=True))
    assert gap > 0


@pytest.mark.distributed
def test_the_documented_command_for_two_cpu_processes(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    done = recipe(*SMALL, "--output_dir", "run", launcher=torchrun, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2
    assert done.stdout.count("before → after 2 steps") == 1, "one process speaks"


def test_a_dataset_that_is_not_there_is_one_sentence(tmp_path):
    done = recipe("--dataset", "nothing.jsonl", launcher=(), cwd=tmp_path)
    assert done.returncode == 2 and "cannot load the data set 'nothing.jsonl'" in done.stderr
    assert "Traceback" not in done.stderr


def test_make_without_a_python_says_what_is_needed(tmp_path):
    command = ["make", "demo", "PYTHON=", f"VENV={tmp_path / 'venv'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "hfpg needs Python 3.11 or newer with its venv module" in done.stdout


def test_every_field_is_a_flag():
    done = recipe("--help", launcher=())
    assert done.returncode == 0
    fields = [f.name for cls in (PPO, TrainConfig) for f in dataclasses.fields(cls)] + ["model", "reward", "dataset"]
    missing = [name for name in fields if f"--{name}" not in done.stdout]
    assert not missing


def test_a_wrong_flag_is_one_sentence_and_exit_status_2():
    done = recipe("--learning_rat", "1", launcher=())
    assert done.returncode == 2
    assert done.stderr.strip() == "error: unknown flag '--learning_rat'; did you mean '--learning_rate'?"


def test_all_cores_are_used_where_accelerate_leaves_one(monkeypatch):
    """`accelerate launch` exports OMP_NUM_THREADS=1 for one CPU process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    launch(TrainConfig(use_cpu=True))
    assert torch.get_num_threads() == len(os.sched_getaffinity(0))
    launch(TrainConfig(use_cpu=True, torch_threads=1))
    assert torch.get_num_threads() == 1
