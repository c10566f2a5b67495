"""Writes the tables of docs/performance.md from docs/performance/*.json.

python -m tests.benchmarks.table            write them
python -m tests.benchmarks.table --check    fail if the page says something else than the files
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.benchmarks.figures import Figures
from tests.benchmarks.job import ROOT
from tests.benchmarks.measure import PHASES


PAGE = ROOT / "docs" / "performance.md"
PLOT = ROOT / "docs" / "performance" / "scaling.svg"
NOTHING = "Not measured yet."


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured_on(found: Sequence[Figures]) -> str:
    """When, on what, with which versions, by which commands."""
    places: dict[str, list[Figures]] = {}
    for of in found:
        versions = ", ".join(f"{n} {of['machine']['versions'][n]}" for n in ("python", "torch", "transformers"))
        card = f"{of['machine']['gpu']}, " if "gpu" in of["machine"] else ""
        place = f"Measured on {of['date']}, {card}{of['machine']['cpu']}, {of['machine']['cores']} cores; {versions}."
        places.setdefault(place, []).append(of)
    parts = []
    for place, here in places.items():
        busiest = max(of["machine"]["load"] for of in here)
        commands = "\n".join(of["command"] for of in here)
        parts.append(f"{place} Load average before the first run: at most {busiest:.1f}.\n\n```\n{commands}\n```")
    return "\n\n".join(parts)


def pair(form: str, *values: float | None) -> str:
    """Values beside each other, an empty place for one that was not measured."""
    return " / ".join("" if value is None else form.format(value) for value in values)


# ── sections of the page


def steps(found: Sequence[Figures]) -> str:
    """One row for a piece of work: seconds, ratios, tokens, memory, floor. TRL's figures: default / malloc tuned."""
    columns = (
        "work",
        "threads",
        "steps",
        "hfpg, s wall / CPU",
        "TRL, s wall",
        "TRL, s CPU",
        "× wall",
        "× CPU",
        "× wall per token",
        "× CPU per token",
        "tokens, hfpg / TRL",
        "MB, hfpg / TRL / tuned",
        "÷ floor, wall / CPU",
    )
    return markdown(columns, [step_row(of) for of in found])


def step_row(of: Figures) -> list[str]:
    """The cells of one comparison."""
    ours, both = of["sides"]["hfpg"], [of["sides"].get(name) for name in ("trl", "trl-malloc")]
    more = [of["ratios"].get(name) for name in ("trl", "trl-malloc")]
    theirs = next((side for side in both if side), None)

    def each(form: str, of_each: Sequence[Figures | None], name: str) -> str:
        return pair(form, *(None if one is None else one[name] for one in of_each))

    return [
        of["describe"],
        str(of["work"]["threads"]),
        str(ours["laps"]),
        pair("{:.2f}", ours["wall"], ours["cpu"]),
        each("{:.2f}", both, "wall"),
        each("{:.2f}", both, "cpu"),
        each("{:.2f}", more, "wall"),
        each("{:.2f}", more, "cpu"),
        each("{:.2f}", more, "wall_per_token"),
        each("{:.2f}", more, "cpu_per_token"),
        pair("{:.0f}", ours["completion_tokens"], theirs and theirs["completion_tokens"]),
        each("{:.0f}", [ours, *both], "beyond_import_mb"),
        pair("{:.2f}", *of["distance"].values()),
    ]


def phases(found: Sequence[Figures]) -> str:
    """CPU seconds of every phase, one row for a side."""
    rows = []
    for of in found:
        for name, side in of["sides"].items():
            label = side["library"] + (", malloc tuned" if name == "trl-malloc" else "")
            seconds = [side["phases"].get(phase) for phase in PHASES]
            cells = ["" if one is None else f"{one[1]:.2f}" for one in seconds]
            rows.append([of["describe"], label, *cells])
    return markdown(("work", "side", *PHASES), rows)


def gpu(found: Sequence[Figures]) -> str:
    """One row for a piece of work on a GPU: seconds on the clock, hfpg / TRL."""
    columns = ("work", "card", "steps", "s", "×", "× per token", *PHASES, "tokens", "GB", "÷ floor")
    rows = []
    for of in found:
        ours, theirs = of["sides"]["hfpg"], of["sides"].get("trl")
        ratio = of["ratios"].get("trl", {})
        both = [side for side in (ours, theirs) if side]

        def each(form: str, value: Callable[[Figures], float], both: Sequence[Figures] = both) -> str:
            return pair(form, *(value(side) for side in both))

        rows.append(
            [of["describe"], of["machine"]["gpu"], str(ours["laps"]), each("{:.2f}", lambda side: side["wall"])]
            + [f"{ratio[name]:.2f}" if name in ratio else "" for name in ("wall", "wall_per_token")]
            + [each("{:.2f}", lambda side, phase=phase: side["phases"].get(phase, (0.0,))[0]) for phase in PHASES]
            + [each("{:.0f}", lambda side: side["completion_tokens"])]
            + [each("{:.1f}", lambda side: side["beyond_import_mb"] / 1024), pair("{:.2f}", *of["distance"].values())]
        )
    return markdown(columns, rows)


def scaling(found: Sequence[Figures]) -> str:
    """Points and lines of every series."""
    rows, lines = [], []
    for of in found:
        for name, series in of["series"].items():
            line = series["lines"]["cpu"]
            lines.append(
                f"- {of['work']['algorithm'].upper()}, {of['work']['model']}, {name}: "
                f"{1000 * line['slope']:.3f} CPU seconds per 1000 tokens {line['start']:+.3f} s; largest residual "
                f"{100 * line['residual']:.1f} %; time ∝ tokens^{line['exponent']:.2f}"
            )
            for point in series["points"]:
                sizes = (point["samples"], point["completion_length"], round(point["completion_tokens"]))
                seconds = (f"{point['wall']:.2f}", f"{point['cpu']:.2f}", f"{point['beyond_import_mb']:.0f}")
                rows.append([name, *map(str, sizes), *seconds])
    columns = ("series", "samples", "length", "tokens", "s wall", "s CPU", "peak MB beyond import")
    drawn = [f"![Growth]({PLOT.relative_to(PAGE.parent)})"] if PLOT.exists() else []
    return "\n\n".join(["\n".join(lines), *drawn, markdown(columns, rows)])


def profiles(found: Sequence[Figures]) -> str:
    """The operators of every profile, with their share and the phases that they stand in."""
    parts = []
    for of in found:
        profile = of["profile"]
        names = [phase for phase in PHASES if phase in profile["phases"]]
        entries = {"all": {"total": profile["seconds"]} | profile["phases"]} | profile["operators"]
        rows = [
            [f"`{name}`" if "::" in name else name, f"{seconds['total']:.3f}"]
            + [f"{100 * seconds['total'] / profile['seconds']:.1f} %"]
            + [f"{seconds[phase]:.3f}" if phase in seconds else "" for phase in names]
            for name, seconds in entries.items()
        ]
        parts.append(f"{of['describe']}:\n\n" + markdown(("operator", "s", "share", *names), rows))
    return "\n\n".join(parts)


SECTIONS: dict[str, tuple[str, str, Callable[[Sequence[Figures]], str]]] = {
    "step": ("step", "cpu", steps),
    "phases": ("step", "cpu", phases),
    "gpu": ("step", "cuda", gpu),
    "scaling": ("scaling", "cpu", scaling),
    "profile": ("profile", "cpu", profiles),
}


def render(page: str, found: Sequence[Figures]) -> str:
    """The page with its tables between `<!-- NAME -->` and `<!-- /NAME -->` made new."""
    for name, (kind, device, section) in SECTIONS.items():
        of = [f for f in found if f["kind"] == kind and f["work"].get("device", "cpu") == device]
        source = "" if name == "phases" else measured_on(of) + "\n\n"
        text = f"{source}{section(of)}" if of else NOTHING
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if page.count(begin) != 1 or page.count(end) != 1:
            raise SystemExit(f"error: the page needs {begin} and {end}, once each")
        before, _, rest = page.partition(begin)
        page = f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}"
    return page


def read(folder: Path) -> list[Figures]:
    """All figures of a folder, by file name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def main(argv: Sequence[str] | None = None) -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", action="store_true", help="Write nothing; fail if the page is not what it should be."
    )
    args = parser.parse_args(argv)
    page = PAGE.read_text(encoding="utf-8")
    made = render(page, read(PAGE.with_suffix("")))
    if args.check and made != page:
        raise SystemExit("error: docs/performance.md differs from its files; run python -m tests.benchmarks.table")
    if not args.check:
        PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
