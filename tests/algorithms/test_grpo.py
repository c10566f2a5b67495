"""The GRPO family: advantages within groups, ratios, objectives, dynamic sampling."""

import dataclasses

import pytest
import torch

from hfpg.algorithms import CISPO, DAPO, GRPO, GSPO, DrGRPO
from hfpg.types import Estimates
from tests.algorithms.test_reinforce import new_scores, rollout


def two_groups(**changes):
    """Rows 0 and 1 of one prompt, 2 and 3 of another; all judged."""
    groups, ones = torch.tensor([4, 4, 8, 8]), torch.ones(4)
    return rollout(**({"group_ids": groups, "weights": ones, "scores": torch.tensor([1.0, 3.0, 5.0, 5.0])} | changes))


def credit(algorithm, rows):
    """Advantages [B, C] as the trainer makes them."""
    used, rewards, state = algorithm.rewards(rows, algorithm.init(), 4)
    return algorithm.estimate(used, rewards, state)[0].advantages


def test_advantages_are_standard_scores_within_the_group_on_every_token():
    found = credit(GRPO(), two_groups())
    std = 2**0.5
    torch.testing.assert_close(found[0, :3], torch.full((3,), -1 / (std + 1e-4)))
    assert float(found[1, 0]) == pytest.approx(1 / (std + 1e-4))
    assert not found[2:].any() and not found[~two_groups().completion_mask].any()


@pytest.mark.parametrize("count", [7, 8, 16])
@pytest.mark.parametrize("kind", [GRPO, DrGRPO, DAPO, GSPO, CISPO])
def test_equal_scores_are_exactly_nothing(kind, count):
    """In fp32 the mean of 7, 8 or 16 times 0.1 is not 0.1, and a tiny std would turn that into large advantages."""
    rows = rollout().take(torch.zeros(count, dtype=torch.long))
    rows = dataclasses.replace(rows, scores=torch.full((count,), 0.1), weights=torch.ones(count))
    assert not credit(kind(soft_overlong=0.0), rows).any()


def test_scales():
    rows = two_groups()
    assert (
        credit(DrGRPO(), rows)[0, 0] == -1 and credit(GRPO(scale="none", baseline="leave_one_out"), rows)[0, 0] == -2
    )
    batch = float(rows.scores.std())
    assert float(credit(GRPO(scale="batch"), rows)[0, 0]) == pytest.approx(-1 / (batch + 1e-4))


def test_an_unscored_row_counts_for_nobody():
    rows = two_groups(weights=torch.tensor([1.0, 1.0, 1.0, 0.0]), scores=torch.tensor([1.0, 3.0, 5.0, -9.0]))
    found = credit(GRPO(), rows)
    assert not found[2:].any()  # one that counts has nothing to be compared with, the other is not judged
    assert float(found[0, 0]) == pytest.approx(-1 / (2**0.5 + 1e-4))


def test_dynamic_sampling_leaves_equal_groups_out_of_the_denominators():
    rows = two_groups()
    used = DAPO().rewards(rows, DAPO().init(), 4)[0]
    assert used.weights.tolist() == [1.0, 1.0, 0.0, 0.0]
    assert GRPO().rewards(rows, GRPO().init(), 4)[0].weights.tolist() == [1.0] * 4


def test_the_sequence_ratio_is_the_geometric_mean():
    rows = two_groups()
    new = new_scores(rows)
    shifted = new._replace(logprobs=new.logprobs + torch.where(rows.completion_mask, 1e-4, 0))
    estimates = GSPO().estimate(*GSPO().rewards(rows, GSPO().init(), 4)[:2], GSPO().init())[0]
    loss = GSPO().loss(shifted, rows, estimates).loss
    expected = -torch.tensor(1e-4).exp() * estimates.advantages
    torch.testing.assert_close(loss[rows.completion_mask], expected[rows.completion_mask])
    far = new._replace(logprobs=new.logprobs + torch.where(rows.completion_mask, 1e-2, 0))
    (gradient,) = torch.autograd.grad(GSPO().loss(far, rows, estimates).loss.sum(), new.logprobs)
    assert not gradient[1].any() and gradient[0, :3].all()  # A > 0 beyond 1 + 4e-4 is clipped, A < 0 is not


def test_a_sequence_is_clipped_as_a_whole_or_not_at_all():
    """Two tokens with A > 0: far apart around 1, and then one of them far enough for both."""
    rows, credit = two_groups(), Estimates(torch.ones(4, 4))
    new = new_scores(rows)
    for shifts, clipped in (([1e-2, -1e-2], 0.0), ([2e-2, 0.0], 1.0)):
        logprobs = new.logprobs.detach().clone()
        logprobs[3, :2] += torch.tensor(shifts)
        found = GSPO().loss(new._replace(logprobs=logprobs), rows, credit).metrics["clip_fraction"]
        assert found[3, :2].tolist() == [clipped] * 2 and not found[:3].any()


def test_cispo_caps_the_weight_and_keeps_the_gradient():
    rows = two_groups()
    new = new_scores(rows)
    estimates = CISPO().estimate(*CISPO().rewards(rows, CISPO().init(), 4)[:2], CISPO().init())[0]
    for shift, weight in [(0.0, 1.0), (1.0, 2.718281828), (3.0, 5.0)]:
        moved = new._replace(logprobs=new.logprobs + shift)
        out = CISPO().loss(moved, rows, estimates)
        (gradient,) = torch.autograd.grad(out.loss.sum(), new.logprobs, retain_graph=True)
        torch.testing.assert_close(gradient, -weight * estimates.advantages)
        assert float(out.metrics["clip_fraction"].mean()) == float(shift == 3.0)
