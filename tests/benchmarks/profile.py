"""Where the time of hfpg's last step goes: operators of torch by their own CPU time, and by phase.

    python -m tests.benchmarks.profile --algorithm rloo --model S

See docs/performance.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import TrainerCallback

from tests.benchmarks.figures import Figures, about, console, write
from tests.benchmarks.hfpg_side import run
from tests.benchmarks.job import QUIET
from tests.benchmarks.measure import Stopwatch
from tests.benchmarks.work import Work, add_work_flags, model_folder, work_from


MARK = "phase: "


class ProfileLastStep(TrainerCallback):
    """Switches the profiler on for one step, and marks the phases in what it records."""

    def __init__(self, step: int):
        self.step, self.profiler, self.on = step, profile(activities=[ProfilerActivity.CPU]), False

    def mark(self, phase: str) -> AbstractContextManager[Any]:
        """For the stopwatch to enter with every phase."""
        return record_function(MARK + phase) if self.on else nullcontext()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The last step begins."""
        if state.global_step + 1 == self.step:
            self.profiler.start()
            self.on = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The last step is done."""
        if self.on:
            self.on = False
            self.profiler.stop()


def by_phase(events: Iterable[Any]) -> dict[str, dict[str, float]]:
    """Seconds of each operator's own CPU time, by the innermost phase around it; Python between operators is a phase's
    own row. Operators of other threads, and those outside, are under "rest"."""
    found: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for event in events:
        around = event
        while around is not None and not around.name.startswith(MARK):
            around = around.cpu_parent
        phase = "rest" if around is None else around.name.removeprefix(MARK)
        name = "(Python, between operators)" if event.name.startswith(MARK) else event.name
        found[phase][name] += event.self_cpu_time_total / 1e6
    return {phase: dict(operators) for phase, operators in found.items()}


def report(phases: dict[str, dict[str, float]], top: int) -> Figures:
    """The operators that take most, each with its seconds by phase; and the totals of phases."""
    totals: dict[str, float] = defaultdict(float)
    for operators in phases.values():
        for name, seconds in operators.items():
            totals[name] += seconds
    largest = sorted(totals, key=lambda name: -totals[name])[:top]
    return {
        "seconds": sum(totals.values()),
        "phases": {phase: sum(operators.values()) for phase, operators in phases.items()},
        "operators": {
            name: {"total": totals[name]} | {phase: of[name] for phase, of in phases.items() if name in of}
            for name in largest
        },
    }


def table(figures: Figures) -> Table:
    """The profile for people."""
    of = figures["profile"]
    phases = sorted(of["phases"], key=lambda phase: -of["phases"][phase])
    made = Table(title=f"{figures['describe']}: {of['seconds']:.2f} s of the last step", title_justify="left")
    for column in ("operator", "s", "share", *phases):
        made.add_column(column, justify="left" if column == "operator" else "right")
    rows = {"all": {"total": of["seconds"]} | of["phases"]} | of["operators"]
    for name, seconds in rows.items():
        share = f"{seconds['total'] / of['seconds']:.1%}"
        made.add_row(name, f"{seconds['total']:.3f}", share, *(f"{seconds.get(phase, 0):.3f}" for phase in phases))
    return made


def record(work: Work, folder: Path) -> dict[str, dict[str, float]]:
    """Run hfpg's side here, the last step under the profiler."""
    os.environ.update(QUIET)
    torch.set_num_threads(work.threads)
    callback = ProfileLastStep(work.steps + 1)
    run(work, folder, Stopwatch(also=callback.mark), [callback])
    return by_phase(callback.profiler.events())


def main(argv: Sequence[str] | None = None) -> None:
    """Profile, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_flags(parser)
    parser.add_argument("--top", type=int, default=20, help="Operators shown.")
    parser.add_argument("--json", type=Path, help="Write the figures here.")
    args = parser.parse_args(argv)
    work = work_from(args)
    figures = about("profile", work)
    with tempfile.TemporaryDirectory() as place:
        folder = model_folder(args.model, work.completions, Path(place))
        figures["profile"] = report(record(work, folder), args.top)
    console().print(table(figures))
    if args.json:
        write(figures, args.json)


if __name__ == "__main__":
    main()
