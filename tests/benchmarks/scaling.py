"""How hfpg's step grows: time with samples and with lengths, a line through it; memory at a fixed token budget.

    python -m tests.benchmarks.scaling --json FILE --plot FILE

Completions have their full length, so tokens are exact. Every point is a process of its own.
`--plot` needs matplotlib. See docs/performance.md.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Table

from tests.benchmarks.figures import Figures, about, console, summary, write
from tests.benchmarks.job import run_side
from tests.benchmarks.work import Work, add_work_flags, model_folder, work_from


# 1×: already more than the token budget of a forward pass; the sizes left out are those of the model
BASE = dict(completions="fixed", samples=64, completion_length=24, epochs=2, micro_positions=512)
TIMES = (1, 2, 4, 8)
SERIES = {"more samples": "samples", "longer completions": "completion_length"}


def points(work: Work, times: Sequence[int] = TIMES) -> dict[str, list[Work]]:
    """The works of both series; the token budget of a micro-batch stays as it is."""
    return {
        name: [replace(work, **{field: getattr(work, field) * n}) for n in times] for name, field in SERIES.items()
    }


def line(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """The line y = start + slope · x of the least squares of relative errors, the largest of them, and the exponent.

    The exponent is the slope in logarithms: y ∝ x^exponent, 1 where there is no overhead.
    """
    slope, start = fit(x, y, [1 / b**2 for b in y])
    residual = max(abs(b - start - slope * a) / b for a, b in zip(x, y, strict=True))
    exponent, _ = fit([math.log(a) for a in x], [math.log(b) for b in y], [1.0] * len(x))
    return {"slope": slope, "start": start, "residual": residual, "exponent": exponent}


def fit(x: Sequence[float], y: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept by weighted least squares."""
    points = list(zip(x, y, weights, strict=True))
    mean_x, mean_y = (sum(w * p[i] for *p, w in points) / sum(weights) for i in (0, 1))
    slope = sum(w * (a - mean_x) * (b - mean_y) for a, b, w in points)
    slope /= sum(w * (a - mean_x) ** 2 for a, _, w in points)
    return slope, mean_y - slope * mean_x


def measure(works: Sequence[Work], folder: Path) -> list[Figures]:
    """One point after the other."""
    found = []
    for work in works:
        print(f"{work.samples} samples of {work.completion_length} tokens", file=sys.stderr)
        of = summary(work, [run_side("hfpg", work, folder)])
        found.append({"samples": work.samples, "completion_length": work.completion_length} | of)
    return found


def report(series: dict[str, list[Figures]]) -> Figures:
    """The points of each series, and lines through wall and CPU seconds over completion tokens."""
    out: Figures = {}
    for name, of in series.items():
        tokens = [point["completion_tokens"] for point in of]
        lines = {clock: line(tokens, [point[clock] for point in of]) for clock in ("wall", "cpu")}
        out[name] = {"points": of, "lines": lines}
    return out


def tables(figures: Figures) -> list[Table]:
    """The series for people."""
    made = []
    for name, series in figures["series"].items():
        of = series["lines"]["cpu"]
        title = (
            f"{name}: {1000 * of['slope']:.3f} CPU s per 1000 tokens {of['start']:+.3f} s, largest residual "
            f"{of['residual']:.1%}, time ∝ tokens^{of['exponent']:.2f}"
        )
        made.append(Table("samples", "length", "tokens", "wall s", "CPU s", "MB beyond import", title=title))
        for point in series["points"]:
            sizes = (str(point["samples"]), str(point["completion_length"]), f"{point['completion_tokens']:.0f}")
            seconds = (f"{point['wall']:.2f}", f"{point['cpu']:.2f}")
            made[-1].add_row(*sizes, *seconds, f"{point['beyond_import_mb']:.0f}")
    return made


def plot(figures: Figures, path: Path) -> None:
    """CPU seconds with their line, and memory, over completion tokens; the format is that of the file's name."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("error: --plot needs matplotlib; `pip install matplotlib`, or leave --plot out") from None
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    time, memory = figure.subplots(1, 2)
    for name, series in figures["series"].items():
        of, tokens = series["lines"]["cpu"], [point["completion_tokens"] for point in series["points"]]
        (dots,) = time.plot(tokens, [point["cpu"] for point in series["points"]], "o", label=name)
        time.plot(tokens, [of["start"] + of["slope"] * x for x in tokens], color=dots.get_color(), linewidth=1)
        memory.plot(tokens, [point["beyond_import_mb"] for point in series["points"]], "o-", label=name)
    for axes, label in ((time, "CPU seconds of a step"), (memory, "peak MB beyond import")):
        top = 1.1 * axes.get_ylim()[1]
        axes.set(xlabel="completion tokens of a step", ylabel=label, xlim=(0, None), ylim=(0, top))
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_work_flags(parser)
    parser.set_defaults(**BASE)
    parser.add_argument("--json", type=Path, help="Write the figures here.")
    parser.add_argument("--plot", type=Path, help="Draw them here: .png or .svg.")
    args = parser.parse_args(argv)
    work = work_from(args)
    figures = about("scaling", work)
    with tempfile.TemporaryDirectory() as place:
        folder = model_folder(args.model, work.completions, Path(place))
        figures["series"] = report({name: measure(of, folder) for name, of in points(work).items()})
    for made in tables(figures):
        console().print(made)
    if args.json:
        write(figures, args.json)
    if args.plot:
        plot(figures, args.plot)


if __name__ == "__main__":
    main()
