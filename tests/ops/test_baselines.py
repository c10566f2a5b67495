"""Baselines: leave-one-out against an explicit loop, and a running mean that never sees the batch it serves."""

import math

import pytest
import torch

from hfpg.ops.baselines import RunningMean, group_leave_one_out, leave_one_out, update_running_mean


def test_leave_one_out_is_the_mean_of_the_others():
    g = torch.Generator().manual_seed(0)
    returns = torch.randn(9, 4, generator=g, dtype=torch.float64)
    weights = torch.rand(9, generator=g, dtype=torch.float64)
    weights[3] = weights[7] = 0
    found = leave_one_out(returns, weights)
    for i in range(9):
        others = [j for j in range(9) if j != i]
        expected = sum(weights[j] * returns[j, 0] for j in others) / sum(weights[j] for j in others)
        torch.testing.assert_close(found[i], expected.expand(4), rtol=0, atol=1e-12)


def test_the_row_itself_and_later_tokens_have_no_influence():
    returns, weights = torch.arange(12.0).view(4, 3), torch.ones(4)
    before = leave_one_out(returns, weights)
    changed = returns.clone()
    changed[2], changed[:, 1:] = 1e6, -1e6
    changed[[0, 1, 3], 0] = returns[[0, 1, 3], 0]
    assert torch.equal(leave_one_out(changed, weights)[2], before[2])


def test_the_centred_return_is_n_over_n_minus_1_times_the_deviation_from_the_mean():
    g = torch.Generator().manual_seed(1)
    returns = torch.randn(8, 1, generator=g, dtype=torch.float64)
    centred = returns - leave_one_out(returns, torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(centred, (returns - returns.mean()) * 8 / 7)


@pytest.mark.parametrize("weights", [[1.0], [0.3], [0.0]])
def test_a_row_without_others_has_baseline_0(weights: list[float]):
    assert leave_one_out(torch.tensor([[5.0, 6.0]]), torch.tensor(weights)).tolist() == [[0.0, 0.0]]


def test_rows_of_weight_0_do_not_count_whatever_stands_there():
    returns, weights = torch.tensor([[1.0], [3.0], [math.nan]]), torch.tensor([1.0, 1.0, 0.0])
    assert leave_one_out(returns, weights)[:, 0].tolist() == [3.0, 1.0, 2.0]
    alone = leave_one_out(returns, torch.tensor([1.0, 0.0, 0.0]))
    assert alone[0, 0] == 0  # the only counting row has nobody to compare with


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
    returns = torch.randn(8, 3, generator=g, dtype=torch.float64)
    weights = torch.tensor([1.0, 1, 1, 0, 1, 1, 0, 1], dtype=torch.float64)
    groups = torch.tensor([5, 9, 5, 5, 9, 2, 2, 5])
    returns[3] = math.nan  # an unscored row: it counts for nobody
    found = group_leave_one_out(returns, weights, groups)
    for i in range(8):
        others = [j for j in range(8) if j != i and groups[j] == groups[i] and weights[j] > 0]
        expected = sum(float(returns[j, 0]) for j in others) / len(others) if others else 0.0
        assert found[i].tolist() == pytest.approx([expected] * 3, abs=1e-12)


def test_one_group_is_the_batch():
    returns, weights = torch.randn(6, 2), torch.ones(6)
    whole = group_leave_one_out(returns, weights, torch.zeros(6, dtype=torch.long))
    torch.testing.assert_close(whole, leave_one_out(returns, weights))
