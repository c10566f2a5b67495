"""One process and two (gloo): the same tokens, the same gradient, the same parameters."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from hfpg.config import ConfigError
from tests import build


ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
pytestmark = pytest.mark.distributed


def launch(command, **environment):
    env = {k: v for k, v in os.environ.items() if k not in ("WORLD_SIZE", "RANK", "LOCAL_RANK")}
    env |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(command, env=env | environment, cwd=ROOT, capture_output=True, text=True, timeout=280)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The worker's findings with one process and with two."""
    folder, found = tmp_path_factory.mktemp("ranks"), []
    for start in ([sys.executable], TORCHRUN):
        out = str(folder / f"{len(start)}.pt")
        done = launch([*start, "tests/distributed/worker.py", out])
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(torch.load(out, weights_only=True))
    assert [r["world"] for r in found] == [1, 2]
    return found


def test_the_same_tokens(results):
    one, two = results
    compared = one["many"].numel()
    mismatches = int((one["many"] != two["many"]).sum())
    print(f"{compared} tokens compared, {mismatches} mismatches")
    assert compared > 100_000 and mismatches == 0
    for a, b in zip(one["tokens"], two["tokens"], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(one["scores"], two["scores"], strict=True):
        assert torch.equal(a, b)


def test_the_same_gradient(results):
    one, two = results
    for name in ("gradient", "one_row"):
        assert one[name].norm() > 0
        assert (one[name] - two[name]).norm() / one[name].norm() < 1e-6, name


def test_the_same_parameters_after_ten_adamw_steps(results):
    one, two = results
    learning_rate, gap = 1e-3, (one["parameters"] - two["parameters"]).abs()
    # a key bias adds the same to every attention score of a query, which the softmax ignores: its true gradient is 0,
    # and Adam scales the rounding noise in its place up to steps of the size of the learning rate
    noise = one["key_bias"]
    assert one["gradient"][noise].abs().max() < 1e-7 < one["gradient"][~noise].abs().median()
    assert gap[~noise].max() < 0.02 * learning_rate
    assert gap[noise].max() < learning_rate


def test_what_one_rank_sees_both_follow(tmp_path):
    done = launch([*TORCHRUN, "tests/distributed/flags.py", str(tmp_path)])
    assert done.returncode == 0, done.stderr[-3000:]


OTHERS = ("trpo", "trpo-critic", "dapo", "remax", "replay", "bootstrap", "top-layer")


@pytest.mark.parametrize("name", OTHERS)
def test_other_methods_do_the_same(results, name):
    """Natural steps, prompts drawn again, greedy baselines, stored rollouts, running moments: tokens and metrics."""
    one, two = (r["others"][name] for r in results)
    assert one["position"] == two["position"]
    assert all(torch.equal(a, b) for a, b in zip(one["tokens"], two["tokens"], strict=True))
    for a, b in zip(one["metrics"], two["metrics"], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-5)


def test_the_same_evaluation(results):
    one, two = (r["evaluation"] for r in results)
    assert one.keys() == two.keys()
    assert all(one[k] == pytest.approx(two[k], abs=1e-4) for k in one)


def test_two_processes_of_which_accelerate_sees_one_are_refused(tmp_path, monkeypatch):
    """An FSDP configuration on a CPU does this: both would train alone and write over each other's files."""
    Accelerator(cpu=True)  # sees one process, and keeps to it
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="launched as 2 processes, but Accelerate sees 1.*torchrun --standalone"):
        build.trainer(tmp_path / "run")


def test_a_finished_run_leaves_no_thread_of_the_group(tmp_path):
    """One that outlives the group may ask a dying interpreter for its lock, and aborts the process then."""
    code = "\n".join(
        [
            "import atexit, glob, sys",
            "def threads():",
            "    return sorted({open(f).read().strip() for f in glob.glob('/proc/self/task/*/comm')})",
            f"out = {str(tmp_path)!r}",
            "atexit.register(lambda: open(f'{out}/{rank}', 'w').write(' '.join([*before, '->', *threads()])))",
            "from tests import build",  # what was registered first is called last
            "trainer = build.trainer(out + '/run', max_steps=1)",
            "trainer.train()",
            "rank, before = trainer.accelerator.process_index, threads()",
        ]
    )
    (tmp_path / "run.py").write_text(code)
    done = launch([*TORCHRUN, str(tmp_path / "run.py")])
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in "01":
        before, after = (tmp_path / rank).read_text().split("->")
        assert "gloo" in before and "gloo" not in after


def test_a_process_that_waits_too_long_ends_the_run_and_what_was_trained_is_saved(tmp_path):
    code = "\n".join(
        [
            "import os, time",
            "from tests import build",
            "calls = []",
            "def judge(completions, **k):",
            "    calls.append(1)",
            "    if os.environ['RANK'] == '1' and len(calls) == 4: time.sleep(30)",
            "    return [0.0] * len(completions)",
            f"build.trainer({str(tmp_path / 'run')!r}, reward=judge, ddp_timeout=3, max_steps=9).train()",
        ]
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    done = launch([*TORCHRUN, str(script)])
    assert done.returncode != 0 and "Timed out waiting" in done.stderr
    (saved,) = (tmp_path / "run").glob("checkpoint-*")
    assert (saved / "hfpg_state.json").is_file() and str(saved) in done.stdout


def test_an_error_in_one_ranks_judge_ends_both(tmp_path):
    code = "\n".join(
        [
            "import os, sys",
            "from tests import build",
            "def judge(completions, **k):",
            "    if os.environ['RANK'] == '1' and len(completions) == 4: raise ValueError('rank one only')",
            "    return [0.0] * len(completions)",
            f"build.trainer({str(tmp_path / 'run')!r}, reward=judge).train()",
        ]
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    done = launch([*TORCHRUN, str(script)])
    assert done.returncode != 0
    assert "rank one only" in done.stderr and "rank 1 failed" in done.stderr
