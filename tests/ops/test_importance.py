"""Off-policy weights against their definitions, and what they do to an expectation."""

import math

import pytest
import torch

from hfpg.ops.importance import effective_sample_size, off_policy_weights, self_normalized


LOG_RATIO = torch.tensor([[0.2, -0.5, 99.0], [1.0, 0.3, 0.4]], dtype=torch.float64)
MASK = torch.tensor([[True, True, False], [True, True, True]])


def test_each_kind_is_its_definition():
    e = math.exp
    token = off_policy_weights(LOG_RATIO, MASK, "token")
    assert token[0, :2].tolist() == pytest.approx([e(0.2), e(-0.5)])
    prefix = off_policy_weights(LOG_RATIO, MASK, "prefix")
    assert prefix[1].tolist() == pytest.approx([e(1.0), e(1.3), e(1.7)])
    sequence = off_policy_weights(LOG_RATIO, MASK, "sequence")
    assert sequence[0].tolist() == pytest.approx([e(-0.3)] * 3) and sequence[1].tolist() == pytest.approx([e(1.7)] * 3)
    assert off_policy_weights(LOG_RATIO, MASK, "truncated")[:, 0].tolist() == pytest.approx([e(-0.3), 2.0])
    assert off_policy_weights(LOG_RATIO, MASK, "truncated", cap=3.0)[1, 0] == 3.0
    assert torch.equal(off_policy_weights(LOG_RATIO, MASK, "none"), torch.ones_like(LOG_RATIO))


def test_a_broken_row_is_bounded_and_nothing_is_differentiated():
    wild = torch.tensor([[500.0, 500.0]], requires_grad=True)
    weights = off_policy_weights(wild, torch.ones(1, 2, dtype=torch.bool), "sequence")
    assert weights.isfinite().all() and not weights.requires_grad


def test_self_normalised_weights_have_mean_one_over_the_rows_that_count():
    weights = torch.tensor([[2.0, 2.0], [6.0, 6.0], [100.0, 100.0]])
    found = self_normalized(weights, torch.tensor([1.0, 1.0, 0.0]))
    assert found[:2, 0].tolist() == [0.5, 1.5]


def test_effective_sample_size():
    mask = torch.ones(4, 1, dtype=torch.bool)
    ones = torch.ones(4)
    assert float(effective_sample_size(torch.full((4, 1), 3.0), mask, ones)) == pytest.approx(1.0)
    alone = torch.tensor([[0.0], [-800.0], [-800.0], [-800.0]])
    assert float(effective_sample_size(alone, mask, ones)) == pytest.approx(0.25)
    assert float(effective_sample_size(alone, mask, torch.tensor([1.0, 0, 0, 0]))) == pytest.approx(1.0)
    loud = torch.tensor([[0.0], [0.0], [0.0], [800.0]])  # of which the last is not scored
    assert float(effective_sample_size(loud, mask, torch.tensor([1.0, 1, 1, 0]))) == pytest.approx(1.0)
    w = torch.tensor([1.0, 2.0, 3.0, 4.0])
    expected = float(w.sum() ** 2 / (4 * (w**2).sum()))
    assert float(effective_sample_size(w.log()[:, None], mask, ones)) == pytest.approx(expected)
    assert float(effective_sample_size(alone, mask, torch.zeros(4))) == 1.0
