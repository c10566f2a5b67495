"""A side in a process of its own: the work goes in as JSON, its run comes out as JSON."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from tests.benchmarks.measure import Lap, Run
from tests.benchmarks.work import Work


ROOT = Path(__file__).parents[2]
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1073741824", "MALLOC_TRIM_THRESHOLD_": "2147483647"}
"""glibc keeps the blocks it has; by default it gives those above 32 MB back, and fresh pages are slow."""
SIDES = {
    "hfpg": ("tests.benchmarks.hfpg_side", {}),
    "trl": ("tests.benchmarks.trl_side", {}),
    "trl-malloc": ("tests.benchmarks.trl_side", MALLOC),
}
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}


def run_side(side: str, work: Work, folder: Path, trl_path: str | None = None) -> Run:
    """Run one side in a fresh process and wait for it.

    `trl_path`: a folder whose `trl` comes before the installed one. Raises RuntimeError with what the process said.
    """
    module, allocator = SIDES[side]
    inherited = {name: value for name, value in os.environ.items() if name not in MALLOC}
    threads = {name: str(work.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    paths = [trl_path] if trl_path and side != "hfpg" else []
    place_of_work = {"ACCELERATE_USE_CPU": str(work.device == "cpu").lower()}
    path = {"PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])}
    with tempfile.TemporaryDirectory() as place:
        Path(place, "work.json").write_text(json.dumps(dataclasses.asdict(work)))
        done = subprocess.run(
            [sys.executable, "-m", module, place, str(folder)],
            cwd=ROOT,
            env=inherited | QUIET | place_of_work | threads | allocator | path,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise RuntimeError(f"{side} ended with {done.returncode}:\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}")
        return read_run(json.loads(Path(place, "run.json").read_text()))


def read_run(found: dict) -> Run:
    """A Run from its JSON."""
    laps = [Lap(**lap | {"phases": {k: tuple(v) for k, v in lap["phases"].items()}}) for lap in found.pop("laps")]
    return Run(laps=laps, **found)


def serve(run: Callable[[Work, Path], Run]) -> None:
    """The other end of `run_side`: do the work of the folder given on the command line."""
    place, folder = Path(sys.argv[1]), Path(sys.argv[2])
    work = Work(**json.loads((place / "work.json").read_text()))
    torch.set_num_threads(work.threads)
    found = run(work, folder)
    check(work, found)
    (place / "run.json").write_text(json.dumps(dataclasses.asdict(found)))


def check(work: Work, found: Run) -> None:
    """Raise RuntimeError unless the side did the work that it was given: steps, and optimizer steps in each."""
    steps = [lap.optimizer_steps for lap in found.laps]
    wanted = [work.epochs * work.minibatches] * (work.steps + 1)
    if steps != wanted:
        raise RuntimeError(f"{found.library} took {steps} optimizer steps in its laps; the work has {wanted}")
