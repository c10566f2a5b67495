"""The fast paths in the oracle: packed rows with shared prompts, and gradients added in place, still give ∇J.

In a world as narrow as the oracle's packing does not pay, so that its other tests see padded rows; here it is forced.
The checks, with their asserts, are those of the oracle's other files.
"""

from __future__ import annotations

import functools

import pytest

from hfpg.models import ActorCritic
from hfpg.ops.packing import packed
from tests.oracle import test_exact, test_groups
from tests.oracle.world import World


@pytest.fixture(autouse=True)
def packed_rows(monkeypatch):
    monkeypatch.setattr("hfpg.models.packed", functools.partial(packed, even_if_dearer=True))


def test_rows_of_the_world_are_packed_here_and_share_their_prompt(monkeypatch):
    seen = []
    plain = ActorCritic.layout

    def layout(*args, **kwargs):
        found = plain(*args, **kwargs)
        seen.append((found.mask.dim(), found.ids.numel(), found.place.numel()))
        return found

    monkeypatch.setattr(ActorCritic, "layout", layout)
    World().rollout()
    assert seen and all(dim == 4 for dim, *_ in seen)
    assert all(positions < cells for _, positions, cells in seen)


@pytest.mark.parametrize(("kl_coef", "temperature"), [(0.0, 1.0), (0.3, 0.7)])
def test_reinforce(kl_coef, temperature):
    test_exact.test_reinforce_is_unbiased("none", kl_coef, temperature, "gpt2")


@pytest.mark.parametrize("aggregation", ["sequence_sum", "token_mean"])
def test_surrogates_with_a_shared_critic(aggregation):
    test_exact.test_at_ratio_one_every_surrogate_is_reinforce(aggregation, "gpt2")


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_pairs_of_completions(kl_coef):
    test_groups.test_leave_one_out_is_unbiased("gpt2", 2, kl_coef)
