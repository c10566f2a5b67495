"""Preferences: the loss is −log of the chosen probability, and agreement counts what people would count."""

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfpg.ops.preference import agrees, bradley_terry, centering, pair_accuracy, wilson


C = torch.tensor([1.5, -0.25, 40.0, -300.0])
R = torch.tensor([0.5, 0.75, -40.0, 300.0])


def probability(d: float) -> float:
    return 1 / (1 + math.exp(-d))


def test_the_loss_is_minus_the_log_of_the_chosen_probability():
    expected = [-math.log(probability(1.0)), -math.log(probability(-1.0)), 0.0, 600.0]  # the last overflows in exp
    torch.testing.assert_close(bradley_terry(C, R), torch.tensor(expected))


@settings(max_examples=50, deadline=None)
@given(d=st.floats(-30, 30), m=st.floats(0, 5), p=st.floats(0, 1))
def test_with_margin_and_preference_it_is_the_cross_entropy(d: float, m: float, p: float):
    one = torch.tensor([d, m, p], dtype=torch.float64)[:, None]
    found = bradley_terry(one[0], torch.zeros(1, dtype=torch.float64), one[1], one[2])
    chosen = probability(d - m)
    expected = -p * math.log(chosen) - (1 - p) * math.log(probability(m - d))
    assert found.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_margin_is_what_the_difference_must_exceed():
    margin = torch.tensor([1.0, 0.5, 2.0, 0.0])
    torch.testing.assert_close(bradley_terry(C, R, margin), bradley_terry(C - margin, R))
    assert bradley_terry(C, R, margin)[0] == pytest.approx(math.log(2))


def test_the_gradient_is_how_wrong_the_probability_is():
    """∂L/∂r_c = −(1 − σ(d)), and the opposite for the rejected text: a sure pair teaches nothing."""
    chosen, rejected = C.double().requires_grad_(), R.double().requires_grad_()
    bradley_terry(chosen, rejected).sum().backward()
    expected = (C - R).double().sigmoid() - 1
    torch.testing.assert_close(chosen.grad, expected)
    torch.testing.assert_close(rejected.grad, -expected)


def test_both_losses_pass_gradcheck_in_float64():
    g = torch.Generator().manual_seed(0)
    chosen, rejected, margin = torch.randn(3, 6, generator=g, dtype=torch.float64).requires_grad_()
    preference = torch.tensor([1.0, 0.5, 0.9, 1.0, 0.0, 0.5], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda c, r, m: bradley_terry(c, r, m, preference), (chosen, rejected, margin))
    assert torch.autograd.gradcheck(centering, (chosen, rejected))


def test_a_tie_is_learnt_as_a_fair_coin():
    near = torch.tensor([0.3, 0.0], requires_grad=True)
    loss = bradley_terry(near, torch.zeros(2), preference=torch.full((2,), 0.5))
    torch.testing.assert_close(loss[1].item(), math.log(2))
    loss.sum().backward()
    assert near.grad[0] > 0  # pulled down to equality
    assert near.grad[1] == 0


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_scores_make_an_fp32_loss(half: torch.dtype):
    chosen, rejected = torch.tensor([3.0, -2.5]).to(half), torch.tensor([2.9, 1.1]).to(half)
    loss = bradley_terry(chosen, rejected)
    assert loss.dtype == centering(chosen, rejected).dtype == torch.float32
    assert torch.equal(loss, bradley_terry(chosen.float(), rejected.float()))
    assert bradley_terry(chosen.double(), rejected.double()).dtype == torch.float64


def test_a_function_of_the_prompt_changes_no_loss_and_centering_fixes_it():
    shift = torch.tensor([4.0, -2.0, 8.0, 16.0])
    assert torch.equal(bradley_terry(C + shift, R + shift), bradley_terry(C, R))
    base = torch.tensor(0.0, requires_grad=True)
    centering(torch.tensor([3.0]) + base, torch.tensor([1.0]) + base).sum().backward()
    assert base.grad == 4 * (3 + 1)  # d (r_c + r_r)² / d shift: 0 only at r_c = −r_r


def test_the_loss_is_least_at_the_odds_that_people_have():
    """Of 100 people 73 prefer the first text: the best difference is log(73 / 27)."""
    d = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    for _ in range(200):
        loss = 0.73 * bradley_terry(d, zero) + 0.27 * bradley_terry(zero, d)
        (slope,) = torch.autograd.grad(loss.sum(), d)
        d = (d - 4 * slope).detach().requires_grad_()
    assert d.item() == pytest.approx(math.log(73 / 27), abs=1e-9)


def test_equal_scores_count_half():
    assert agrees(torch.tensor([2.0, 0.0, -1.0, 1e-30])).tolist() == [1.0, 0.5, 0.0, 1.0]
    accuracy, low, high = pair_accuracy(torch.tensor([2.0, 1.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 2.0, 0.0]))
    assert accuracy == 0.5 and (low, high) == wilson(2, 4)


def test_accuracy_does_not_depend_on_the_unit_and_turns_round_with_the_sign():
    g = torch.Generator().manual_seed(1)
    c, r = torch.randn(2, 200, generator=g).round(decimals=1)
    accuracy = pair_accuracy(c, r)[0]
    assert pair_accuracy(3 * c + 7, 3 * r + 7)[0] == accuracy
    assert pair_accuracy(r, c)[0] == pytest.approx(1 - accuracy)
    assert 0.3 < accuracy < 0.7


@pytest.mark.parametrize("bad", [[], [math.nan], [math.inf]])
def test_no_pairs_or_no_numbers_are_no_accuracy(bad: list[float]):
    with pytest.raises(ValueError, match=f"pair accuracy of {len(bad)} pairs, {len(bad)} of them without finite"):
        pair_accuracy(torch.tensor(bad), torch.zeros(len(bad)))


def test_wilson_interval_of_the_textbook():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    low, high = wilson(0, 10)
    assert low == pytest.approx(0, abs=1e-12)
    assert high == pytest.approx(0.2775, abs=1e-4)
    assert wilson(10, 10)[1] <= 1 + 1e-12


def test_the_interval_covers_the_truth_in_19_of_20_experiments():
    draw = random.Random(0)
    hits = 0
    for _ in range(1000):
        low, high = wilson(sum(draw.random() < 0.8 for _ in range(50)), 50)
        hits += low <= 0.8 <= high
    assert 930 <= hits <= 970
