"""Reductions: each against its definition in plain Python, and the limits that make micro-batches harmless."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hfpg.ops.masked import (
    aggregate,
    center_and_scale,
    masked_mean,
    row_mean,
    row_std,
    token_coefficients,
)


AGGREGATIONS = ("sequence_sum", "token_mean", "sequence_mean", "constant")


def batch(seed: int, rows: int = 7, width: int = 5, gaps: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """x, a ragged mask with one empty row, and weights of which one is 0; float64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=g, dtype=torch.float64)
    mask = torch.rand(rows, width, generator=g) < 0.6
    mask[0], mask[1, 0] = True, True
    weights = torch.rand(rows, generator=g, dtype=torch.float64) + 0.1
    if gaps:
        mask[2] = False
        weights[3] = 0
    return x, mask, weights


def by_hand(x: Tensor, mask: Tensor, weights: Tensor, how: str, max_length: int) -> float:
    """The definition, row by row, with no tensor operation."""
    rows = [
        ([v for v, m in zip(xs, ms, strict=True) if m], w)
        for xs, ms, w in zip(x.tolist(), mask.tolist(), weights.tolist(), strict=True)
    ]
    if how == "token_mean":
        return sum(w * sum(v) for v, w in rows) / sum(w * len(v) for v, w in rows)
    total = sum(w for _, w in rows)
    if how == "sequence_mean":
        return sum(w * sum(v) / len(v) for v, w in rows if v) / total
    return sum(w * sum(v) for v, w in rows) / (total * (max_length if how == "constant" else 1))


@pytest.mark.parametrize("how", AGGREGATIONS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_every_aggregate_is_its_definition(how: str, seed: int):
    x, mask, weights = batch(seed)
    assert float(aggregate(x, mask, weights, how, 9)) == pytest.approx(by_hand(x, mask, weights, how, 9), abs=1e-12)


@pytest.mark.parametrize("how", AGGREGATIONS)
@pytest.mark.parametrize("sizes", [(1, 6), (3, 4), (1,) * 7, (7,)])
def test_parts_add_up_to_the_whole_with_the_coefficients_of_the_whole(how: str, sizes: tuple[int, ...]):
    x, mask, weights = batch(1)
    coefficients = token_coefficients(mask, weights, how, 9)
    cut = zip(x.split(sizes), mask.split(sizes), coefficients.split(sizes), strict=True)
    parts = sum((torch.where(m, part, 0) * c).sum() for part, m, c in cut)
    torch.testing.assert_close(parts, aggregate(x, mask, weights, how, 9), rtol=0, atol=1e-12)


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_padding_has_no_influence(how: str):
    x, mask, weights = batch(2)
    expected = aggregate(x, mask, weights, how, 9)
    for filler in (1e30, math.inf, math.nan):
        assert aggregate(torch.where(mask, x, filler), mask, weights, how, 9) == expected
    wider = torch.nn.functional.pad(x, (0, 3), value=5.0), torch.nn.functional.pad(mask, (0, 3))
    torch.testing.assert_close(aggregate(*wider, weights, how, 9), expected)


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_a_row_of_weight_0_is_as_good_as_absent(how: str):
    x, mask, weights = batch(3)
    present = weights > 0
    expected = aggregate(x[present], mask[present], weights[present], how, 9)
    x[~present] = 1e6
    torch.testing.assert_close(aggregate(x, mask, weights, how, 9), expected)


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_the_scale_of_the_weights_and_the_order_of_the_rows_do_not_matter(how: str):
    x, mask, weights = batch(4)
    expected = aggregate(x, mask, weights, how, 9)
    torch.testing.assert_close(aggregate(x, mask, weights * 12, how, 9), expected)
    torch.testing.assert_close(aggregate(x.flip(0), mask.flip(0), weights.flip(0), how, 9), expected)


def test_constant_divides_by_the_width_of_the_batch_unless_told():
    x, mask, weights = batch(5)
    default = aggregate(x, mask, weights, "constant")
    torch.testing.assert_close(default, aggregate(x, mask, weights, "constant", x.shape[1]))
    torch.testing.assert_close(default * x.shape[1], aggregate(x, mask, weights, "sequence_sum"))


def test_the_aggregates_agree_where_they_must():
    """All rows of length 1: one token per sequence, so that the three means are one."""
    x, _, weights = batch(6, width=1, gaps=False)
    mask = torch.ones(7, 1, dtype=torch.bool)
    for how in AGGREGATIONS:
        torch.testing.assert_close(aggregate(x, mask, weights, how), row_mean(x[:, 0], weights))


@pytest.mark.parametrize("how", AGGREGATIONS)
def test_nothing_that_counts_gives_0(how: str):
    x = torch.full((2, 3), math.nan, requires_grad=True)
    empty, full = torch.zeros(2, 3, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)
    value = aggregate(x, empty, torch.ones(2), how)
    value.backward()
    assert value == 0 and x.grad is not None and not x.grad.any()
    assert aggregate(torch.ones(2, 3), full, torch.zeros(2), how) == 0
    assert not token_coefficients(full, torch.zeros(2), how).any()


def test_an_unknown_aggregation_names_the_known_ones():
    plain = inspect.unwrap(token_coefficients)  # the shape checker of the tests would refuse the literal first
    with pytest.raises(ValueError, match="aggregation='mean' is unknown; use 'sequence_sum', 'token_mean'"):
        plain(torch.ones(1, 1, dtype=torch.bool), torch.ones(1), "mean")


def test_row_mean_and_std_leave_out_rows_of_weight_0_whatever_stands_there():
    x, weights = torch.tensor([1.0, 3.0, math.nan, math.inf]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert row_mean(x, weights) == 2 and row_std(x, weights) == 1
    assert row_mean(x, torch.zeros(4)) == 0
    assert row_mean(torch.tensor([1.0, 5.0]), torch.tensor([3.0, 1.0])) == 2


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), shift=st.floats(-50, 50), scale=st.floats(0.1, 50))
def test_center_and_scale_has_mean_0_and_std_1_over_tokens_whatever_the_unit(seed: int, shift: float, scale: float):
    x, mask, weights = batch(seed)
    white = center_and_scale(x * scale + shift, mask, weights)
    assert float(masked_mean(white, mask, weights)) == pytest.approx(0, abs=1e-9)
    assert float(masked_mean(white**2, mask, weights)) == pytest.approx(1, abs=1e-6)
    torch.testing.assert_close(white[mask], center_and_scale(x, mask, weights)[mask], rtol=0, atol=1e-6)


def test_fewer_than_two_tokens_stay_as_they_are():
    x, mask = torch.tensor([[3.0, 4.0], [5.0, 6.0]]), torch.tensor([[True, False], [False, False]])
    assert torch.equal(center_and_scale(x, mask, torch.ones(2)), x)
    # two tokens, but one of them is in a row that does not count
    mask[1, 0] = True
    assert torch.equal(center_and_scale(x, mask, torch.tensor([1.0, 0.0])), x)


def test_the_statistics_ignore_padding_and_rows_of_weight_0():
    x, mask, weights = batch(8)
    counts = mask & (weights > 0)[:, None]
    loud = torch.where(counts, x, 1e6)
    torch.testing.assert_close(
        center_and_scale(loud, mask, weights)[counts], center_and_scale(x, mask, weights)[counts]
    )


@pytest.mark.parametrize("value", [0.1, 5.3, -1234.5])
@pytest.mark.parametrize("tokens", [2, 7, 8, 16, 1000])
def test_equal_values_become_0_and_not_magnified_rounding(value: float, tokens: int):
    """The fp32 mean of equal numbers is not exactly that number; divided by an equally small std, that is an O(1)
    advantage from nothing: with a constant reward the policy must stay as it is."""
    x, mask = torch.full((1, tokens), value), torch.ones(1, tokens, dtype=torch.bool)
    assert float(center_and_scale(x, mask, torch.ones(1)).abs().max()) <= 1e-3


@pytest.mark.parametrize("value", [0.1, -1234.5])
def test_values_that_differ_by_rounding_become_0(value: float):
    x = torch.tensor([[value, value, value]])
    x[0, 2] = torch.nextafter(x[0, 2], torch.tensor(math.inf))
    assert x[0, 2] != x[0, 0]
    assert torch.equal(center_and_scale(x, torch.ones_like(x, dtype=torch.bool), torch.ones(1)), torch.zeros_like(x))
