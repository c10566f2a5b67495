"""One step of hfpg and of TRL on the same work, in turn, in one run: seconds by phase, tokens, memory, floor.

    python -m tests.benchmarks.step --algorithm rloo --model S --against trl
    python -m tests.benchmarks.step --algorithm ppo --model M --completions fixed --against trl --trl-ppo-path FOLDER

Every side runs in a process of its own, `--rounds` times, the sides taking turns. The first step of a process is
warm-up. See docs/performance.md.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import AutoConfig

from tests.benchmarks.figures import Figures, about, console, ratios, summary, write
from tests.benchmarks.floor import Rates, Weights, fastest, floor, matrix_weights, measured_rates
from tests.benchmarks.job import run_side
from tests.benchmarks.measure import Run
from tests.benchmarks.work import Work, add_work_flags, model_folder, work_from


TITLES = {"hfpg": "hfpg", "trl": "TRL", "trl-malloc": "TRL, malloc tuned"}


def sides(args: argparse.Namespace) -> list[str]:
    """The sides that run, in their order."""
    theirs = {"default": ["trl"], "tuned": ["trl-malloc"], "both": ["trl", "trl-malloc"]}[args.malloc]
    return ["hfpg", *(theirs if args.against == "trl" else [])]


def measure(work: Work, folder: Path, names: Sequence[str], rounds: int, trl_path: str | None) -> dict[str, list[Run]]:
    """Runs of every side; the sides take turns, so that a busy neighbour disturbs all of them. A round has a seed."""
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            print(f"round {number + 1} of {rounds}: {TITLES[name]}", file=sys.stderr)
            runs[name].append(run_side(name, replace(work, seed=work.seed + number), folder, trl_path))
    return runs


def report(work: Work, runs: dict[str, list[Run]], weights: Weights, rates: tuple[Rates, Rates]) -> Figures:
    """All figures of a comparison. The floor is that of hfpg's work; `distance` is its step ÷ the floor.

    There is no floor where only some layers learn.
    """
    found = {name: summary(work, of) for name, of in runs.items()}
    ours = found["hfpg"]
    tokens = (ours["prompt_tokens"], ours["completion_tokens"])
    by_clock = {} if work.trainable_layers is not None else dict(zip(("wall", "cpu"), rates, strict=True))
    if work.device != "cpu":
        by_clock.pop("cpu", None)
    floors = {clock: floor(work, weights, *tokens, rate) for clock, rate in by_clock.items()}
    return {
        "sides": found,
        "ratios": {name: ratios(ours, theirs) for name, theirs in found.items() if name != "hfpg"},
        "rates": {clock: vars(rate) for clock, rate in by_clock.items()},
        "floor": floors,
        "distance": {clock: ours[clock] / floors[clock]["total"] for clock in floors},
    }


# ── on the screen


def table(figures: Figures) -> Table:
    """The comparison for people."""
    found = figures["sides"]
    made = Table(title=figures["describe"], title_justify="left")
    made.add_column("")
    for name in found:
        made.add_column(TITLES[name], justify="right")

    def row(label: str, form: str, value: Any) -> None:
        made.add_row(label, *(form.format(value(of)) for of in found.values()))

    row("library", "{}", lambda of: of["library"])
    row("step, wall s", "{:.2f}", lambda of: of["wall"])
    row("step, CPU s", "{:.2f}", lambda of: of["cpu"])
    row("  least … most", "{0[0]:.2f} … {0[1]:.2f}", lambda of: of["cpu_range"])
    clock, label = (1, "CPU s") if figures["work"]["device"] == "cpu" else (0, "wall s")
    for phase in dict.fromkeys(name for of in found.values() for name in of["phases"]):
        row(f"  {phase}, {label}", "{:.2f}", lambda of, phase=phase: of["phases"].get(phase, [0.0, 0.0])[clock])
    row("samples a second", "{:.2f}", lambda of: of["samples_per_second"])
    row("completion tokens", "{:.0f}", lambda of: of["completion_tokens"])
    row("prompt tokens", "{:.0f}", lambda of: of["prompt_tokens"])
    row("MB after import", "{:.0f}", lambda of: of["import_mb"])
    row("peak MB beyond it", "{:.0f}", lambda of: of["beyond_import_mb"])
    for name, label in LABELS.items():
        cells = [f"{figures['ratios'][side][name]:.2f}" if side != "hfpg" else "" for side in found]
        if figures["ratios"]:
            made.add_row(label, *cells)
    return made


LABELS = {
    "wall": "÷ hfpg, wall",
    "cpu": "÷ hfpg, CPU",
    "wall_per_token": "÷ hfpg, wall per token",
    "cpu_per_token": "÷ hfpg, CPU per token",
    "memory": "÷ hfpg, memory",
}


def floor_lines(figures: Figures) -> list[str]:
    """The floor and the distance from it, by both clocks."""
    lines = []
    for clock, parts in figures["floor"].items():
        name, rate = {"wall": "wall", "cpu": "CPU"}[clock], figures["rates"][clock]
        shares = ", ".join(f"{part} {parts[part]:.2f}" for part in parts if part != "total")
        lines.append(
            f"floor, {name}: {parts['total']:.2f} s ({shares}) at {rate['large']:.1f} GF/s, decoding at "
            f"{rate['skinny']:.1f}; hfpg takes {figures['distance'][clock]:.2f} × the floor"
        )
        if figures["distance"][clock] < 1:
            lines.append("  no step is faster than its floor: other processes slowed the products down; measure again")
    return lines


def flags() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_flags(parser)
    parser.add_argument("--against", choices=("trl", "none"), default="trl")
    parser.add_argument("--malloc", choices=("default", "tuned", "both"), default="both", help="Of TRL's side.")
    parser.add_argument("--trl-ppo-path", help="Folder with TRL 1.12.0, the last that has PPO.")
    parser.add_argument("--rounds", type=int, default=2, help="Processes per side; the sides take turns.")
    parser.add_argument("--json", type=Path, help="Write the figures here.")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, and write the figures."""
    args = flags().parse_args(argv)
    if args.algorithm == "ppo" and args.against == "trl" and args.trl_ppo_path is None:
        raise SystemExit(
            "error: TRL has no PPO since 1.13; `pip install --no-deps --target FOLDER trl==1.12.0` and give "
            "--trl-ppo-path FOLDER, or --against none"
        )
    if args.algorithm == "ppo" and args.against == "trl" and args.minibatches not in (None, 1):
        raise SystemExit("error: TRL's PPO accumulates over the whole batch; compare with --minibatches 1")
    if args.trainable_layers is not None and args.against == "trl":
        raise SystemExit("error: --trainable-layers is for hfpg alone; add --against none")
    work = work_from(args)
    with tempfile.TemporaryDirectory() as place:
        folder = model_folder(args.model, work.completions, Path(place))
        figures = about("step", work)
        config = AutoConfig.from_pretrained(folder)
        weights = matrix_weights(config)
        rates = measured_rates(work, config.hidden_size, weights)
        runs = measure(work, folder, sides(args), args.rounds, args.trl_ppo_path if args.algorithm == "ppo" else None)
        rates = fastest(rates, measured_rates(work, config.hidden_size, weights))
    figures |= report(work, runs, weights, rates)
    console().print(table(figures), *floor_lines(figures), sep="\n", highlight=False)
    if args.json:
        write(figures, args.json)


if __name__ == "__main__":
    main()
