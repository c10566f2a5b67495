"""The command `hfpg`: train with any algorithm by name, and say what an algorithm is.

hfpg train --algorithm rloo --model gpt2 --reward judge.py:score --dataset prompts.jsonl
hfpg algorithms            the table: name, formula, whether its gradient is unbiased
hfpg algorithms dapo       one row: paper, formula, bias, every knob with its default
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table

from hfpg import embedded
from hfpg.algorithms import PRESETS
from hfpg.config import TrainConfig, field, nearest, one_sentence, parse, read_yaml, require
from hfpg.data import load_prompts
from hfpg.rewards.judge import import_function
from hfpg.trainer import PolicyGradientTrainer


@dataclass
class Script:
    """What `hfpg train` trains, and on what."""

    algorithm: str = field("ppo", "A name of `hfpg algorithms`, or 'file.py:Class'; its fields are flags.")
    model: str = field(
        embedded.MODEL, "Hub id or folder of a causal LM. Default: the tiny GPT-2 that comes with hfpg."
    )
    reward: list[str] = field(
        [embedded.JUDGE_A], "Classifiers (Hub id or folder), 'file.py:name' or 'package.module:name'; one or more."
    )
    dataset: str | None = field(None, "Hub id or .json/.jsonl/.csv file with a prompt column. Default: film prompts.")
    eval_prompts: int = field(256, "Held-out prompts, evaluated before and after.")


def find_algorithm(name: str) -> Any:
    """The class of a preset, or of 'file.py:Class'."""
    if name in PRESETS:
        return PRESETS[name]
    require(
        ":" in name,
        f"algorithm={name!r} is unknown{nearest(name, list(PRESETS))}; choose from {', '.join(PRESETS)}, or name "
        "'file.py:Class'",
    )
    found = import_function(name, "algorithm")
    missing = [verb for verb in ("init", "rewards", "estimate", "update") if not hasattr(found, verb)]
    require(
        isinstance(found, type) and dataclasses.is_dataclass(found) and not missing,
        f"algorithm {name!r} must be a dataclass with init, rewards, estimate and update (missing: "
        f"{missing or 'none'}); see docs/extending.md",
    )
    return found


def named_in(argv: Sequence[str]) -> str:
    """The algorithm that flags, or else the config file, ask for: its fields are flags too."""
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--algorithm")
    before.add_argument("--config")
    given, _ = before.parse_known_args(argv)
    if given.algorithm is None and given.config is not None:
        return str(read_yaml(given.config).get("algorithm", (Script.algorithm, 0))[0])
    return given.algorithm or Script.algorithm


def train(argv: Sequence[str]) -> None:
    """Evaluate, train, evaluate, save, show."""
    script, algorithm, args = parse((Script, find_algorithm(named_in(argv)), TrainConfig), argv, train.__doc__)
    if script.dataset is None:
        train_data: Any = Dataset.from_dict({"prompt": embedded.prompts("train")})
        held_out: Any = Dataset.from_dict({"prompt": embedded.prompts("eval")[: script.eval_prompts]})
    else:
        train_data, held_out = load_prompts(script.dataset, script.eval_prompts)
    trainer = PolicyGradientTrainer(script.model, algorithm, script.reward, train_data, held_out, args)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    trainer.summary(trainer.save_model(trainer.output_dir / "final"))


def algorithms(argv: Sequence[str]) -> None:
    """Print the preset table, or one row of it."""
    console = Console()
    if not argv:
        table = Table("name", "loss", "its gradient", title="hfpg train --algorithm NAME", show_lines=True)
        for name in PRESETS:
            kind = find_algorithm(name)
            table.add_row(f"[bold]{name}[/bold]", kind.formula, kind.bias)
        console.print(table)
        return
    for name in argv:
        kind = find_algorithm(name)
        summary = (kind.__doc__ or "").strip().splitlines()
        console.print(f"[bold]{name}[/bold]  {kind.__name__}: {summary[0] if summary else ''}", highlight=False)
        for title in ("paper", "formula", "bias"):
            if hasattr(kind, title):
                console.print(f"  {title:8} {getattr(kind, title)}", highlight=False, markup=False)
        table = Table("knob", "default", "meaning")
        for knob in dataclasses.fields(kind):
            table.add_row(f"--{knob.name}", str(knob.default), knob.metadata.get("help", ""))
        console.print(table)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"train": train, "algorithms": algorithms}


def main(argv: Sequence[str] | None = None) -> None:
    """The entry point."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(f"{__doc__}\n`hfpg train --algorithm NAME --help` lists every flag.\n")
        return
    with one_sentence():
        name = Path(words[0]).name
        require(
            name in COMMANDS, f"unknown command {name!r}{nearest(name, list(COMMANDS))}; use {' or '.join(COMMANDS)}"
        )
        COMMANDS[name](words[1:])


if __name__ == "__main__":
    main()
