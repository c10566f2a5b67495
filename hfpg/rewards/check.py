"""A look at a judge before a run is trusted to it: what its scores are like, and what cheap tricks earn.

`hfpg reward check FILE.py:name` samples completions and asks all of it; a training run asks, for free, what the scores
of its first step already tell.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hfpg.ops.baselines import equal_in_group
from hfpg.ops.masked import correlation, row_mean, row_std
from hfpg.rewards.judge import Judge, alike
from hfpg.types import Text, plain_text, text_of


STRONG = 0.7  # |correlation| from which a judge looks like a measure of something else


@dataclass(frozen=True)
class Findings:
    """What was seen; `None` where it could not be asked."""

    lowest: float
    highest: float
    mean: float
    std: float
    unscored: float  # share of completions that nobody judged
    tied_groups: float | None  # share of prompts whose completions all score the same
    with_length: float  # correlation of score and length
    with_repetition: float  # … and share of repeated word pairs
    deterministic: bool | None = None  # the same scores for the same batch twice
    per_second: float | None = None
    tricks: dict[str, float | None] = field(default_factory=dict)  # mean score of empty text, an echo, keywords

    def warnings(self) -> list[str]:
        """What is likely to spoil a run, in sentences."""
        found = []
        if self.unscored == 1:
            return ["no completion was scored: nothing can be learnt"]
        if self.std == 0:
            found.append(f"every completion scores {self.mean:g}: nothing can be learnt from a constant")
        elif self.tied_groups is not None and self.tied_groups > 0.5:
            found.append(
                f"in {self.tied_groups:.0%} of the prompts all completions score the same: methods that compare them "
                "(GRPO, RLOO) learn nothing there; a finer score, more samples or resample_rounds help"
            )
        for name, r in (("length", self.with_length), ("repetition", self.with_repetition)):
            if abs(r) >= STRONG:
                found.append(f"the score goes with {name} (correlation {r:+.2f}): the policy may learn just that")
        if self.deterministic is False:
            found.append("the same completions scored differently the second time: noise that no baseline takes away")
        good = self.mean + self.std
        for name, value in self.tricks.items():
            if value is not None and self.std > 0 and value >= good:
                found.append(
                    f"{name} earns {value:+.2f}, more than most completions ({self.mean:+.2f} ± {self.std:.2f})"
                )
        return found


def repetition(text: Text) -> float:
    """Share of word pairs that stood before in the same text; 0 for fewer than two words."""
    words = text_of(text).lower().split()
    pairs = list(zip(words, words[1:], strict=False))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0


def look(
    scores: Float[Tensor, " B"],
    weights: Float[Tensor, " B"],
    lengths: Int[Tensor, " B"],
    texts: Sequence[Text],
    group_ids: Int[Tensor, " B"] | None = None,
    **more: Any,
) -> Findings:
    """What scores that are there already tell."""
    scores, weights = scores.double().cpu(), weights.double().cpu()
    judged = scores[weights > 0]
    tied = None
    if group_ids is not None and len(group_ids.unique()) < len(group_ids):
        groups = group_ids.cpu()
        equal = equal_in_group(scores, weights, groups)
        compared = [g for g in groups.unique() if (weights[groups == g] > 0).sum() > 1]  # one alone is no tie
        if compared:
            tied = sum(bool(equal[groups == g].all()) for g in compared) / len(compared)
    repeated = torch.tensor([repetition(text) for text in texts], dtype=torch.float64)
    return Findings(
        lowest=float(judged.min()) if len(judged) else 0.0,
        highest=float(judged.max()) if len(judged) else 0.0,
        mean=float(row_mean(scores, weights)),
        std=float(row_std(scores, weights)) if len(judged) and judged.max() > judged.min() else 0.0,
        unscored=1 - len(judged) / len(scores),
        tied_groups=tied,
        with_length=float(correlation(lengths.double().cpu(), scores, weights)),
        with_repetition=float(correlation(repeated, scores, weights)),
        **more,
    )


def examine(
    judge: Judge,
    prompts: list[Text],
    completions: list[Text],
    completion_ids: list[list[int]],
    columns: dict[str, list],
    group_ids: Int[Tensor, " B"],
    tokenizer: Any,
) -> Findings:
    """Score a batch twice and a few tricks once. A trick that the judge cannot score is None.

    `tokenizer` is the policy's: a judge that reads `completion_ids` gets those of the trick, with the end token that
    the policy would have chosen.
    """
    started = time.perf_counter()
    first = judge(prompts, completions, completion_ids, columns)
    seconds = time.perf_counter() - started
    second = judge(prompts, completions, completion_ids, columns)
    lengths = torch.tensor([len(ids) for ids in completion_ids])
    return look(
        first.scores,
        first.weights,
        lengths,
        completions,
        group_ids,
        deterministic=all(alike(column, second.by_function[n]) for n, column in first.by_function.items()),
        per_second=len(prompts) / max(seconds, 1e-9),
        tricks=_tricks(judge, prompts, completions, columns, first.scores, tokenizer),
    )


def _tricks(
    judge: Judge,
    prompts: list[Text],
    completions: list[Text],
    columns: dict[str, list],
    scores: Tensor,
    tokenizer: Any,
) -> dict[str, float | None]:
    """The mean score of texts that no policy should be paid for."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    order = torch.argsort(scores, descending=True)[: max(1, len(scores) // 4)]
    best = [text_of(completions[i]) for i in order.tolist()]
    words = Counter(word for text in best for word in set(text.lower().split()) if len(word) > 3)
    keywords = " ".join(word for word, _ in words.most_common(3)) or "good"
    tried = {
        "an empty text": [""] * len(prompts),
        "the prompt again": [plain_text(p) for p in prompts],
        f"{keywords!r}, repeated": [" ".join([keywords] * 8)] * len(prompts),
    }
    found: dict[str, float | None] = {}
    for name, texts in tried.items():
        ids = [[*tokenizer(text, add_special_tokens=False).input_ids, *end] for text in texts]
        said_so: list[Text] = [
            text if isinstance(c, str) else [{"role": "assistant", "content": text}]
            for text, c in zip(texts, completions, strict=True)
        ]
        try:
            said = judge(prompts, said_so, ids, columns)
        except Exception:  # any failure of somebody else's function: what it cannot score is reported as such
            found[name] = None
            continue
        found[name] = float(row_mean(said.scores, said.weights)) if said.weights.any() else None
    return found
