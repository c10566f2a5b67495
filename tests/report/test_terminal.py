"""The terminal: readable in a pipe and in a terminal, and no text can do anything to it."""

import io
import math
import re
from pathlib import Path

import pytest
from rich.console import Console

from hfpg.report.terminal import Terminal, printable, spoken


ESCAPES = "\x1b[2J\x1b]0;owned\x07\x1b[31m\x9b5m"
BIDI = "\u202a\u202e\u2066\u2069\u200e\u200f"
HOSTILE = [
    ESCAPES,
    "[/b] [bold]x[/] [link=http://x]",
    "a\nb\r\nc\t\x00\x7f",
    BIDI,
    "\u061c",
    "\u2028\u2029",
    "\x85",
    "",
    "😀é漢",
]


def terminal(live: bool, total: int = 10, **settings) -> tuple[Terminal, io.StringIO]:
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=live, width=100, highlight=False, color_system=None, legacy_windows=False
    )
    return Terminal(total, console=console, **settings), out


def assert_harmless(text: str) -> None:
    """No control character but the line breaks and (live) the styles and cursor moves that are rich's own."""
    text = re.sub(r"\x1b\[[0-9;]*[mKA]|\x1b\[\?25[lh]", "", text).replace("\r", "")
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", text)
    assert not re.search("[\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]", text)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("live", [False, True])
def test_hostile_text_is_shown_and_does_nothing(text: str, live: bool):
    shown, out = terminal(live)
    shown.completions("step 1", [(text, text, 0.5), (text, "", math.nan)])
    shown.before_after([(text, text, -1.0, text, 1.0)])
    assert_harmless(out.getvalue())
    assert "owned" not in text or "owned" in out.getvalue()


@pytest.mark.parametrize("words", ["[/b]", "runs/[bold]x"])
@pytest.mark.parametrize("place", ["say", "lines", "panel", "completions"])
def test_markup_in_our_own_words_is_text(words: str, place: str):
    """They hold paths and names of models and functions."""
    shown, out = terminal(False)
    if place == "say":
        shown.say(words)
    elif place == "completions":
        shown.completions(words, [("a prompt that is wider than the title", "b", 0.0)])
    else:
        shown.panel(*((words, ["a line that is wider than the title"]) if place == "panel" else ("title", [words])))
    assert words in out.getvalue()


def test_markup_is_text():
    shown, out = terminal(False)
    shown.completions("step 1", [("[/b]", "[red]x[/red]", 0.0)])
    shown.say("[/b] [bold]")
    assert "[/b][red]x[/red]" in out.getvalue() and "[/b] [bold]" in out.getvalue()


def test_a_megabyte_is_cut():
    shown, out = terminal(False)
    shown.completions("step 1", [("p" * 1_000_000, "\x1b" * 1_000_000, 1.0)])
    shown.before_after([("p" * 1_000_000, "x", 0.0, "y" * 1_000_000, 1.0)])
    assert len(out.getvalue()) < 5000 and "…" in out.getvalue()
    assert len(printable("x" * 1_000_000)) == 300
    assert printable("x" * 300).plain == "x" * 300


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_stream_that_cannot_take_a_character_does_not_end_the_run(encoding: str):
    """Half of a surrogate pair, or a terminal without Unicode."""
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding=encoding)
    shown = Terminal(10, console=Console(file=out, width=100))
    shown.completions("step 1", [("half \ud83d", "é", 0.0)])
    out.flush()
    assert b"half" in raw.getvalue()


def test_a_line_break_stays_visible():
    assert printable("a\nb\x1bc").plain == "a⏎b·c"


def test_plain_lines_have_every_number_once_and_no_redraw():
    shown, out = terminal(False, total=20)
    shown.start(0)
    shown.step(1, {"score": 0.25, "kl_to_ref": 1.5, "entropy": 2.0, "length": 9.0, "other": 5.0})
    shown.step(2, {"score": math.nan})
    shown.stop()
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("step    1/20  score +0.250  KL 1.50  entropy 2.00  length 9.0  ETA ")
    assert lines[1].startswith("step    2/20  score –  ETA ") and len(lines) == 2
    assert "\x1b" not in out.getvalue()


def test_plain_wins_over_a_terminal():
    shown, out = terminal(True, plain=True)
    shown.start(0)
    shown.step(1, {"score": 1.0})
    assert shown.live is None and "step    1/10" in out.getvalue()


def test_the_live_view_redraws_and_stops_twice():
    shown, out = terminal(True)
    shown.start(0)
    shown.step(1, {"score": 0.25})
    shown.step(2, {"score": 0.5})
    shown.say("a word in between")
    shown.stop()
    shown.stop()
    assert shown.live is not None and "a word in between" in out.getvalue() and "+0.500" in out.getvalue()
    assert out.getvalue().count("ETA") >= 1


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]):
    shown = Terminal(10, quiet=True)
    shown.start(0)
    shown.step(1, {"score": 1.0})
    shown.say("x")
    shown.completions("t", [("p", "c", 0.0)])
    shown.panel("t", ["x"])
    shown.stop()
    assert capsys.readouterr().out == ""


def test_the_time_left_counts_from_where_the_run_began_again(monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr("hfpg.report.terminal.time.monotonic", lambda: clock[0])
    shown, out = terminal(False, total=20)
    shown.start(10)
    clock[0] += 30.0  # three steps of 10 s; seven are left
    shown.step(13, {})
    assert "ETA 1m10s" in out.getvalue()


def test_before_and_after_stand_side_by_side():
    shown, out = terminal(False)
    shown.before_after([("The film ", "was bad", -0.5, "was good", 0.75)])
    row = next(line for line in out.getvalue().splitlines() if "was bad" in line)
    assert row.index("-0.50") < row.index("The film was bad") < row.index("+0.75") < row.index("The film was good")


@pytest.mark.parametrize("head", [True, False])
def test_the_summary_says_what_is_there(head: bool, tmp_path: Path):
    """A value head only where one was saved; and no negative zero."""
    if head:
        (tmp_path / "value_head.safetensors").write_text("")
    shown, out = terminal(False)
    evaluation = {"step": 2, "metrics": {"eval_kl_to_ref": -1e-5}, "shown": []}
    shown.summary(evaluation, evaluation, str(tmp_path), "run", 0)
    assert (
        "its tokenizer and the value head are in" if head else "The tuned model and its tokenizer are in"
    ) in out.getvalue()
    assert "+0.000" in out.getvalue() and "-0.000" not in out.getvalue()


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0s"), (59.9, "59s"), (60, "1m00s"), (185, "3m05s"), (3600, "1h00m"), (7800, "2h10m")]
)
def test_durations(seconds: float, words: str):
    assert spoken(seconds) == words


@pytest.mark.parametrize("width", [40, 60, 80, 100, 160])
def test_the_live_line_is_one_line_of_whole_words(width: int):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=width, color_system=None, legacy_windows=False)
    shown = Terminal(1000, console=console)
    shown.start(0)
    metrics = dict(score=-0.046, kl_to_ref=3.5, entropy=4.37, length=16.4, tokens_per_second=12345.0)
    shown.step(940, metrics)
    assert shown.live is not None
    lines = console.render_lines(shown.live.renderable, pad=False)
    assert len(lines) == 1
    text = "".join(part.text for part in lines[0])
    assert "940/1000" in text and "ETA" in text and "…" not in text
    assert ("tokens/s 12,345" in text) == (width >= 100) and ("score -0.046" in text) == (width >= 60)
    shown.stop()


def test_a_terminal_that_cannot_redraw_gets_a_line_per_step(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "dumb")
    out = io.StringIO()
    shown = Terminal(3, console=Console(file=out, force_terminal=True, width=100))
    shown.start(0)
    shown.step(1, {"score": 1.0})
    assert "step    1/3  score +1.000" in out.getvalue()


def test_what_nobody_scored_has_a_dash():
    shown, out = terminal(False)
    shown.completions("step 1", [("p", "c", None)])
    shown.before_after([("p", "b", None, "a", 1.0)])
    shown.step(1, {"score": math.nan})
    assert "– │ pc" in out.getvalue() and "score –" in out.getvalue() and "nan" not in out.getvalue()


def test_the_summary_stands_in_columns_and_tells_what_was_trained(tmp_path: Path):
    shown, out = terminal(False)

    def evaluation(step: int, score: float) -> dict:
        metrics = {"eval_score": score, "eval_scores/repetition_3gram": score / 2, "eval_scores/b": score / 4}
        return {"step": step, "metrics": metrics | {"eval_length": 3.0}, "shown": [("p", "c", score)]}

    shown.summary(evaluation(0, 1.0), evaluation(5, 2.0), str(tmp_path), str(tmp_path), 1)
    rows = [line for line in out.getvalue().splitlines() if "→    " in line]
    assert [row.split()[1] for row in rows] == ["score", "scores/repetition_3gram", "scores/b", "length"]
    assert len({row.index("→") for row in rows}) == 1
    shown, out = terminal(False)
    one = [evaluation(step, 1.0) | {"metrics": {"eval_score": 1.0, "eval_scores/a": 1.0000001}} for step in (0, 5)]
    shown.summary(*one, "a", "b", 1)
    assert "scores/a" in out.getvalue() and "│ score  " not in out.getvalue(), "one judge: said once"
