"""Prompts and completions as people read them."""

from __future__ import annotations

from typing import Any

import torch

from hfpg.data import decode_after
from hfpg.report.metrics import describe, distinct_2, top_bigram_share
from hfpg.types import Rollout


Shown = tuple[str, str, float | None]
"""(prompt, completion, score); None: nobody scored it."""


def shown(rollout: Rollout, tokenizer: Any) -> list[Shown]:
    """Every row, decoded, in the rollout's order."""

    def rows(ids: torch.Tensor, mask: torch.Tensor) -> list[list[int]]:
        return [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]

    prompts = tokenizer.batch_decode(rows(rollout.prompt_ids, rollout.prompt_mask), skip_special_tokens=True)
    drawn = rows(rollout.completion_ids, rollout.completion_mask)
    completions = decode_after(tokenizer, rollout.prompt_ids[:, -1].tolist(), drawn)
    known = zip(rollout.scores.tolist(), rollout.weights.tolist(), strict=True)
    return list(zip(prompts, completions, [score if weight else None for score, weight in known], strict=True))


def records(step: int, rows: list[Shown], extra: dict[str, list]) -> list[dict[str, Any]]:
    """Lines of completions.jsonl; `extra` holds what reward functions logged per completion."""
    return [
        {"step": step, "prompt": prompt, "completion": completion, "score": score}
        | {name: values[i] for name, values in extra.items()}
        for i, (prompt, completion, score) in enumerate(rows)
    ]


def describe_evaluation(
    rollout: Rollout, by_function: dict[str, list[float | None]], rows: list[Shown]
) -> dict[str, float]:
    """Metrics of held-out prompts: those of a rollout, and how alike the texts have become."""
    tokens = [row[keep].tolist() for row, keep in zip(rollout.completion_ids, rollout.completion_mask, strict=True)]
    return describe(rollout, by_function) | {
        "distinct_2": distinct_2(tokens),
        "top_bigram_share": top_bigram_share([completion for _, completion, _ in rows])[1],
    }
