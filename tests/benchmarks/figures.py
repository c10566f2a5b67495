"""From laps to figures: medians, ratios, distance from the floor; and what they were measured on."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console

from hfpg.report.recorder import versions
from tests.benchmarks.measure import PHASES, Run
from tests.benchmarks.work import Work


Figures = dict[str, Any]


def summary(work: Work, runs: Sequence[Run]) -> Figures:
    """Medians over the laps of all runs of one side, each run's first lap apart; memory is the largest of the runs."""
    laps = [lap for run in runs for lap in run.laps[1:]]
    found = {name for lap in laps for name in lap.phases}
    wall, cpu = median(lap.wall for lap in laps), median(lap.cpu for lap in laps)
    tokens = median(lap.completion_tokens for lap in laps)
    return {
        "library": runs[0].library,
        "laps": len(laps),
        "wall": wall,
        "cpu": cpu,
        "cpu_range": [min(lap.cpu for lap in laps), max(lap.cpu for lap in laps)],
        "phases": {
            name: [median(lap.phases.get(name, (0.0, 0.0))[clock] for lap in laps) for clock in (0, 1)]
            for name in sorted(found, key=lambda name: (*PHASES, name).index(name))
        },
        "wall_per_token": median(lap.wall / lap.completion_tokens for lap in laps),
        "cpu_per_token": median(lap.cpu / lap.completion_tokens for lap in laps),
        "samples_per_second": work.samples / wall,
        "completion_tokens": tokens,
        "prompt_tokens": median(lap.prompt_tokens for lap in laps),
        "import_mb": max(run.import_mb for run in runs),
        "beyond_import_mb": max(run.peak_mb - run.import_mb for run in runs),
    }


def ratios(ours: Figures, theirs: Figures) -> dict[str, float]:
    """How many times more the other side takes; also per token, because the two draw their own completions."""
    names = ("wall", "cpu", "wall_per_token", "cpu_per_token")
    return {name: theirs[name] / ours[name] for name in names} | {
        "memory": theirs["beyond_import_mb"] / ours["beyond_import_mb"]
    }


def about(kind: str, work: Work) -> Figures:
    """What every file of figures begins with: command, date, machine, work. No path of this machine gets in."""
    return {
        "kind": kind,
        "command": said(kind, sys.argv[1:]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(work.device),
        "work": vars(work),
        "describe": work.describe(),
    }


def console() -> Console:
    """The terminal, or lines wide enough for the tables in a file."""
    return Console() if sys.stdout.isatty() else Console(width=150)


def write(figures: Figures, path: Path) -> None:
    """Figures as JSON, to five digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rounded(figures), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def rounded(value: Any) -> Any:
    """Floats to five digits, in whatever holds them."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def said(kind: str, flags: Sequence[str]) -> str:
    """The command line, with FOLDER for paths and without the places that files are written to."""
    words, skip = [], False
    for flag in flags:
        name, _, value = flag.partition("=")
        if skip or name in ("--json", "--plot"):
            skip = not skip and not value
        elif os.sep in flag:
            words.append(f"{name}=FOLDER" if value else "FOLDER")
        else:
            words.append(flag)
    return shlex.join(["python", "-m", f"tests.benchmarks.{kind}", *words])


def machine(device: str) -> dict[str, Any]:
    """Hardware, versions, and how busy it was before the first run."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return ({} if device == "cpu" else {"gpu": torch.cuda.get_device_name()}) | {
        "cpu": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "versions": versions() | {"trl": metadata.version("trl")},
    }
