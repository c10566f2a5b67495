"""Packed rows: every token stands once, sees what it should, and the predicting positions are the right ones."""

from __future__ import annotations

import functools

import pytest
import torch

from hfpg.fast.packing import MORE, Layout, arrange, fill, packed, packed_batches, padded, pieces, positions_of


def rows(prompts: list[int], completions: list[int], same: list[int]):
    """Ragged rows of distinct token ids; row i has the prompt number same[i]."""
    count, p, c = len(prompts), max(prompts), max(completions)
    prompt_ids = torch.tensor(same)[:, None] * 100 + torch.arange(p) + 1000
    completion_ids = torch.arange(count * c).view(count, c) + 1
    prompt_mask = torch.arange(p) >= p - torch.tensor(prompts)[:, None]
    completion_mask = torch.arange(c) < torch.tensor(completions)[:, None]
    return prompt_ids, prompt_mask, completion_ids, completion_mask


anyhow = functools.partial(packed, even_if_dearer=True)


def past(layout: Layout, at: int) -> list[int]:
    """The tokens that a position sees, in the order of their positions."""
    width = layout.ids.shape[1]
    row, column = divmod(at, width)
    by_key = layout.mask.dim() == 2
    seen = layout.mask[row] & (torch.arange(width) <= column) if by_key else layout.mask[row, 0, column]
    order = layout.positions[row][seen].argsort(stable=True)
    assert sorted(layout.positions[row][seen].tolist()) == list(range(int(seen.sum()))), "one token per position"
    return layout.ids[row][seen][order].tolist()


CASES = {
    "K = 1, ragged": ([3, 1, 5, 2], [4, 2, 1, 6], [0, 1, 2, 3]),
    "K = 3, ragged": ([3, 3, 3, 2, 2, 2], [4, 2, 1, 6, 3, 5], [0, 0, 0, 1, 1, 1]),
    "all the same": ([4, 4, 4, 4], [3, 3, 3, 3], [0, 0, 0, 0]),
    "empty completions": ([2, 2, 3], [0, 3, 0], [0, 0, 1]),
    "one row": ([2], [3], [0]),
}


@pytest.mark.parametrize("case", CASES)
def test_packed_positions_see_what_padded_ones_see(case):
    given = rows(*CASES[case])
    flat, found = padded(*given), anyhow(*given)
    assert len(flat.source) == len(found.source) == given[3].sum()
    for a, b in zip([*flat.source, *flat.last], [*found.source, *found.last], strict=True):
        assert past(flat, int(a)) == past(found, int(b))


def test_a_gap_is_read_and_its_tokens_are_not_scored():
    prompt_ids, prompt_mask, completion_ids, mask = rows([2, 2, 3], [5, 4, 5], [0, 0, 1])
    mask[0, 1:3] = mask[2, 0] = False
    flat, found = (f(prompt_ids, prompt_mask, completion_ids, mask) for f in (padded, anyhow))
    assert len(found.source) == mask.sum()
    for a, b in zip([*flat.source, *flat.last], [*found.source, *found.last], strict=True):
        assert past(flat, int(a)) == past(found, int(b))


def test_the_prompt_stands_once_for_its_completions():
    given = rows([20] * 8, [5] * 8, [0] * 4 + [1] * 4)
    found = packed(*given)
    assert found.ids.numel() == 2 * (20 + 4 * 5), "two prompts and eight completions, no padding"
    assert padded(*given).ids.numel() == 8 * 25


def test_padding_sees_itself_alone():
    found = anyhow(*rows([2, 2, 9], [3, 1, 1], [0, 0, 1]))
    assert found.mask.any(-1).all(), "a position that sees nothing makes NaN of a softmax"


def test_padded_rows_stay_where_packing_saves_nothing():
    assert packed(*rows([4, 4], [3, 3], [0, 1])) is None
    assert packed(*rows([0, 4], [3, 1], [0, 1])) is None, "nothing stands before the first token"
    long = rows([10] * 4, [2000] * 4, [0] * 4)
    assert packed(*long) is None, "one row of 8010 positions would square their attention"


def test_long_prompts_do_not_make_long_rows():
    """Completions of one prompt are spread over rows, each with the prompt, rather than put in one row of 2000."""
    found = pieces([100] * 8, [200] * 8, [True] + [False] * 7, 256)
    assert [piece.size for piece in found] == [300] * 8
    found = pieces([100] * 8, [50] * 8, [True] + [False] * 7, 256)
    assert max(piece.size for piece in found) <= 256 and sum(len(piece.rows) for piece in found) == 8


def test_rows_are_as_long_as_it_pays():
    """Long prompts and short completions: one row. Short prompts and long completions: none above the longest."""
    found = arrange([1000] * 8, [100] * 8, [True] + [False] * 7, 768)
    assert (len(found.bins), found.length) == (1, 1808)
    found = arrange([10] * 8, [1000] * 8, [True] + [False] * 7, 768)
    assert (len(found.bins), found.length) == (8, 1024)


def test_rows_are_filled_well():
    made = torch.Generator().manual_seed(0)
    sizes = torch.randint(20, 120, (40,), generator=made).tolist()
    found = fill(pieces([10] * 40, [s - 10 for s in sizes], [True] * 40, 256), 768)
    loads = [sum(piece.size for piece in row) for row in found.bins]
    assert sorted(r for row in found.bins for piece in row for r in piece.rows) == list(range(40))
    assert max(loads) <= found.length and len(found.bins) * found.length <= 1.1 * sum(sizes)


def test_positions_are_of_few_numbers():
    """oneDNN keeps half a megabyte for each. Multiples of 64 where such a one is near."""
    made, seen = torch.Generator().manual_seed(0), set()
    for _ in range(100):
        sizes = torch.randint(20, 120, (int(torch.randint(6, 13, (1,), generator=made)),), generator=made).tolist()
        found = arrange([10] * len(sizes), sizes, [True] * len(sizes), 768)
        seen.add(len(found.bins) * found.length)
    assert len([n for n in seen if 512 < n <= 1024]) <= 10


@pytest.mark.parametrize("generations", [1, 4])
def test_micro_batches_are_full_and_of_few_numbers_of_positions(generations):
    """Steps of 64 completions, of 1 to 48 tokens: at most 8 % of the positions are padding or prompts once more."""
    made, seen, used, real = torch.Generator().manual_seed(0), set(), 0, 0
    groups = torch.arange(64) // generations
    for _ in range(30):
        completions = torch.empty(64).geometric_(0.04, generator=made).clamp(max=48).long()
        given = rows([16] * 64, completions.tolist(), groups.tolist())
        for part in packed_batches(torch.full((64,), 16), completions, groups, 256, 1024):
            size = positions_of(*(x[part] for x in given), 256)
            assert size <= MORE * 1024
            seen.add(size)
            used += size
        real += int(completions.sum()) + 16 * 64 // generations
    assert used <= 1.08 * real
    assert len(seen) <= 10
