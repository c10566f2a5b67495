"""Credit over time, against the definitions as double sums."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hfpg.ops.returns import gae, rewards_to_go, token_rewards


def episode(seed: int, rows: int = 5, width: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and a prefix mask with a full row and an empty one; float64, noise in the padding."""
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randn(rows, width, generator=g, dtype=torch.float64)
    values = torch.randn(rows, width, generator=g, dtype=torch.float64)
    lengths = torch.randint(1, width + 1, (rows,), generator=g)
    lengths[0], lengths[1] = width, 0
    return rewards, values, torch.arange(width) < lengths[:, None]


def gae_by_definition(r: list[float], v: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = Σ_{l ≥ t} (γλ)^{l−t} δ_l, δ_l = r_l + γ V_{l+1} − V_l, for the chosen tokens of one row."""
    v = [*v, 0.0]
    deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(len(r))]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(r))) for t in range(len(r))]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), gamma=st.sampled_from([1.0, 0.9, 0.5]), lam=st.sampled_from([1.0, 0.95, 0.3, 0.0]))
def test_gae_is_its_double_sum(seed: int, gamma: float, lam: float):
    rewards, values, mask = episode(seed)
    expected = torch.zeros_like(rewards)
    for row, length in enumerate(mask.sum(1).tolist()):
        one = gae_by_definition(rewards[row, :length].tolist(), values[row, :length].tolist(), gamma, lam)
        expected[row, :length] = torch.tensor(one, dtype=torch.float64)
    torch.testing.assert_close(gae(rewards, values, mask, gamma, lam), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_at_lambda_1_gae_is_the_return_minus_the_value(gamma: float):
    rewards, values, mask = episode(1)
    expected = rewards_to_go(rewards, mask, gamma) - torch.where(mask, values, 0)
    torch.testing.assert_close(gae(rewards, values, mask, gamma, lam=1.0), expected, rtol=0, atol=1e-12)


def test_at_lambda_0_gae_is_the_one_step_error():
    rewards, values, mask = episode(2)
    values = torch.where(mask, values, 0)
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    expected = torch.where(mask, rewards + 0.9 * following - values, 0)
    torch.testing.assert_close(gae(rewards, values, mask, 0.9, lam=0.0), expected, rtol=0, atol=1e-12)


def test_with_the_true_values_every_advantage_is_0_at_every_lambda():
    rewards, _, mask = episode(3)
    true = rewards_to_go(rewards, mask, 0.9)
    for lam in (0.0, 0.5, 1.0):
        assert float(gae(rewards, true, mask, 0.9, lam).abs().max()) < 1e-12


def test_a_worked_example():
    """Rewards (0, 0, 1), V = (.22, .194, .173), γ = 1, λ = .95."""
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.22, 0.194, 0.173]])
    found = gae(rewards, values, torch.ones(1, 3, dtype=torch.bool), 1.0, 0.95)
    assert found[0].tolist() == pytest.approx([0.7004, 0.7646, 0.8270], abs=5e-5)


@pytest.mark.parametrize("filler", [1e9, math.nan, math.inf])
def test_what_stands_in_the_padding_does_not_leak(filler: float):
    rewards, values, mask = episode(4)
    expected = gae(rewards, values, mask, 0.9, 0.8)
    loud = gae(torch.where(mask, rewards, filler), torch.where(mask, values, filler), mask, 0.9, 0.8)
    assert torch.equal(loud, expected)
    assert not expected[~mask].any()


def test_the_score_sits_on_the_last_chosen_token():
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 0, 0]], dtype=torch.bool)
    rewards = token_rewards(torch.tensor([2.0, -3.0, 5.0, 7.0]), mask)
    # stopped, cut by the length limit, empty (earns nothing), stop token at once
    assert rewards.tolist() == [[0, 2, 0, 0], [0, 0, 0, -3], [0, 0, 0, 0], [7, 0, 0, 0]]


def test_every_chosen_token_pays_beta_times_k1_and_padding_pays_nothing():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]], dtype=torch.bool)
    log_ratio = torch.tensor([[0.5, -1.0, math.nan], [3.0, 3.0, 3.0]])
    rewards = token_rewards(torch.tensor([2.0, 2.0]), mask, log_ratio, 0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 2.1, 0.0], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("filler", [9.0, math.nan])
def test_a_score_in_parts_is_paid_where_it_was_earned_and_padding_earns_nothing(filler: float):
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)
    parts = torch.where(mask, torch.tensor([0.5, 0.25, 1.0, 0.0]), filler)
    rewards = token_rewards(torch.tensor([2.0, -3.0, 1.0, 5.0]), mask, token_scores=parts)
    assert rewards.tolist() == [[0.5, 0.25, 1.25, 0], [-3, 0, 0, 0], [0.5, 0, 0.5, 0], [0, 0, 0, 0]]


def test_the_first_return_is_the_score_minus_beta_times_the_sequence_kl():
    _, log_ratio, mask = episode(5)
    scores = torch.arange(5, dtype=torch.float64)
    first = rewards_to_go(token_rewards(scores, mask, log_ratio, 0.3), mask)[:, 0]
    expected = torch.where(mask.any(1), scores, 0) - 0.3 * torch.where(mask, log_ratio, 0).sum(1)
    torch.testing.assert_close(first, expected, rtol=0, atol=1e-12)


def test_the_arguments_stay_as_they_are():
    rewards, values, mask = episode(6)
    kept = rewards.clone(), values.clone(), mask.clone()
    gae(rewards, values, mask, 0.9, 0.9)
    token_rewards(rewards[:, 0], mask, values, 0.1)
    assert all(torch.equal(a, b) for a, b in zip((rewards, values, mask), kept, strict=True))


def test_a_gap_takes_no_time_and_the_last_value_comes_after_the_last_token():
    """A mask with a hole: the last chosen token is the last True, and values carry over the hole."""
    mask = torch.tensor([[True, False, False, True, False]])
    rewards = token_rewards(torch.tensor([2.0]), mask)
    assert rewards.tolist() == [[0, 0, 0, 2, 0]]
    values = torch.tensor([[0.5, 99.0, -99.0, 0.25, 99.0]])
    close = gae(torch.tensor([[0.0, 2.0]]), torch.tensor([[0.5, 0.25]]), torch.ones(1, 2, dtype=torch.bool), 0.9, 0.8)
    found = gae(rewards, values, mask, 0.9, 0.8)
    assert found[0, [0, 3]].tolist() == close[0].tolist() and not found[0, [1, 2, 4]].any()
    longer = gae(rewards, values, mask, 1.0, 1.0, torch.tensor([3.0]))
    assert longer[0, [0, 3]].tolist() == [2 + 3 - 0.5, 2 + 3 - 0.25]
    assert not gae(rewards, values, torch.zeros_like(mask), 1.0, 1.0, torch.tensor([3.0])).any()
    assert rewards_to_go(rewards, mask, 0.5, torch.tensor([4.0]))[0, [0, 3]].tolist() == [0.5 * (2 + 2), 2 + 2]
