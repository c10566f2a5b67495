"""The article that hfpg grew from (an LSTM, a length reward, REINFORCE): two of its four slips, measured exactly.

docs/algorithms/reinforce.md tells them; the numbers there are these.
"""

import dataclasses
from typing import Any

import pytest
import torch

from hfpg.algorithms import Reinforce
from hfpg.models import ActorCritic
from hfpg.types import Estimates
from tests.oracle.world import LONGEST, World, error


EXACT = 1e-12


def with_lengths(**settings) -> World:
    """The LSTM world with the article's reward: the nearer the length is to 2, the better."""
    world = World(kind="lstm", **settings)
    lengths = world.samples.completion_mask.sum(1)
    world.scores = -(lengths - 2).abs().double()
    return world


def test_a_sum_of_values_against_the_whole_return_is_biased():
    """V(s_t) belongs to token t. Σ_t V(s_t) depends on the actions before and after t, so it is no baseline."""
    world = with_lengths(value="shared")
    rollout, truth = world.rollout(), world.objective_gradient()
    right = Reinforce(baseline="value", value_coef=0.0, kl_coef=0.0)
    assert error(world.estimated_gradient(right, rollout), truth) < EXACT
    summed = (rollout.values * rollout.completion_mask).sum(1, keepdim=True)
    credit = torch.where(rollout.completion_mask, world.scores[:, None] - summed, 0)
    found = world.loss_gradient(right, rollout, Estimates(credit, credit), right.init())
    assert error(found, truth) == pytest.approx(SUM_OF_VALUES, abs=1e-3)


def test_a_baseline_may_depend_on_the_parameters():
    """The article wants b independent of θ. It has to be independent of the action at t, no more."""
    world = with_lengths()
    rollout, truth = world.rollout(), world.objective_gradient()
    j = float((rollout.weights * world.scores).sum()) / len(world.prompts)  # E[r] under this very policy
    rows = dataclasses.replace(rollout, baseline_scores=torch.full_like(world.scores, j))
    algorithm = Reinforce(baseline="input", kl_coef=0.0)
    assert error(world.estimated_gradient(algorithm, rows), truth) < EXACT


def test_logits_that_have_read_the_token_score_something_else(monkeypatch):
    """Token t is predicted by the state before it. One position later, its own embedding has been read."""
    world = with_lengths()
    rollout, truth = world.rollout(), world.objective_gradient()
    algorithm = Reinforce(baseline="none", kl_coef=0.0)
    assert error(world.estimated_gradient(algorithm, rollout), truth) < EXACT
    plain = ActorCritic.layout

    def later(*args: Any) -> Any:
        layout = plain(*args)
        return layout._replace(source=layout.source + 1)

    monkeypatch.setattr(ActorCritic, "layout", later)
    assert error(world.estimated_gradient(algorithm, rollout), truth) == pytest.approx(READ_THE_TOKEN, abs=1e-3)


def test_descent_needs_the_minus_sign():
    """The loss is −A log π: minimising +A log π goes down where J goes up."""
    world = with_lengths()
    algorithm = Reinforce(baseline="none", kl_coef=0.0)
    ascent = world.estimated_gradient(algorithm, world.rollout())  # minus what descent follows
    with torch.no_grad():
        before = float((world.probabilities() * world.scores).sum())
        offset = 0
        for p in world.parameters:
            p += 0.05 * ascent[offset : offset + p.numel()].view_as(p)
            offset += p.numel()
        assert float((world.probabilities() * world.scores).sum()) > before
    assert LONGEST == 3


SUM_OF_VALUES, READ_THE_TOKEN = 4.2148, 3.1818
