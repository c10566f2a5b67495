"""Files of a run that say what happened: metrics.jsonl, completions.jsonl, run.json; and Accelerate's trackers."""

from __future__ import annotations

import atexit
import json
import logging
import math
import os
import platform
import sys
from contextlib import suppress
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from hfpg.config import SECRET
from hfpg.report.command import command_line


logger = logging.getLogger(__name__)

PACKAGES = ("hfpg", "torch", "transformers", "accelerate", "datasets", "peft", "huggingface_hub", "tokenizers")


class Recorder:
    """Appends to the run's files, on the main process; other processes record nothing.

    `metrics.jsonl` holds one JSON object per log or evaluation, with `step`; non-finite numbers are written as null.
    A resumed run drops the lines beyond the step it resumes from. Lines that cannot be written (a full disk) wait for
    the next ones.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, run_name: str):
        self.folder, self.accelerator, self.run_name = folder, accelerator, run_name
        self.main = accelerator.is_main_process
        self.tracking = False
        self.waiting: dict[str, str] = {}  # lines of each file that could not be written yet

    def run_file(self, facts: dict[str, Any]) -> None:
        """Write run.json: what was asked, with what versions, from what command. Tokens are blotted out."""
        if self.main:
            about = {"started": datetime.now(UTC).isoformat(timespec="seconds"), "command": command_line()}
            text = json.dumps(about | facts | {"versions": versions()}, indent=1, default=str)
            (self.folder / "run.json").write_text(SECRET.sub("hf_***", text) + "\n", encoding="utf-8")

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics, and the same to the trackers."""
        if self.main:
            self._append("metrics.jsonl", [{"step": step} | values])
        if self.accelerator.log_with:
            if not self.tracking:  # at the first number, also one from before or after training
                self.accelerator.init_trackers(self.run_name)
                atexit.register(self.finish)
                self.tracking = True
            self.accelerator.log(values, step=step)

    def finish(self) -> None:
        """Let every tracker write what it holds. (`end_training` would also end the process group.)"""
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def completions(self, rows: list[dict[str, Any]]) -> None:
        """Completions with their scores."""
        if self.main:
            self._append("completions.jsonl", rows)

    def write_waiting(self, folder: Path) -> None:
        """Write the lines that still wait into another folder."""
        for name, lines in self.waiting.items():
            (folder / name).write_text(lines, encoding="utf-8")

    def rewind(self, step: int, evaluation: bool = False) -> None:
        """Drop what was recorded after `step`, and with `evaluation` that of `step` too: it is made again."""
        for name in ("metrics.jsonl", "completions.jsonl") if self.main else ():
            path = self.folder / name
            if path.exists():
                # only "\n" ends a record; a crash may have cut the last one in the middle of a character
                text = path.read_text(encoding="utf-8", errors="replace")
                lines = [line for line in text.split("\n") if _step(line) <= step]
                if evaluation:
                    lines = [line for line in lines if _step(line) < step or "eval_score" not in json.loads(line)]
                fresh = path.with_name(f"{name}.tmp")  # a disk that is full meanwhile takes nothing away
                fresh.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
                os.replace(fresh, path)

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        lines = self.waiting.pop(name, "")
        for row in rows:
            finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            # ASCII: half a surrogate pair, which a byte-level tokenizer can produce, is no valid UTF-8
            lines += json.dumps(finite, default=str) + "\n"
        path = self.folder / name
        size = path.stat().st_size if path.exists() else 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have cleared it away in the middle of a run
            with path.open("a", encoding="utf-8") as file:
                file.write(lines)
        except OSError as error:
            logger.warning("%s could not be written (%s); its lines wait for the next ones", path, error)
            self.waiting[name] = lines
            with suppress(OSError):
                os.truncate(path, size)  # no half of a line


def _step(line: str) -> int:
    """The step of a recorded line; a line cut short by a crash counts as beyond every step."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a run depends on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
