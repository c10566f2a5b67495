"""The command `hfpg`: train with any algorithm by name, and say what an algorithm is.

hfpg train --algorithm rloo --model gpt2 --reward judge.py:score --dataset prompts.jsonl
hfpg reward check judge.py:score --dataset prompts.jsonl     what a judge's scores are like, before training
hfpg algorithms            the table: name, formula, whether its gradient is unbiased
hfpg algorithms dapo       one row: paper, formula, bias, every knob with its default
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table

from hfpg import embedded
from hfpg.algorithms import PRESETS
from hfpg.arguments import VERBS
from hfpg.config import ConfigError, TrainConfig, field, nearest, one_sentence, parse, require
from hfpg.data import PromptData, decode_completions, load_prompts, step_ends
from hfpg.files import on_hub, read_rows
from hfpg.flags import peek, read_yaml
from hfpg.generation.hf import HFGenerator
from hfpg.preflight import dry_call, load_tokenizer
from hfpg.pretrained import load_config, load_policy
from hfpg.rewards import Judge, RewardError
from hfpg.rewards.check import Findings, examine
from hfpg.rewards.judge import import_function
from hfpg.text_config import context_length
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
    dataset: str | None = field(
        None, "Hub id or .jsonl/.json/.csv/.parquet/.txt file of prompts. Default: film prompts."
    )
    eval_prompts: int = field(256, "Held-out prompts, evaluated before and after.", least=1)


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
    missing = [verb for verb in VERBS if not hasattr(found, verb)]
    require(
        isinstance(found, type) and dataclasses.is_dataclass(found) and not missing,
        f"algorithm {name!r} must be a dataclass with init, rewards, estimate and update (missing: "
        f"{missing or 'none'}); see docs/extending.md",
    )
    return found


def named_in(argv: Sequence[str]) -> str:
    """The algorithm that flags, or else the config file, ask for: its fields are flags too."""
    given = peek(argv, "algorithm", "config")
    if given.algorithm is None and given.config is not None:
        found = read_yaml(given.config).get("algorithm")
        return Script.algorithm if found is None else str(found.value)
    return given.algorithm or Script.algorithm


def knobs_elsewhere(name: str, kind: Any) -> dict[str, str]:
    """Fields that other presets have and this algorithm has not → what to say of them."""
    own = {f.name for f in dataclasses.fields(kind)}
    owners: dict[str, list[str]] = {}
    for preset, other in PRESETS.items():
        for f in dataclasses.fields(other):
            owners.setdefault(f.name, []).append(preset)
    return {f: f": {name} has none; {', '.join(of)} have" for f, of in owners.items() if f not in own}


def train(argv: Sequence[str]) -> None:
    """Evaluate, train, evaluate, save, show."""
    name = named_in(argv)
    kind = find_algorithm(name)
    script, algorithm, args = parse(
        (Script, kind, TrainConfig), argv, train.__doc__, elsewhere=knobs_elsewhere(name, kind), prog="hfpg train"
    )
    if script.dataset is None:
        train_data: Any = Dataset.from_dict({"prompt": embedded.prompts("train")})
        held_out: Any = Dataset.from_dict({"prompt": embedded.prompts("eval", script.eval_prompts)})
    else:
        train_data, held_out = load_prompts(script.dataset, script.eval_prompts)
        args.hub_dataset = args.hub_dataset or on_hub(script.dataset)
    trainer = PolicyGradientTrainer(script.model, algorithm, script.reward, train_data, held_out, args)
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    trainer.summary(trainer.save_model(trainer.output_dir / "final"))


def algorithms(argv: Sequence[str]) -> None:
    """Print the preset table, or one row of it."""
    console = Console()
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(
            "hfpg algorithms          the table of all methods\nhfpg algorithms NAME …   all about these\n"
        )
        return
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


@dataclass
class Check:
    """What `hfpg reward check` looks at: the judge's scores of completions that a model draws."""

    reward: list[str] = field([], "The judge: 'file.py:name', 'package.module:name' or a classifier; one or more.")
    model: str = field(embedded.MODEL, "Causal LM that writes the completions. Default: the tiny GPT-2 of hfpg.")
    dataset: str | None = field(
        None, "Hub id or .jsonl/.json/.csv/.parquet/.txt file of prompts. Default: film prompts."
    )
    prompt_column: str = field("prompt", "Column that holds the prompt; the others reach the judge.")
    chat_template: str | None = field(None, "File with a Jinja chat template, for tokenizers that have none.")
    prompts: int = field(16, "Prompts that are sampled.", least=1)
    num_generations: int = field(4, "Completions of each.", least=1)
    max_completion_length: int = field(48, "Longest completion, in tokens.", least=1)
    step_marker: str | None = field(None, "Text that ends a step, for judges that score steps.")
    seed: int = field(42, "Of the samples.")

    def __post_init__(self) -> None:
        require(self.step_marker != "", "step_marker='' marks nothing; use a text such as a line break")


def reward(argv: Sequence[str]) -> None:
    """Print what a judge's scores are like, and what is likely to spoil a run."""
    words = ["check", *argv] if {"-h", "--help"} & set(argv[:1]) else list(argv)
    require(words[:1] == ["check"], "use `hfpg reward check FILE.py:name --dataset …`")
    named = list(takewhile(lambda word: not word.startswith("--"), words[1:]))
    twice = named and any(word.split("=")[0] == "--reward" for word in words)
    require(not twice, f"judges are named twice, {' '.join(named)} and by --reward; name all in one place")
    (settings,) = parse(
        (Check,),
        [*(["--reward", *named] if named else []), *words[1 + len(named) :]],
        reward.__doc__,
        prog="hfpg reward check JUDGE …",
    )
    require(bool(settings.reward), "name a judge, as in `hfpg reward check judge.py:score`")
    config = load_config(settings.model)
    tokenizer = load_tokenizer(settings.model, None, TrainConfig(chat_template=settings.chat_template))
    ends = None if settings.step_marker is None else partial(step_ends, tokenizer, settings.step_marker)
    judge = Judge(settings.reward, step_ends=ends)
    source: Any = [{"prompt": text} for text in embedded.prompts("train")]
    if settings.dataset is not None:
        source = read_rows(settings.dataset)
    data = PromptData(
        source,
        tokenizer,
        prompt_column=settings.prompt_column,
        max_completion_length=settings.max_completion_length,
        context=context_length(config),
        overlong="truncate",
    )
    dry_call(judge, data, tokenizer)
    policy = load_policy(settings.model).eval()
    rows, k = range(min(settings.prompts, len(data))), settings.num_generations
    drawn = data.rows(rows, torch.arange(len(rows) * k), k, "cpu")
    generator = HFGenerator(tokenizer, seed=settings.seed, max_completion_length=settings.max_completion_length)
    samples = generator(policy, drawn)
    ids = [row[keep].tolist() for row, keep in zip(samples.completion_ids, samples.completion_mask, strict=True)]
    texts = decode_completions(tokenizer, samples, drawn.texts)
    try:
        found = examine(judge, drawn.texts, texts, ids, drawn.columns, drawn.group_ids, tokenizer)
    except RewardError as error:
        raise ConfigError(f"the judge failed on a completion: {error}") from error
    _show(found, judge.names, len(ids))


def _show(found: Findings, names: list[str], count: int) -> None:
    console = Console()
    table = Table("of the scores", "", title=f"{', '.join(names)} on {count} completions")
    tied = "–" if found.tied_groups is None else f"{found.tied_groups:.0%}"
    rows = {
        "range": f"{found.lowest:+.3f} … {found.highest:+.3f}",
        "mean ± std": f"{found.mean:+.3f} ± {found.std:.3f}",
        "not scored": f"{found.unscored:.0%}",
        "prompts with all completions tied": tied,
        "correlation with length": f"{found.with_length:+.2f}",
        "correlation with repetition": f"{found.with_repetition:+.2f}",
        "the same when asked twice": "yes" if found.deterministic else "no",
        "completions a second": f"{found.per_second:.0f}",
    }
    rows |= {f"earns: {n}": "cannot be scored" if v is None else f"{v:+.3f}" for n, v in found.tricks.items()}
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    for text in found.warnings() or ["nothing suspicious"]:
        console.print(f"• {text}", highlight=False)


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {"train": train, "algorithms": algorithms, "reward": reward}


def main(argv: Sequence[str] | None = None) -> None:
    """The entry point."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(f"{__doc__}\n`hfpg train --algorithm NAME --help` lists every flag.\n")
        return
    if words[0] == "--version":
        sys.stdout.write(f"hfpg {metadata.version('hfpg')}\n")
        return
    with one_sentence():
        name = Path(words[0]).name
        require(
            name in COMMANDS, f"unknown command {name!r}{nearest(name, list(COMMANDS))}; use {' or '.join(COMMANDS)}"
        )
        COMMANDS[name](words[1:])


if __name__ == "__main__":
    main()
