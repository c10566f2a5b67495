"""Baselines: leave-one-out against an explicit loop, and a running mean that never sees the batch it serves."""

import math

import pytest
import torch

from hfpg.ops.baselines import (
    RunningMean,
    RunningMoments,
    accompanied,
    equal_in_group,
    group_mean,
    group_std,
    leave_one_out,
    update_running_mean,
    update_running_moments,
)


def test_a_row_is_accompanied_where_leave_one_out_has_others():
    weights, groups = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 0, 1, 1, 2, 3])
    assert accompanied(weights, groups).tolist() == [True, True, True, False, True, False, False]
    assert accompanied(weights[:1]).tolist() == [False] and accompanied(weights[:2]).tolist() == [True, True]


def test_leave_one_out_is_the_mean_of_the_others():
    g = torch.Generator().manual_seed(0)
    returns = torch.randn(9, generator=g, dtype=torch.float64)
    weights = torch.rand(9, generator=g, dtype=torch.float64)
    weights[3] = weights[7] = 0
    found = leave_one_out(returns, weights)
    for i in range(9):
        others = [j for j in range(9) if j != i]
        expected = sum(weights[j] * returns[j] for j in others) / sum(weights[j] for j in others)
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-12)


def test_the_row_itself_has_no_influence():
    returns, weights = torch.arange(4.0), torch.ones(4)
    changed = returns.clone()
    changed[2] = 1e6
    assert torch.equal(leave_one_out(changed, weights)[2], leave_one_out(returns, weights)[2])


def test_the_centred_return_is_n_over_n_minus_1_times_the_deviation_from_the_mean():
    g = torch.Generator().manual_seed(1)
    returns, ones = torch.randn(8, generator=g, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    torch.testing.assert_close(returns - leave_one_out(returns, ones), (returns - returns.mean()) * 8 / 7)
    torch.testing.assert_close(group_mean(returns, ones), returns.mean().expand(8))


@pytest.mark.parametrize("weights", [[1.0], [0.3], [0.0]])
def test_a_row_without_others_has_baseline_0(weights: list[float]):
    assert leave_one_out(torch.tensor([5.0]), torch.tensor(weights)).tolist() == [0.0]


def test_rows_of_weight_0_do_not_count_whatever_stands_there():
    returns, weights = torch.tensor([1.0, 3.0, math.nan]), torch.tensor([1.0, 1.0, 0.0])
    assert leave_one_out(returns, weights).tolist() == [3.0, 1.0, 2.0]
    assert group_mean(returns, weights)[:2].tolist() == [2.0, 2.0]
    assert leave_one_out(returns, torch.tensor([1.0, 0.0, 0.0]))[0] == 0  # nobody to compare with


@pytest.mark.parametrize("count", [7, 8, 16])
@pytest.mark.parametrize("value", [0.1, -3.3, 1e6])
def test_equal_returns_are_their_own_baseline_exactly(count: int, value: float):
    """In fp32 the mean of 7, 8 or 16 times 0.1 is not 0.1."""
    returns, weights = torch.full((count,), value), torch.ones(count)
    for baseline in (leave_one_out, group_mean):
        assert torch.equal(baseline(returns, weights), returns)
        assert torch.equal(baseline(returns, weights, torch.zeros(count, dtype=torch.long)), returns)
    assert not group_std(returns, weights).any()


def test_group_statistics_against_numpy_like_loops():
    g = torch.Generator().manual_seed(2)
    returns, groups = torch.randn(9, generator=g, dtype=torch.float64), torch.tensor([4, 4, 7, 7, 7, 4, 1, 7, 4])
    weights = torch.ones(9, dtype=torch.float64)
    weights[0] = 0
    mean, std = group_mean(returns, weights, groups), group_std(returns, weights, groups)
    for i in range(1, 9):
        same = returns[(groups == groups[i]) & (weights > 0)]
        assert float(mean[i]) == pytest.approx(float(same.mean()))
        assert float(std[i]) == pytest.approx(float(same.std()) if len(same) > 1 else 0.0)


def test_equal_groups_are_found_whatever_an_unscored_row_says():
    returns = torch.tensor([0.1, 0.1, 9.0, 0.0, 1.0, 2.0, -1.0, -1.0, 9.0])
    weights, groups = torch.tensor([1.0, 1, 0, 1, 1, 0, 1, 1, 0]), torch.tensor([3, 3, 3, 5, 5, 8, 9, 9, 9])
    expected = [True] * 3 + [False] * 2 + [True] * 4
    assert equal_in_group(returns, weights, groups).tolist() == expected
    assert group_mean(returns, weights, groups)[6:].tolist() == [-1.0] * 3


def test_running_moments_are_those_of_everything_seen():
    g = torch.Generator().manual_seed(3)
    batches = [torch.randn(n, generator=g, dtype=torch.float64) * 3 + 5 for n in (4, 1, 9)]
    state = RunningMoments()
    assert state.std == 1
    for batch in batches:
        state = update_running_moments(state, batch, torch.ones(len(batch)))
    everything = torch.cat(batches)
    assert state.rows == 14 and state.mean == pytest.approx(float(everything.mean()))
    assert state.std == pytest.approx(float(everything.std(correction=0)))
    assert update_running_moments(state, torch.tensor([math.nan]), torch.zeros(1)) == state


def test_the_running_mean_is_0_before_and_the_batch_mean_after_the_first_batch():
    state = RunningMean()
    assert state.mean == 0
    x, weights = torch.tensor([1.0, 2.0, 9.0]), torch.tensor([1.0, 3.0, 0.0])
    for decay in (0.0, 0.5, 0.99):
        assert update_running_mean(state, x, weights, decay).mean == pytest.approx(1.75)
    assert state == RunningMean()  # a pure step


def test_older_batches_fade_by_the_decay():
    state, batches, decay = RunningMean(), [4.0, -2.0, 7.0, 1.0], 0.8
    for value in batches:
        state = update_running_mean(state, torch.full((3,), value), torch.ones(3), decay)
    shares = [decay ** (len(batches) - 1 - i) for i in range(len(batches))]
    assert state.mean == pytest.approx(sum(s * b for s, b in zip(shares, batches, strict=True)) / sum(shares))


def test_decay_0_remembers_the_last_batch_only():
    state = update_running_mean(RunningMean(), torch.tensor([100.0]), torch.ones(1), 0.0)
    assert update_running_mean(state, torch.tensor([1.0, 3.0]), torch.ones(2), 0.0).mean == 2


def test_a_batch_where_no_row_counts_leaves_the_state():
    state = RunningMean(0.3, 0.1)
    assert update_running_mean(state, torch.tensor([math.nan, 5.0]), torch.zeros(2), 0.9) == state


def test_the_groups_others_are_the_baseline():
    g = torch.Generator().manual_seed(1)
    returns = torch.randn(8, generator=g, dtype=torch.float64)
    weights = torch.tensor([1.0, 1, 1, 0, 1, 1, 0, 1], dtype=torch.float64)
    groups = torch.tensor([5, 9, 5, 5, 9, 2, 2, 5])
    returns[3] = math.nan  # an unscored row: it counts for nobody
    found = leave_one_out(returns, weights, groups)
    for i in range(8):
        others = [j for j in range(8) if j != i and groups[j] == groups[i] and weights[j] > 0]
        expected = sum(float(returns[j]) for j in others) / len(others) if others else 0.0
        assert float(found[i]) == pytest.approx(expected, abs=1e-12)


def test_one_group_is_the_batch():
    returns, weights = torch.randn(6), torch.ones(6)
    whole = leave_one_out(returns, weights, torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(whole, leave_one_out(returns, weights))
