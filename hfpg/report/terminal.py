"""What a person sees: a live view in a terminal, plain lines elsewhere. Safe against hostile text."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text


CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
COLUMNS = (  # metric, heading, format
    ("score", "score", "+.3f"),
    ("kl_to_ref", "KL", "z.2f"),  # z: rounding gives no -0.00
    ("entropy", "entropy", ".2f"),
    ("length", "length", ".1f"),
    ("tokens_per_second", "tokens/s", ",.0f"),
)


def printable(text: object, limit: int = 300) -> Text:
    """Foreign text, fit for a terminal: no control or direction characters, no markup, cut at `limit`."""
    clean = CONTROL.sub(lambda m: "⏎" if m[0] == "\n" else "·", str(text))
    return Text(clean if len(clean) <= limit else clean[: limit - 1] + "…")


def signed(score: float | None, form: str = "+.2f") -> str:
    """A score; a dash where there is none."""
    return "–" if score is None or math.isnan(score) else format(score, form)


def spoken(seconds: float) -> str:
    """A duration as 42s, 3m05s or 2h10m."""
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole // 60 % 60:02d}m"


class Terminal:
    """Progress of a run. In a terminal: a bar and the current numbers, redrawn in place. Elsewhere: a line per log.

    Args:
        total: steps of the whole run.
        plain: never redraw, whatever the console is.
        quiet: show nothing (ranks other than the main one).
    """

    def __init__(self, total: int, *, plain: bool = False, quiet: bool = False, console: Console | None = None):
        self.console = console or Console(quiet=quiet, highlight=False)
        if hasattr(self.console.file, "reconfigure"):  # a pipe that takes no Unicode must not end a run
            self.console.file.reconfigure(errors="replace")
        self.total, self.started, self.first_step = total, time.monotonic(), 0
        self.live: Live | None = None
        if self.console.is_terminal and not self.console.is_dumb_terminal and not plain and not quiet:
            self.live = Live(console=self.console, refresh_per_second=4, transient=True)

    def start(self, step: int) -> None:
        """Begin (or resume) at a step."""
        self.started, self.first_step = time.monotonic(), step
        if self.live is not None:
            self.live.start()
            self.live.update(Text(f"step {step}/{self.total}"))

    def say(self, text: str) -> None:
        """A line of our own words."""
        self.console.print(Text(text), soft_wrap=True)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """The numbers of a step."""
        elapsed = time.monotonic() - self.started
        left = elapsed / max(step - self.first_step, 1) * (self.total - step)
        shown = [(heading, signed(metrics[name], form)) for name, heading, form in COLUMNS if name in metrics]
        if self.live is None:
            numbers = "  ".join(f"{heading} {value}" for heading, value in shown)
            self.say(f"step {step:>4}/{self.total}  {numbers}  ETA {spoken(left)}")
            return
        count = Text(f"{step}/{self.total}", style="bold")
        cells = [Text.assemble((f"{heading} ", "dim"), value) for heading, value in shown]
        cells.append(Text.assemble(("ETA ", "dim"), spoken(left)))
        bar = 24
        room = self.console.width - cell_len(count.plain) - 2
        while sum(cell_len(cell.plain) + 2 for cell in cells) + bar + 2 > room and (bar > 8 or len(cells) > 1):
            if bar > 8:
                bar -= 8
            else:
                del cells[-2]  # the ETA stays
        table = Table.grid(padding=(0, 2))
        table.add_row(ProgressBar(total=self.total, completed=step, width=bar), count, *cells)
        self.live.update(table)

    def completions(self, title: str, rows: Sequence[tuple[str, str, float | None]]) -> None:
        """A few (prompt, completion, score)."""
        table = Table(title=Text(title), title_justify="left", show_edge=False, pad_edge=False, expand=False)
        table.add_column("score", justify="right", no_wrap=True)
        table.add_column("prompt → completion", overflow="fold")
        for prompt, completion, score in rows:
            text = printable(prompt).copy()
            text.stylize("dim")
            table.add_row(Text(signed(score)), text + printable(completion))
        self.console.print(table)

    def before_after(self, rows: Sequence[tuple[str, str, float | None, str, float | None]]) -> None:
        """The same prompts before and after: (prompt, completion, score, completion, score)."""
        table = Table(title="The same prompts, before and after", title_justify="left", show_lines=True)
        for heading in ("before", "after"):
            table.add_column("score", justify="right", no_wrap=True)
            table.add_column(heading, overflow="fold", ratio=1)
        for prompt, before, score_before, after, score_after in rows:
            start = printable(prompt)
            start.stylize("dim")
            table.add_row(
                Text(signed(score_before)),
                start + printable(before),
                Text(signed(score_after), style="bold"),
                start + printable(after),
            )
        self.console.print(table)

    def panel(self, title: str, lines: Sequence[str]) -> None:
        """A closing summary."""
        self.console.print(Panel(Text("\n".join(lines)), title=Text(title), title_align="left", expand=False))

    def summary(self, first: dict[str, Any], last: dict[str, Any], saved: str, folder: str, shown: int) -> None:
        """The end of a run: two evaluations side by side, and how to load what was saved.

        An evaluation is a dict of step, metrics, and shown: (prompt, completion, score) of every held-out prompt.
        """
        pairs = list(zip(first["shown"], last["shown"], strict=True))[:shown]
        self.before_after([(p, b, s, a, t) for (p, b, s), (_, a, t) in pairs])
        names = [n for n in first["metrics"] if n.startswith("eval_scores/")]
        trained = last["metrics"].get("eval_score", math.nan)
        known = [last["metrics"].get(n, math.nan) for n in names]
        if not any(math.isclose(score, trained, rel_tol=1e-4, abs_tol=1e-6) for score in known):  # a sum of several
            names = ["eval_score", *names]
        names += [f"eval_{n}" for n in ("kl_to_ref", "length", "entropy", "distinct_2", "top_bigram_share")]
        rows = [
            (n.removeprefix("eval_"), first["metrics"][n], last["metrics"][n]) for n in names if n in last["metrics"]
        ]
        width = max(18, *(len(name) for name, *_ in rows))
        self.panel(
            f"{len(first['shown'])} held-out prompts, before → after {last['step']} steps",
            [
                f"{name:<{width}}{signed(before, '+z8.3f')}  →  {signed(after, '+z8.3f')}   "
                f"({signed(after - before, '+z.3f')})"
                for name, before, after in rows
            ],
        )
        head = any((Path(saved) / name).exists() for name in ("value_head.safetensors", "value_model"))
        parts = "The tuned model, its tokenizer and the value head" if head else "The tuned model and its tokenizer"
        self.say(f"\n{parts} are in {saved}; it loads with")
        self.say(f'  pipeline("text-generation", model="{saved}")')
        self.say(f"Numbers, completions and checkpoints are in {folder}.")

    def stop(self) -> None:
        """Leave the live view; safe to call twice."""
        if self.live is not None:
            self.live.stop()
