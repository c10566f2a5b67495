"""Conjugate gradient, finite differences, trace, step length and line search on problems with known answers."""

import math

import pytest
import torch

from hfpg.ops.trust_region import (
    conjugate_gradient,
    dot,
    finite_difference,
    line_search,
    mean_eigenvalue,
    signs,
    step_length,
)


def matrix(size: int = 12) -> torch.Tensor:
    """Symmetric, positive definite."""
    g = torch.Generator().manual_seed(0)
    a = torch.randn(size, size, generator=g, dtype=torch.float64)
    return a @ a.T + torch.eye(size)


def test_conjugate_gradient_solves_what_a_dense_solver_solves():
    a, b = matrix(), torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = conjugate_gradient(lambda v: a @ v, b, iterations=40, tolerance=1e-28)
    torch.testing.assert_close(found.x, torch.linalg.solve(a, b), rtol=1e-8, atol=1e-8)
    assert found.residual < 1e-10
    few = conjugate_gradient(lambda v: a @ v, b, iterations=3)
    true = float((b - a @ few.x).norm() / b.norm())
    assert few.residual == pytest.approx(true, rel=1e-6) and few.residual > found.residual


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_conjugate_gradient_ends_at_a_share_of_what_it_is_given(scale: float):
    a, b = matrix(), torch.randn(12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain = conjugate_gradient(lambda v: a @ v, b, iterations=40, tolerance=1e-4)
    scaled = conjugate_gradient(lambda v: a @ v, scale * b, iterations=40, tolerance=1e-4)
    torch.testing.assert_close(scaled.x / scale, plain.x)
    assert 1e-8 < plain.residual <= 1e-2 and scaled.residual == pytest.approx(plain.residual)


def test_conjugate_gradient_of_nothing_and_of_a_flat_direction():
    assert conjugate_gradient(lambda v: v, torch.zeros(3)).x.tolist() == [0, 0, 0]
    assert conjugate_gradient(lambda v: 0 * v, torch.ones(3)).x.tolist() == [0, 0, 0]


def test_finite_differences_are_exact_on_a_quadratic():
    a, v = matrix(), torch.randn(12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.testing.assert_close(finite_difference(lambda offset: a @ offset, v, 1e-3), a @ v)
    assert not finite_difference(lambda offset: a @ offset, 0 * v, 1e-3).any()


def test_the_trace_of_a_diagonal_is_exact_with_signs():
    d = torch.rand(50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    z = signs(50, d, 7, "trace", 0)
    assert set(z.tolist()) == {-1.0, 1.0} and torch.equal(z, signs(50, d, 7, "trace", 0))
    assert not torch.equal(z, signs(50, d, 7, "trace", 1))
    assert mean_eigenvalue(lambda v: d * v, [z]) == pytest.approx(float(d.mean()))


def test_the_step_ends_on_the_border_of_the_trust_region():
    a, g = matrix(), torch.ones(12, dtype=torch.float64)
    x = torch.linalg.solve(a, g)
    step = step_length(x, a @ x, 0.01) * x
    assert 0.5 * dot(step, a @ step) == pytest.approx(0.01)
    assert step_length(x, -x, 0.01) == 0.0


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ([(0.009, 1.0)], 1.0),
        ([(0.011, 1.0), (0.009, 1.0)], 0.5),
        ([(0.001, -1.0), (0.001, 0.0), (0.001, 0.1)], 0.25),
        ([(math.nan, 1.0), (0.001, math.nan), (0.001, 1.0)], 0.25),
        ([(1.0, 1.0)] * 3, 0.0),
    ],
)
def test_the_line_search_takes_the_first_share_that_is_inside_and_gains(answers, expected):
    asked = iter(answers)
    assert line_search(lambda fraction: next(asked), 0.01, shrink=0.5, tries=3) == expected
