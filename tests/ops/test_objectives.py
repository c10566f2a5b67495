"""Objectives: at ratio 1 every one is the policy gradient; beyond the clip there is no gradient."""

import math

import pytest
import torch
from torch import Tensor

from hfpg.ops.objectives import clip_fraction, clipped_surrogate, policy_gradient, ratio, value_error


CLIPS = [(0.2, None, None), (0.2, 0.28, None), (0.2, None, 3.0), (0.1, 0.4, 2.0)]


def tokens(seed: int = 0, rows: int = 6, width: int = 5) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(rows, width, generator=g, dtype=torch.float64) * 4
    advantages = torch.randn(rows, width, generator=g, dtype=torch.float64) * 3
    advantages[0, 0] = 0
    return logprobs.requires_grad_(), advantages


def gradient(loss: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), x)[0]


def one(log_ratio: float, advantage: float, *clips: float | None) -> tuple[float, float]:
    """Loss of one token and its derivative with respect to log π."""
    x = torch.tensor([[log_ratio]], dtype=torch.float64, requires_grad=True)
    loss = clipped_surrogate(x, torch.tensor([[advantage]], dtype=torch.float64), *clips)
    return loss.item(), gradient(loss, x).item()


@pytest.mark.parametrize("clips", CLIPS)
def test_at_ratio_1_the_clipped_surrogate_is_the_policy_gradient(clips):
    logprobs, advantages = tokens()
    surrogate = clipped_surrogate(logprobs - logprobs.detach(), advantages, *clips)
    expected = gradient(policy_gradient(logprobs, advantages), logprobs)
    torch.testing.assert_close(gradient(surrogate, logprobs), expected, rtol=0, atol=1e-14)


def test_the_policy_gradient_descends_where_the_advantage_is_positive():
    logprobs, advantages = tokens(1)
    torch.testing.assert_close(gradient(policy_gradient(logprobs, advantages), logprobs), -advantages)


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "cut"),
    [(0.5, 1.0, True), (-0.5, -1.0, True), (0.5, -1.0, False), (-0.5, 1.0, False), (0.1, 1.0, False)],
)
def test_no_gradient_where_the_ratio_has_gone_far_enough_the_good_way(log_ratio: float, advantage: float, cut: bool):
    loss, slope = one(log_ratio, advantage, 0.2)
    assert (slope == 0) == cut
    if not cut:  # d(−ρA)/d log π = −ρA
        assert loss == slope == pytest.approx(-math.exp(log_ratio) * advantage)
    fraction = clip_fraction(torch.tensor([[log_ratio]]), torch.tensor([[advantage]]), 0.2)
    assert bool(fraction.item()) == cut


def test_clip_higher_moves_the_upper_bound_only():
    up, down = math.log(1.25), math.log(0.75)
    assert one(up, 1.0, 0.2)[1] == 0 and one(up, 1.0, 0.2, 0.28)[1] != 0
    assert one(up, 1.0, 0.2)[0] == pytest.approx(-1.2)
    assert one(down, -1.0, 0.2, 0.28)[1] == 0
    assert clip_fraction(torch.tensor([[up]]), torch.ones(1, 1), 0.2, 0.28).item() == 0
    assert clip_fraction(torch.tensor([[down]]), -torch.ones(1, 1), 0.2, 0.28).item() == 1


def test_dual_clip_bounds_the_loss_of_a_bad_token_and_touches_no_other():
    far = math.log(50.0)
    assert one(far, -2.0, 0.2)[0] == pytest.approx(100)
    assert one(far, -2.0, 0.2, None, 3.0) == (pytest.approx(6), 0)
    for log_ratio, advantage in [(far, 2.0), (math.log(2.9), -2.0), (-1.0, -2.0), (0.0, 0.0)]:
        assert one(log_ratio, advantage, 0.2, None, 3.0) == one(log_ratio, advantage, 0.2)


def test_the_surrogate_is_a_lower_bound_of_the_unclipped_objective():
    g = torch.Generator().manual_seed(3)
    log_ratio, advantages = torch.randn(2, 50, 4, generator=g)
    assert (clipped_surrogate(log_ratio, advantages, 0.2) >= -ratio(log_ratio) * advantages - 1e-6).all()


def test_clip_fraction_is_where_the_gradient_is_cut():
    g = torch.Generator().manual_seed(4)
    log_ratio, advantages = torch.randn(2, 50, 4, generator=g)
    x = log_ratio.requires_grad_()
    slopes = gradient(clipped_surrogate(x, advantages, 0.2, 0.3), x)
    assert torch.equal(clip_fraction(x, advantages, 0.2, 0.3), (slopes == 0).float())
    assert 0.1 < (slopes == 0).float().mean() < 0.9


def test_advantages_and_returns_are_constants():
    logprobs, advantages = tokens(5)
    advantages.requires_grad_()
    for loss in (policy_gradient(logprobs, advantages), clipped_surrogate(logprobs + 1, advantages, 0.2, None, 3.0)):
        loss.sum().backward()
    value_error(logprobs, advantages, advantages, 0.2).sum().backward()
    assert advantages.grad is None and logprobs.grad is not None


def test_a_broken_ratio_is_large_and_finite():
    extreme = torch.tensor([[1e4, -1e4, math.inf, -math.inf]], requires_grad=True)
    rho = ratio(extreme)
    big, small = math.exp(20), math.exp(-20)
    torch.testing.assert_close(rho, torch.tensor([[big, small, big, small]]))
    loss = clipped_surrogate(extreme, torch.tensor([[1.0, -1.0, -1.0, 1.0]]), 0.2)
    assert torch.isfinite(loss).all() and torch.isfinite(gradient(loss, extreme)).all()


def test_value_error_is_half_the_square():
    values = torch.tensor([[1.0, -2.0]], requires_grad=True)
    returns = torch.tensor([[3.0, -2.0]])
    assert value_error(values, returns).tolist() == [[2.0, 0.0]]
    assert gradient(value_error(values, returns), values).tolist() == [[-2.0, 0.0]]


@pytest.mark.parametrize(
    ("value", "target", "expected", "slope"),
    [
        (1.1, 5.0, 0.5 * 3.9**2, -3.9),  # inside the range: as without clipping
        (2.0, 5.0, 0.5 * 3.8**2, 0.0),  # moved too far toward the target: the clipped error is larger, no gradient
        (2.0, -5.0, 0.5 * 7.0**2, 7.0),  # moved too far away from it: pulled back
        (0.0, -5.0, 0.5 * 5.8**2, 0.0),  # the same below
        (0.0, 5.0, 0.5 * 5.0**2, -5.0),
    ],
)
def test_a_clipped_value_stays_near_the_old_one(value: float, target: float, expected: float, slope: float):
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    old = torch.ones(1, 1, dtype=torch.float64)
    error = value_error(values, torch.full_like(old, target), old, 0.2)
    assert error.item() == pytest.approx(expected)
    assert gradient(error, values).item() == pytest.approx(slope)


def test_at_the_old_value_clipping_changes_nothing():
    values, returns = tokens(6)
    plain, clipped = value_error(values, returns), value_error(values, returns, values.detach(), 0.2)
    torch.testing.assert_close(clipped, plain)
    torch.testing.assert_close(gradient(clipped, values), gradient(plain, values))
