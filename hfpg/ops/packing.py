"""Where the tokens of prompts and completions stand in one forward pass: padded rows, or packed ones without padding.

In a packed row stand several *pieces* one after the other. A piece is a prompt and completions of it, so that K
completions of one prompt share its positions: a completion's tokens see their prompt and their own past and nothing
else. Attention being the only place where positions meet, hidden states and gradients are those of the padded rows up
to rounding; models that look further than their mask says (windows, recurrence) must not be packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hfpg.ops.masked import extent
from hfpg.ops.product import rung


MULTIPLE = 16  # of which the length of packed rows is one
ROW = 256  # positions of a packed row, and more where it pays: attention costs their square


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
    bins, longest = arrange(*lengths, fresh_prompts(prompt_ids, prompt_mask).tolist(), hidden)
    height, width = completion_ids.shape[0], prompt_ids.shape[1] + completion_ids.shape[1]
    if not even_if_dearer and cost(len(bins), longest, hidden) > cost(height, width, hidden):
        return None
    return _place(bins, longest, prompt_ids, prompt_mask, completion_ids, completion_mask, *lengths)


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
    bins, longest = arrange(prompts.tolist(), completions.tolist(), fresh, hidden)
    dear = cost(len(bins), longest, hidden) > cost(height, width, hidden)
    return height * width if dear else len(bins) * longest


def arrange(
    prompts: Sequence[int], completions: Sequence[int], fresh: Sequence[bool], hidden: int
) -> tuple[list[list[Piece]], int]:
    """The cheapest rows of pieces, and their length.

    Long prompts are worth long rows, in which more completions share them; long completions are not.
    """
    most = max(completions)
    best: tuple[float, list[list[Piece]], int] | None = None
    tried: set[int] = set()
    for together in (1, 2, 4, 8, 16):
        limit = max(ROW, max(prompts) + together * most)
        if limit in tried:
            continue
        tried.add(limit)
        bins, longest = fill(pieces(prompts, completions, fresh, limit), hidden)
        price = cost(len(bins), longest, hidden)
        if best is None or price < best[0]:
            best = price, bins, longest
    assert best is not None
    return best[1], best[2]


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


def fill(found: Sequence[Piece], hidden: int) -> tuple[list[list[Piece]], int]:
    """Pieces in rows of about even length, and that length; as many rows as are cheapest.

    The longest piece comes first, each goes to the emptiest row.
    """
    total, longest = sum(piece.size for piece in found), max(piece.size for piece in found)
    fewest = -(-total // max(longest, 2 * ROW))
    most = min(-(-total // max(longest, ROW // 2)), fewest + 16)
    best: tuple[float, list[list[Piece]], int] | None = None
    for count in range(fewest, min(most, len(found)) + 1):
        rows: list[list[Piece]] = [[] for _ in range(count)]
        loads = [0] * count
        for piece in sorted(found, key=lambda piece: -piece.size):
            emptiest = loads.index(min(loads))
            rows[emptiest].append(piece)
            loads[emptiest] += piece.size
        length = row_length(count, max(loads))
        price = cost(count, length, hidden)
        if best is None or price < best[0]:
            best = price, rows, length
    assert best is not None
    return best[1], best[2]


def row_length(rows: int, load: int) -> int:
    """The length of `rows` rows that hold `load` positions each: together a rung, where one is not far."""
    length = load + -load % MULTIPLE
    near = range(length, length + length // 8 + 1, MULTIPLE)
    return next((longer for longer in near if rung(rows * longer) == rows * longer), length)


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
