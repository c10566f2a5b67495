"""Rows dealt to ranks, cut into micro-batches, and trimmed to what they hold."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from hfpg.ops.masked import extent
from hfpg.types import Estimates, Rollout, Samples


R = TypeVar("R", Samples, Rollout)
E = TypeVar("E", Samples, Rollout, Estimates)


def balance(lengths: Int[Tensor, " N"], world: int) -> list[Tensor]:
    """Rows dealt to `world` ranks so that their tokens are about even: longest first, each to the lightest rank."""
    if world == 1:
        return [torch.arange(len(lengths))]
    loads = [0] * world
    dealt: list[list[int]] = [[] for _ in range(world)]
    for row in torch.argsort(lengths, descending=True, stable=True).tolist():
        rank = loads.index(min(loads))
        dealt[rank].append(row)
        loads[rank] += int(lengths[row])
    return [torch.tensor(sorted(rows), dtype=torch.long) for rows in dealt]


def micro_batches(prompt: Int[Tensor, " N"], completion: Int[Tensor, " N"], max_tokens: int) -> list[Tensor]:
    """Rows sorted by length and cut into batches whose padded size is at most `max_tokens` (one row at least)."""
    order = torch.argsort(prompt + completion, stable=True).tolist()
    sizes = list(zip(prompt.tolist(), completion.tolist(), strict=True))
    batches: list[list[int]] = []
    width = (0, 0)
    for row in order:
        wider = (max(width[0], sizes[row][0]), max(width[1], sizes[row][1]))
        if batches and sum(wider) * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(row)
            width = wider
        else:
            batches.append([row])
            width = sizes[row]
    return [torch.tensor(batch) for batch in batches]


def trim(rows: R) -> R:
    """The same rows without the prompt columns and the completion columns that are padding in all of them."""
    prompt = max(1, int(rows.prompt_mask.sum(1).max()))
    completion = max(1, int(extent(rows.completion_mask).max()))
    return clip_columns(rows, completion, prompt)


def clip_columns(rows: E, completion: int, prompt: int | None = None) -> E:
    """Every [B, C, …] field cut to `completion` columns and, if given, prompts to their last `prompt` columns."""

    def cut(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() < 2:
            return value
        if name.startswith("prompt_"):
            return value if prompt is None else value[:, -prompt:]
        return value[:, :completion]

    return type(rows)(**{name: cut(name, getattr(rows, name)) for name in type(rows).__dataclass_fields__})


def model_inputs(rows: Samples | Rollout, temperature: float) -> dict[str, Any]:
    """The arguments of `ActorCritic.forward`."""
    return {
        "prompt_ids": rows.prompt_ids,
        "prompt_mask": rows.prompt_mask,
        "completion_ids": rows.completion_ids,
        "completion_mask": rows.completion_mask,
        "temperature": temperature,
        "kept": rows.kept,
        "prompt_states": getattr(rows, "prompt_states", None),
        "completion_states": getattr(rows, "completion_states", None),
    }
