"""Rows of prompts from a file, a folder or the Hub, and where in the file it is broken."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets

from hfpg.config import ConfigError, require


READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
"""Files by the end of their name → what of `datasets` reads them. A line of a .txt file is a prompt."""


def on_hub(source: str | None) -> str | None:
    """The name of a data set of the Hub; None for a file or a folder."""
    local = source is None or Path(source).exists() or Path(source.lower().removesuffix(".gz")).suffix in READERS
    return None if local else source


def read_rows(source: str) -> Any:
    """All rows of a Hub data set (its split "train"), a folder or a file, as a `datasets.Dataset`.

    Raises:
        ConfigError: it cannot be loaded, is empty, or is of another kind; of a broken JSON file with `file:line`.
    """
    path = Path(source)
    reader = READERS.get(Path(source.lower().removesuffix(".gz")).suffix)
    require(
        reader is not None or not path.is_file(),
        f"{source!r} is a file of a kind that is not read; use {', '.join(READERS)}, or one of these with .gz",
    )
    try:
        if reader is None and (path / "state.json").is_file():  # what `Dataset.save_to_disk` writes
            return datasets.load_from_disk(source)
        if reader is None:
            return datasets.load_dataset(source, split="train")
        with quiet():
            rows = datasets.load_dataset(reader, data_files=source, split="train")
            return rows.rename_column("text", "prompt") if reader == "text" else rows
    except Exception as error:  # `datasets` wraps what its readers raise, and lets a StopIteration out
        if reader not in (None, "parquet") and path.is_file():
            refuse_broken(path, reader == "json")
        why = str(error.__cause__ or error).strip() or type(error).__name__
        raise ConfigError(f"cannot load the data set {source!r}: {why.splitlines()[0]}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """A local file is read in no time: half a bar and a log line would stand above the sentence about it."""
    bars, level = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(level)
        if bars:
            datasets.enable_progress_bars()


def refuse_broken(path: Path, is_json: bool) -> None:
    """Raise ConfigError for a text file without text, and for the first line of a JSON file that is no row."""
    try:
        with (gzip.open if path.suffix.lower() == ".gz" else open)(
            path, "rt", encoding="utf-8", errors="replace"
        ) as f:
            text = f.read()
    except (OSError, EOFError):  # no such compression, or the end is missing: what `datasets` says will do
        return
    require(bool(text.strip()), f"the data set {str(path)!r} is empty; it needs rows with a prompt")
    if not is_json:
        return
    if text.lstrip().startswith("["):  # one list of rows; else a row on each line
        _parsed(text, path, 1)
        return
    for number, line in enumerate(text.split("\n"), 1):
        row = _parsed(line, path, number) if line.strip() else {}
        require(
            isinstance(row, dict),
            f'{path}:{number}: {line.strip()!r:.60} is no row; expected one such as {{"prompt": …}}',
        )


def _parsed(text: str, path: Path, first: int) -> Any:
    """JSON that begins in line `first` of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = text.split("\n")[error.lineno - 1].strip()
        place = f"{path}:{first + error.lineno - 1}"
        raise ConfigError(f"{place}: not valid JSON: {error.msg}: {line!r:.80}") from None


@contextmanager
def in_place_of(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    """A new folder to save in, whose files end in `folder`, in the place of an earlier save.

    What that left under one of `names` (patterns), and is not written again, goes: an adapter beside other weights
    would be put on them. An error in the middle leaves the earlier save as it was.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".saving-") as place:
        new = Path(place)
        yield new
        written = [path.relative_to(new) for path in new.rglob("*") if path.is_file()]
        stale = {path.relative_to(folder) for name in names for path in folder.glob(name)} - set(written)
        for path in written:
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (new / path).replace(folder / path)
        for path in stale:
            (folder / path).unlink()


def refuse_other(folder: Path, stages: Sequence[str], script: Any, *names: str) -> None:
    """Write down what the stages of a pipeline in `folder` are made with: the attributes `names` of `script`.

    Raises:
        ConfigError: a stage is there already, and was made with others.
    """
    note, now = folder / "stages.json", {name: getattr(script, name) for name in names}
    made = any((folder / stage).exists() for stage in stages)
    text = note.read_text(encoding="utf-8", errors="replace") if made and note.exists() else ""
    before = now if not text else _parsed(text, note, 1)
    require(isinstance(before, dict), f"{note} holds no JSON object; name another folder, or remove its stages")
    other = {name: value for name, value in before.items() if value != now.get(name)}
    require(not other, f"{folder} holds stages made with {other}, which are used again; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    note.write_text(json.dumps(now), encoding="utf-8")
