"""How well a judge agrees with preference pairs: accuracy, calibration, and what length has to do with it.

    python reward_models/evaluate.py --judge runs/reward-model --dataset held_out.jsonl
    python reward_models/evaluate.py --judge hfpg.embedded:judge_b --dataset user/preferences --split test

The judge is anything that hfpg takes for a reward: a classifier (Hub id, folder, "folder#LABEL"), "file.py:name" or
"package.module:name". Prints a table and writes eval.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pairs import Pairs, load_pairs, plain

from hfpg.config import ConfigError, field, one_sentence, parse, require
from hfpg.ops.preference import agrees, pair_accuracy
from hfpg.rewards import Judge, RewardError
from hfpg.rewards.judge import RewardFunction
from hfpg.rewards.learned import ClassifierReward
from hfpg.types import Text


@dataclass
class Script:
    """What is measured, on what."""

    judge: str = field("", "Classifier (Hub id or folder), 'file.py:name' or 'package.module:name'.")
    dataset: str = field("", "Hub id or .json/.jsonl/.csv file with the columns chosen and rejected, perhaps prompt.")
    dataset_config: str | None = field(None, "Configuration of the data set on the Hub.")
    split: str = field("test", "Split of the data set on the Hub.")
    bins: int = field(10, "Rows of the reliability table: equal parts of the confidence range .5 to 1.")
    output: str | None = field(None, "Where the numbers go. Default: eval.json, in the judge's folder if it has one.")


def correlation(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Pearson's r, or None where one of both is constant."""
    a, b = torch.tensor(x, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    a, b = a - a.mean(), b - b.mean()
    norm = (a.norm() * b.norm()).item()
    return (a @ b).item() / norm if norm > 0 else None


def reliability(differences: Sequence[float], bins: int = 10) -> list[dict[str, float]]:
    """Pairs by confidence σ(|d|) in equal parts of [.5, 1]: how many, mean confidence, how often it is right.

    d = r(chosen) − r(rejected); a difference of 0 is right half of the time.
    """
    d = torch.tensor(differences, dtype=torch.float64)
    confidence, right = d.abs().sigmoid(), agrees(d)
    place = ((confidence - 0.5) * 2 * bins).long().clamp(0, bins - 1)
    return [
        {
            "from": 0.5 + 0.5 * b / bins,
            "to": 0.5 + 0.5 * (b + 1) / bins,
            "pairs": int((place == b).sum()),
            "confidence": confidence[place == b].mean().item(),
            "accuracy": right[place == b].mean().item(),
        }
        for b in range(bins)
        if (place == b).any()
    ]


def measure(
    chosen: Sequence[float],
    rejected: Sequence[float],
    chosen_lengths: Sequence[int],
    rejected_lengths: Sequence[int],
    bins: int = 10,
) -> dict[str, Any]:
    """Everything that is said of a judge, from the scores [N] and lengths [N] of N pairs.

    accuracy: pairs whose chosen text has the higher score, equal scores counted half; `accuracy_95`: Wilson's
    interval, which takes the pairs for independent. nll: −log σ(d) per pair. ece: expected calibration error,
    Σ_b (n_b / N) |confidence_b − accuracy_b|. length_r: Pearson's r of score and length over all 2N texts;
    longer_chosen, longer_scored: how often the longer text is the chosen one, and the one with the higher score.
    """
    d = [c - r for c, r in zip(chosen, rejected, strict=True)]
    n, table = len(d), reliability(d, bins)
    accuracy, *interval = pair_accuracy(*(torch.tensor(side, dtype=torch.float64) for side in (chosen, rejected)))
    longer = [(x, c - r) for x, c, r in zip(d, chosen_lengths, rejected_lengths, strict=True) if c != r]
    return {
        "pairs": n,
        "accuracy": accuracy,
        "accuracy_95": tuple(interval),
        "equal_scores": sum(x == 0 for x in d),
        "nll": torch.nn.functional.softplus(-torch.tensor(d, dtype=torch.float64)).mean().item(),
        "ece": sum(row["pairs"] * abs(row["confidence"] - row["accuracy"]) for row in table) / n,
        "length_r": correlation([*chosen, *rejected], [*chosen_lengths, *rejected_lengths]),
        "longer_chosen": sum(l > 0 for _, l in longer) / len(longer) if longer else None,  # noqa: E741
        "longer_scored": sum(x * l > 0 for x, l in longer) / len(longer) if longer else None,  # noqa: E741
        "reliability": table,
    }


def function_of(judge: str, normalize: bool = False) -> RewardFunction:
    """The judge as training takes it, on the GPU if there is one.

    Args:
        normalize: False: a classifier's logits as they are, without the mean and std that its folder may keep.
    Raises:
        ConfigError: it cannot be loaded, or is async.
    """
    function = RewardFunction.of(judge if ":" in judge else ClassifierReward(judge, normalize=normalize))
    require(not function.is_async, f"the judge {judge!r} is async; give a function that returns its scores")
    if hasattr(function.call, "to") and not getattr(function.call, "placed", False):
        function.call.to("cuda" if torch.cuda.is_available() else "cpu")
    return function


def scores_of(function: RewardFunction, prompts: Sequence[Text], completions: Sequence[Text]) -> list[float | None]:
    """One score per completion; None: the judge abstains.

    Raises:
        ConfigError: the judge fails, needs a column that pairs have not, or returns what is no score.
    """
    judge = Judge(function.call)
    try:
        said = judge(list(prompts), list(completions), [[] for _ in completions], {})
    except RewardError as error:
        raise ConfigError(str(error)) from error
    (scores,) = said.by_function.values()
    return list(scores)


def score(judge: str, pairs: Pairs) -> tuple[list[float | None], list[float | None]]:
    """The judge's scores of the chosen and of the rejected texts."""
    function = function_of(judge)
    return scores_of(function, pairs.prompts, pairs.chosen), scores_of(function, pairs.prompts, pairs.rejected)


def evaluate(judge: str, pairs: Pairs, bins: int = 10) -> dict[str, Any]:
    """Score the pairs that are no ties and measure; pairs that the judge abstains from are left out and counted.

    Length is that of prompt and completion, in characters.
    """
    clear = pairs.without_ties()
    chosen, rejected = score(judge, clear)
    found = enumerate(zip(chosen, rejected, strict=True))
    rows = [(c, r, i) for i, (c, r) in found if c is not None and r is not None]
    require(bool(rows), f"the judge {judge!r} abstained from all {len(clear)} pairs; give pairs that it can judge")

    def lengths(side: Sequence[Text]) -> list[int]:
        return [len(plain(clear.prompts[i])) + len(plain(side[i])) for *_, i in rows]

    scores = [c for c, _, _ in rows], [r for _, r, _ in rows]
    facts = measure(*scores, lengths(clear.chosen), lengths(clear.rejected), bins=bins)
    return {"ties_dropped": len(pairs) - len(clear), "abstained": len(clear) - len(rows)} | facts


def show(facts: dict[str, Any]) -> str:
    """The numbers as a table."""

    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.3f}"

    low, high = facts["accuracy_95"]
    lines = [
        f"pairs                 {facts['pairs']:,}; not {facts['ties_dropped']} ties, {facts['abstained']} abstained",
        f"pair accuracy         {facts['accuracy']:.3f}   95 %: {low:.3f} … {high:.3f}",
        f"equal scores          {facts['equal_scores']:,}",
        f"NLL per pair          {facts['nll']:.3f}   (always .5: {math.log(2):.3f})",
        f"calibration error     {facts['ece']:.3f}",
        f"score and length, r   {number(facts['length_r'])}",
        f"longer text chosen    {number(facts['longer_chosen'])}   scored higher: {number(facts['longer_scored'])}",
        "",
        "confidence    pairs   says   is right",
    ]
    lines += [
        f"{row['from']:.2f} - {row['to']:.2f} {row['pairs']:7,}   {row['confidence']:.3f}  {row['accuracy']:.3f}"
        for row in facts["reliability"]
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse the command line, measure, print, write."""
    (script,) = parse((Script,), argv, description=__doc__)
    require(bool(script.judge), "name the judge with --judge, such as a classifier's folder")
    require(bool(script.dataset), "name the pairs with --dataset, such as held_out.jsonl")
    require(script.bins >= 1, f"bins={script.bins} must be at least 1")
    pairs = load_pairs(script.dataset, split=script.split, config=script.dataset_config, margin_column="")
    facts = {"judge": script.judge, "dataset": script.dataset} | evaluate(script.judge, pairs, script.bins)
    folder = Path(script.judge.partition("#")[0])
    target = Path(script.output) if script.output else (folder if folder.is_dir() else Path()) / "eval.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"{show(facts)}\n\nwritten to {target}")
    return facts


if __name__ == "__main__":
    with one_sentence():
        main()
