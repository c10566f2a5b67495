"""The RLHF road as a person runs it, for two steps: SFT, a given judge, PPO, a gold judge that watches."""

import json
import os
import subprocess
import sys
from pathlib import Path

from hfpg import embedded


ROOT = Path(__file__).parents[1]


def test_the_road_from_pairs_to_a_tuned_model(tmp_path):
    pairs = tmp_path / "pairs.jsonl"
    texts = [(f"A warm and funny film, number {i}.", f"A dull film, number {i}.") for i in range(12)]
    pairs.write_text("".join(json.dumps({"chosen": a, "rejected": b}) + "\n" for a, b in texts))
    flags = ["--pairs", str(pairs), "--judge", embedded.JUDGE_A, "--work", str(tmp_path / "work"), "--max_steps", "2"]
    flags += ["--eval_steps", "1", "--prompts_per_step", "8", "--eval_prompts", "8", "--torch_threads", "1"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "recipes" / "rlhf_pipeline.py"), *flags]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "work" / "ppo"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    evaluations = [row for row in rows if "eval_scores/judge_b" in row]
    assert len(evaluations) == 4 and evaluations[0]["eval_kl_to_ref"] == 0  # the reference is the SFT model
    assert (run / "best" / "model.safetensors").is_file() and (run / "final" / "README.md").is_file()
    assert (tmp_path / "work" / "sft" / "model.safetensors").is_file()
    assert "eval_scores/judge-a" in evaluations[-1]
