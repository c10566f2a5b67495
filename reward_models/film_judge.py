"""A judge from real ratings of film reviews, in one command: fetch, pair, train, measure. A minute or two.

    python reward_models/film_judge.py --output_dir runs/film-judge

About twenty people rated each sentence from −4 to 4 (Hutto & Gilbert 2014, in the sdist of vaderSentiment, MIT). Two
sentences of one source whose mean ratings are at least 1 apart make a pair, less than 0.5 apart a tie; three pairs of
four compare spans of their sentences, since a policy's texts are unfinished, too. The judge learns from the part
`judge_a` of the embedded build's split, from random weights, and is measured on film sentences of `prompts` and
`judge_b`, each in one pair at most, so that the pairs are independent. Flags are those of train.py, which this calls,
and win over the settings here.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import train
from card import fill
from embedded_data import PACKAGE, SDIST_SHA256, Sentence, load, select
from embedded_metrics import agreement
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from hfpg import embedded
from hfpg.config import one_sentence
from hfpg.ops.keyed import permutation
from hfpg.rewards.learned import ClassifierReward


APART, NEAR = 1.0, 0.5
ROUNDS = {"movie": 40, "amazon": 10, "tweet": 10}  # times that a training sentence meets another one
WORK = Path("build/film-judge")
PAIRS = ("train.jsonl", "held_out.jsonl")
FLAGS = {
    "output_dir": "runs/film-judge",
    "ties": "half",
    "learning_rate": "2e-3",
    "weight_decay": "0.1",
    "num_train_epochs": "1",
    "per_device_train_batch_size": "64",
    "train_sampling_strategy": "group_by_length",
    "disable_dropout": "False",
    "license": "mit",
}


def pair(sentences: Sequence[Sentence], rounds: int, purpose: str) -> list[dict[str, Any]]:
    """Each round shuffles the sentences and pairs neighbours: the higher rating is chosen, or the pair is a tie."""
    rows = []
    for number in range(rounds):
        order = permutation(len(sentences), 0, purpose, number).tolist()
        for i, j in zip(order[::2], order[1::2], strict=False):
            best, worst = sorted((sentences[i], sentences[j]), key=lambda s: -s.rating)
            gap = best.rating - worst.rating
            if gap >= APART or gap < NEAR:
                rows.append({"chosen": best.text, "rejected": worst.text, "tie": gap < NEAR})
    return rows


def span(text: str, order: random.Random) -> str:
    """Three or more words of a text, in a row."""
    words = text.split()
    count = order.randint(min(3, len(words)), len(words))
    start = order.randint(0, len(words) - count)
    return " ".join(words[start : start + count])


def shorten(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Spans of both texts in three rows of four."""
    order = random.Random(seed)
    return [
        row if i % 4 == 0 else row | {side: span(row[side], order) for side in ("chosen", "rejected")}
        for i, row in enumerate(rows)
    ]


def write_pairs(sentences: Sequence[Sentence], work: Path) -> tuple[Path, Path]:
    """train.jsonl and held_out.jsonl in the work folder."""
    own = [
        row
        for source, rounds in ROUNDS.items()
        for row in pair(select(list(sentences), "judge_a", source), rounds, f"train {source}")
    ]
    films = [s for part in ("prompts", "judge_b") for s in select(list(sentences), part, "movie")]
    files = work / PAIRS[0], work / PAIRS[1]
    for path, rows in zip(files, (shorten(own, 0), pair(films, 1, "held out")), strict=True):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return files


def write_backbone(folder: Path) -> Path:
    """Judge A's architecture with random weights, and its tokenizer, which was made from the part `judge_a`, too."""
    torch.manual_seed(1)  # judge A began from seed 0
    model = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(embedded.JUDGE_A)).float()
    train.init_head(train.output_layer(model)[1])
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(embedded.JUDGE_A).save_pretrained(folder)
    return folder


def about(sentences: Sequence[Sentence]) -> str:
    """What the card says of the data, and whom to cite."""
    counts = {source: f"{len(select(list(sentences), 'judge_a', source)):,}" for source in ROUNDS}
    films = sum(len(select(list(sentences), part, "movie")) for part in ("prompts", "judge_b"))
    source = fill("source.md", package=PACKAGE, sdist_sha256=SDIST_SHA256).strip()
    return fill("film_judge.md", **counts, held_out=f"{films:,}", apart=f"{APART:g}", near=f"{NEAR:g}", source=source)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Write pairs and backbone, train, and measure the agreement with the ratings."""
    own = list(sys.argv[1:] if argv is None else argv)
    training, held_out, backbone = WORK / PAIRS[0], WORK / PAIRS[1], WORK / "film-modernbert"
    flags = FLAGS | {"model": str(backbone), "dataset": str(training), "eval_dataset": str(held_out)}
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    script, args = train.parse_flags([*words, *own])  # before anything is fetched
    sentences = load(WORK)
    write_pairs(sentences, WORK)
    write_backbone(backbone)
    ours = script.dataset == str(training)
    command = train.public_command(own, "film_judge.py")
    facts = train.train(script, args, command, about(sentences) if ours else "")
    films = select(sentences, "prompts", "movie")
    scores = ClassifierReward(str(args.output_dir))([""] * len(films), [s.text for s in films])
    rated = [(score, film.rating) for score, film in zip(scores, films, strict=True) if score is not None]
    facts["prompts"] = agreement(*map(list, zip(*rated, strict=True)))
    print(f"film sentences of the part `prompts`: {facts['prompts']}")
    return facts


if __name__ == "__main__":
    with one_sentence():
        main()
