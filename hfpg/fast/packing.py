"""Where the tokens of prompts and completions stand in one forward pass: padded rows, or packed ones without padding.

In a packed row stand several *pieces* one after the other. A piece is a prompt and completions of it, so that K
completions of one prompt share its positions: a completion's tokens see their prompt and their own past and nothing
else. Attention being the only place where positions meet, hidden states and gradients are those of the padded rows up
to rounding; models that look further than their mask says (windows, recurrence) must not be packed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hfpg.fast.product import rung
from hfpg.ops.masked import extent


MULTIPLE = 16  # of which the length of packed rows is one
ROW = 256  # positions of a packed row, and more where it pays: attention costs their square
MORE = 1.1  # times the budget that a micro-batch may have where rows do not come out even


class Layout(NamedTuple):
    """R rows of L positions, and where in them, counted row after row, the model says something of the completions."""

    ids: Int[Tensor, "R L"]
    positions: Int[Tensor, "R L"]  # counted over the real tokens of the sequence
    mask: Bool[Tensor, "R 1 L L"] | Bool[Tensor, "R L"]  # True where attended to: by query and key, or by key
    source: Int[Tensor, " N"]  # the position before each chosen token, rows of the completion mask in order
    last: Int[Tensor, " B"]  # the last real token of each row
    place: Int[Tensor, "B T"]  # where each token of prompt + completion stands
    real: Bool[Tensor, "B T"]  # those that are tokens

    def lay(self, grid: Float[Tensor, "B T H"]) -> Float[Tensor, "R L H"]:
        """What belongs to tokens of rows, where the tokens stand; 0 elsewhere."""
        flat = grid.new_zeros(self.ids.numel(), grid.shape[2])
        flat[self.place[self.real]] = grid[self.real]
        return flat.view(*self.ids.shape, -1)

    def pick(self, laid: Float[Tensor, "R L H"]) -> Float[Tensor, "B T H"]:
        """The inverse of `lay`: completions of one prompt get its states each."""
        return torch.where(self.real[:, :, None], laid.flatten(0, 1)[self.place], 0)


class Piece(NamedTuple):
    """A prompt (that of the first row) and completions that follow it."""

    rows: list[int]
    size: int


class Packing(NamedTuple):
    """Rows of pieces, what they cost, their length, and how many of them go through the model at once."""

    price: float
    bins: list[list[Piece]]
    length: int
    at_once: int


def positions(mask: Bool[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Position of every token counted over real tokens. GPT-2 under left padding is off by nats without it."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def padded(
    prompt_ids: Int[Tensor, "B P"],
    prompt_mask: Bool[Tensor, "B P"],
    completion_ids: Int[Tensor, "B C"],
    completion_mask: Bool[Tensor, "B C"],
) -> Layout:
    """One sequence a row: the prompt padded on its left, the completion on its right.

    A gap in `completion_mask` was not chosen, but it was read: tokens after it attend to it.
    """
    rows, length = completion_ids.shape
    lengths = extent(completion_mask)
    read = torch.arange(length, device=completion_mask.device) < lengths[:, None]
    mask = torch.cat([prompt_mask, read], 1)
    width = mask.shape[1]
    row, column = completion_mask.nonzero(as_tuple=True)
    before = prompt_ids.shape[1] - 1
    return Layout(
        ids=torch.cat([prompt_ids, completion_ids], 1),
        positions=positions(mask),
        mask=mask,
        source=row * width + before + column,
        last=torch.arange(rows, device=mask.device) * width + before + lengths,
        place=torch.arange(mask.numel(), device=mask.device).view_as(mask),
        real=mask,
    )


def packed(
    prompt_ids: Int[Tensor, "B P"],
    prompt_mask: Bool[Tensor, "B P"],
    completion_ids: Int[Tensor, "B C"],
    completion_mask: Bool[Tensor, "B C"],
    hidden: int = 768,
    even_if_dearer: bool = False,
) -> Layout | None:
    """Packed rows; None where padded rows are no dearer. Consecutive rows with the same prompt share its positions.

    `hidden`, the width of the model, says what attention costs: a position of a row of L has 24 H² multiplications in
    the matrices of a layer and 4 L H in its attention.
    """
    prompts, completions = prompt_mask.sum(1), extent(completion_mask)
    if not prompts.all():
        return None  # nothing stands before the first token
    lengths = prompts.tolist(), completions.tolist()
    found = arrange(*lengths, fresh_prompts(prompt_ids, prompt_mask).tolist(), hidden)
    height, width = completion_ids.shape[0], prompt_ids.shape[1] + completion_ids.shape[1]
    if not even_if_dearer and cost(len(found.bins), found.length, hidden) > cost(height, width, hidden):
        return None
    return _place(found.bins, found.length, prompt_ids, prompt_mask, completion_ids, completion_mask, *lengths)


def positions_of(
    prompt_ids: Int[Tensor, "B P"],
    prompt_mask: Bool[Tensor, "B P"],
    completion_ids: Int[Tensor, "B C"],
    completion_mask: Bool[Tensor, "B C"],
    hidden: int,
) -> int:
    """R · L of the rows, packed or padded as `packed` decides."""
    prompts, completions = prompt_mask.sum(1), extent(completion_mask)
    height, width = completion_ids.shape[0], prompt_ids.shape[1] + completion_ids.shape[1]
    if not prompts.all():
        return height * width
    fresh = fresh_prompts(prompt_ids, prompt_mask).tolist()
    found = arrange(prompts.tolist(), completions.tolist(), fresh, hidden)
    dear = cost(len(found.bins), found.length, hidden) > cost(height, width, hidden)
    return height * width if dear else len(found.bins) * found.length


def packed_batches(
    prompts: Int[Tensor, " N"], completions: Int[Tensor, " N"], groups: Int[Tensor, " N"], hidden: int, max_tokens: int
) -> list[Tensor]:
    """Parts of rows of these lengths that pack well into about `max_tokens` positions each (one row at least).

    Rows of one group have the same prompt. All are packed at once and the packed rows are dealt out evenly: every part
    but the last has as many positions as the first. A part may have a tenth more than `max_tokens`.
    """
    if not len(groups):
        return []
    order = torch.argsort(groups, stable=True)
    fresh = torch.cat([groups.new_ones(1, dtype=torch.bool), groups[order].diff() != 0])
    found = arrange(prompts[order].tolist(), completions[order].tolist(), fresh.tolist(), hidden, max_tokens)
    parts = (found.bins[i : i + found.at_once] for i in range(0, len(found.bins), found.at_once))
    order = order.cpu()
    return [order[sorted(row for in_row in part for piece in in_row for row in piece.rows)] for part in parts]


def arrange(
    prompts: Sequence[int],
    completions: Sequence[int],
    fresh: Sequence[bool],
    hidden: int,
    max_tokens: int | None = None,
) -> Packing:
    """The cheapest rows of pieces, in micro-batches of about `max_tokens` positions if that is given.

    Long prompts are worth long rows, in which more completions share them; long completions are not.
    """
    return _arrange(tuple(prompts), tuple(completions), tuple(fresh), hidden, max_tokens)


@lru_cache(maxsize=256)  # the same rows in every epoch
def _arrange(
    prompts: tuple[int, ...],
    completions: tuple[int, ...],
    fresh: tuple[bool, ...],
    hidden: int,
    max_tokens: int | None,
) -> Packing:
    most = max(completions)
    limits = {ROW // 2, *(max(ROW, max(prompts) + together * most) for together in (1, 2, 4, 8, 16))}
    limits = limits if max_tokens is None else {min(limit, max_tokens) for limit in limits}
    found = (fill(pieces(prompts, completions, fresh, limit), hidden, max_tokens) for limit in sorted(limits))
    return min(found, key=lambda packing: packing.price)


def fresh_prompts(prompt_ids: Int[Tensor, "B P"], prompt_mask: Bool[Tensor, "B P"]) -> Bool[Tensor, " B"]:
    """True where a row's prompt is not that of the row before it."""
    hidden = torch.where(prompt_mask, prompt_ids, -1)
    same = (hidden[1:] == hidden[:-1]).all(1)
    return torch.cat([same.new_ones(1), ~same])


def pieces(prompts: Sequence[int], completions: Sequence[int], fresh: Sequence[bool], limit: int) -> list[Piece]:
    """Rows with one prompt in pieces of at most `limit` positions (a single sequence may have more)."""
    found: list[Piece] = []
    for row, (p, c, new) in enumerate(zip(prompts, completions, fresh, strict=True)):
        if new or found[-1].size + c > limit:
            found.append(Piece([row], p + c))
        else:
            found[-1] = Piece([*found[-1].rows, row], found[-1].size + c)
    return found


def fill(found: Sequence[Piece], hidden: int, max_tokens: int | None = None) -> Packing:
    """Pieces in rows of the length that is cheapest: each, the largest first, goes where it leaves the least room.

    Positions are to be of few numbers, for which oneDNN keeps something each: others than rungs cost 1/16 more.
    """
    total, longest = sum(piece.size for piece in found), max(piece.size for piece in found)
    found = sorted(found, key=lambda piece: -piece.size)
    shortest = longest + -longest % MULTIPLE
    best: Packing | None = None
    for length in range(shortest, max(shortest + shortest // 8, 2 * ROW) + 1, MULTIPLE):
        if best is not None and (
            total / length * cost(1, length, hidden) >= best.price
            or (max_tokens is not None and length > MORE * max_tokens)
        ):
            break  # nor would any longer one do
        bins = best_fit(found, length)
        heights = in_parts(len(bins), length, total, max_tokens)
        few = all(rung(height * length) == height * length for height in heights)
        price = cost(len(bins), length, hidden) * (1 if few else 17 / 16)
        if best is None or price < best.price:
            best = Packing(price, bins, length, heights[0])
    assert best is not None
    return best


def best_fit(found: Sequence[Piece], length: int) -> list[list[Piece]]:
    """Pieces in rows of at most `length` positions."""
    bins: list[list[Piece]] = []
    room: list[tuple[int, int]] = []  # of each row, sorted
    for piece in found:
        at = bisect_left(room, (piece.size, -1))
        if at == len(room):
            space, row = length, len(bins)
            bins.append([])
        else:
            space, row = room.pop(at)
        bins[row].append(piece)
        insort(room, (space - piece.size, row))
    return bins


def in_parts(rows: int, length: int, tokens: int, max_tokens: int | None) -> list[int]:
    """How many of these rows, which hold `tokens` tokens, go into each micro-batch: as many in all but the last."""
    if max_tokens is None:
        return [rows]
    for parts in range(-(-tokens // max_tokens), rows):
        height = -(-rows // parts)
        if height * length <= MORE * max_tokens:
            return [min(height, rows - start) for start in range(0, rows, height)]
    return [1] * rows


def cost(rows: int, length: int, hidden: int) -> float:
    """What rows of so many positions cost, in positions of an empty past."""
    return rows * length * (1 + length / (6 * hidden))


def _place(
    bins: Sequence[Sequence[Piece]],
    width: int,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    prompts: Sequence[int],
    completions: Sequence[int],
) -> Layout:
    """The tensors of a packing. Each segment (a prompt, a completion) is a run of tokens: all runs move at once."""
    runs: list[tuple[int, int, int, int, int, int]] = []  # where to, where from, length, position, piece, segment
    before = [0] * len(prompts)  # of each row: the place of its prompt's last token
    begin = [0] * len(prompts)  # of each row: the place of its completion's first token
    pitch, wide, number = prompt_ids.shape[1], prompt_ids.shape[1] + completion_ids.shape[1], 0
    for height, in_row in enumerate(bins):
        at = height * width
        for piece in in_row:
            first = piece.rows[0]
            p = prompts[first]
            runs.append((at, first * wide + pitch - p, p, 0, number, 0))
            end = at + p
            at = end
            for segment, sample in enumerate(piece.rows, 1):
                c = completions[sample]
                runs.append((at, sample * wide + pitch, c, p, number, segment))
                before[sample], begin[sample] = end - 1, at
                at += c
            number += 1
    device = prompt_ids.device
    to, origin, length, start, piece_of, segment_of = torch.tensor(runs, device=device).T
    within = torch.arange(int(length.sum()), device=device) - (length.cumsum(0) - length).repeat_interleave(length)
    places = to.repeat_interleave(length) + within

    def laid(per_run: Tensor, empty: int, step: Tensor | None = None) -> Tensor:
        values = per_run.repeat_interleave(length)
        flat = values.new_full((len(bins) * width,), empty)
        return flat.index_copy(0, places, values if step is None else values + step).view(len(bins), width)

    ids = torch.cat([prompt_ids, completion_ids], 1).flatten()
    tokens = ids[origin.repeat_interleave(length) + within]
    row, column = completion_mask.nonzero(as_tuple=True)
    ends, begins = torch.tensor(before, device=device), torch.tensor(begin, device=device)
    lengths = torch.tensor(completions, device=device)
    ahead = ends[:, None] - torch.arange(pitch - 1, -1, -1, device=device)
    after = torch.arange(completion_ids.shape[1], device=device)
    real = torch.cat([prompt_mask, after < lengths[:, None]], 1)
    return Layout(
        ids=ids.new_zeros(len(bins) * width).index_copy(0, places, tokens).view(len(bins), width),
        positions=laid(start, 0, within),
        mask=_sight(laid(piece_of, -1), laid(segment_of, -1))[:, None],
        source=torch.where(column == 0, ends[row], begins[row] + column - 1),
        last=torch.where(lengths == 0, ends, begins + lengths - 1),
        place=torch.where(real, torch.cat([ahead, begins[:, None] + after], 1), 0),
        real=real,
    )


def _sight(piece: Int[Tensor, "R L"], segment: Int[Tensor, "R L"]) -> Bool[Tensor, "R L L"]:
    """Who sees whom: the past of the own segment, and the prompt of the own piece. Padding sees itself alone."""
    width = piece.shape[1]
    causal = torch.ones(width, width, dtype=torch.bool, device=piece.device).tril()
    sees = (segment[:, :, None] == segment[:, None, :]) | (segment[:, None, :] == 0)
    sees &= (piece[:, :, None] == piece[:, None, :]) & causal
    return torch.where(piece[:, :, None] >= 0, sees, torch.eye(width, dtype=torch.bool, device=piece.device))
