"""Estimators of KL: their expectations and gradients by exact enumeration over a small vocabulary."""

import math

import pytest
import torch
from torch import Tensor

from hfpg.ops.kl import adapt_kl_coef, full, k1, k2, k2_sequence, k3


def pair(seed: int = 0, vocabulary: int = 9) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, vocabulary, generator=g, dtype=torch.float64)
    return logits[0].requires_grad_(), logits[1]


def log_ratios(logits: Tensor, other: Tensor) -> Tensor:
    """log π(v) − log π_other(v) of every token, as one row [1, V]."""
    return (logits.log_softmax(-1) - other.log_softmax(-1))[None]


def expectation(x: Tensor, logits: Tensor) -> Tensor:
    """Σ_v π(v) x(v) with π a constant: what a sample mean in a loss differentiates."""
    return (logits.softmax(-1).detach() * x[0]).sum()


@pytest.mark.parametrize("estimator", [k1, k3])
@pytest.mark.parametrize("seed", range(5))
def test_k1_and_k3_are_unbiased(estimator, seed: int):
    logits, other = pair(seed)
    torch.testing.assert_close(expectation(estimator(log_ratios(logits, other)), logits), full(logits, other))


def test_k2_is_right_to_second_order_only():
    logits, other = (z.detach() for z in pair(1))
    near = logits + 1e-3 * (other - logits)
    value, exact = expectation(k2(log_ratios(near, logits)), near), full(near, logits)
    assert float(value / exact) == pytest.approx(1, abs=1e-2)
    assert abs(float(expectation(k2(log_ratios(logits, other)), logits) / full(logits, other)) - 1) > 0.02


def test_k3_is_never_negative_and_0_only_where_the_policies_agree():
    delta = torch.linspace(-5, 5, 101, dtype=torch.float64)[None]
    assert (k3(delta)[delta != 0] > 0).all() and (k3(delta)[delta == 0] == 0).all()
    # small differences keep their digits: δ²/2, where e^{−δ} − 1 + δ in single precision would be noise
    assert float(k3(torch.tensor([[1e-3]]))) == pytest.approx(5e-7, rel=1e-2)


def test_full_agrees_with_torch_and_is_0_for_equal_logits():
    logits, other = (z.detach() for z in pair(2))
    reference = torch.distributions.kl_divergence(
        *(torch.distributions.Categorical(logits=z) for z in (logits, other))
    )
    torch.testing.assert_close(full(logits, other), reference)
    assert float(full(logits, logits + 3.0)) == pytest.approx(0, abs=1e-12)


def test_k1_in_the_loss_has_no_gradient_in_expectation():
    logits, other = pair(3)
    (gradient,) = torch.autograd.grad(expectation(k1(log_ratios(logits, other)), logits), logits)
    assert float(gradient.abs().max()) < 1e-12


def test_k1_in_the_reward_has_the_gradient_of_the_kl():
    logits, other = pair(4)
    (exact,) = torch.autograd.grad(full(logits, other), logits)
    delta = log_ratios(logits, other)
    score_function = expectation(delta.detach() * logits.log_softmax(-1)[None], logits)
    torch.testing.assert_close(torch.autograd.grad(score_function, logits)[0], exact)


def test_the_gradient_of_k2_in_the_loss_is_that_of_the_kl():
    logits, other = pair(5)
    (exact,) = torch.autograd.grad(full(logits, other), logits)
    (found,) = torch.autograd.grad(expectation(k2(log_ratios(logits, other)), logits), logits)
    torch.testing.assert_close(found, exact)


def test_k2_sequence_adds_up_to_half_the_square_of_the_sum_with_its_gradient():
    delta = torch.randn(4, 5, generator=torch.Generator().manual_seed(6), dtype=torch.float64).requires_grad_()
    mask = torch.arange(5) < torch.tensor([[5], [3], [1], [0]])
    whole = torch.where(mask, delta, 0).sum(1) ** 2 / 2
    rows = k2_sequence(torch.where(mask, delta, math.nan), mask).sum(1)
    torch.testing.assert_close(rows, whole)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), delta)[0] for x in (rows, whole)))


def test_tokens_outside_the_support_add_nothing():
    logits, other = torch.tensor([1.0, 2.0, -math.inf, 0.5]), torch.tensor([0.5, 1.0, 2.0, -1.0])
    inside = torch.tensor([0, 1, 3])
    # against all of π_other's mass, and against π_other on the same support
    outside = float(other.log_softmax(0)[inside].logsumexp(0))
    assert float(full(logits, other)) == pytest.approx(float(full(logits[inside], other[inside])) - outside, abs=1e-6)
    other[2] = -math.inf
    torch.testing.assert_close(full(logits, other), full(logits[inside], other[inside]))


def test_tokens_outside_the_support_have_no_gradient():
    logits = torch.tensor([1.0, 2.0, -math.inf, 0.5], requires_grad=True)
    other = torch.tensor([0.5, 1.0, -math.inf, -1.0])
    (gradient,) = torch.autograd.grad(full(logits, other), logits)
    short = logits.detach()[[0, 1, 3]].requires_grad_()
    (expected,) = torch.autograd.grad(full(short, other[[0, 1, 3]]), short)
    torch.testing.assert_close(gradient[[0, 1, 3]], expected)
    assert gradient[2] == 0


def test_mass_where_the_other_policy_has_none_is_an_infinite_kl():
    assert full(torch.zeros(3), torch.tensor([0.0, 0.0, -math.inf])) == math.inf


@pytest.mark.parametrize(("kl", "factor"), [(6.0, 1.0), (6.6, 1.01), (5.4, 0.99), (600.0, 1.02), (-60.0, 0.98)])
def test_the_coefficient_moves_toward_the_target_and_never_far(kl: float, factor: float):
    assert adapt_kl_coef(0.05, kl, 6.0) == pytest.approx(0.05 * factor, rel=1e-12)


@pytest.mark.parametrize("kl", [math.nan, math.inf, -math.inf])
def test_a_kl_that_is_no_number_leaves_the_coefficient(kl: float):
    assert adapt_kl_coef(0.05, kl, 6.0) == 0.05


def test_the_controller_holds_a_kl_that_falls_with_the_coefficient():
    """KL = 1/β: the fixed point is β = 1/target, from above and from below."""
    for start in (0.02, 0.9):
        beta = start
        for _ in range(400):
            beta = adapt_kl_coef(beta, 1 / beta, 6.0)
        assert beta == pytest.approx(1 / 6, rel=1e-3)
