"""The fast paths in the oracle: packed rows with shared prompts, gradients added in place, the LM head's in one pass.

In a world as narrow as the oracle's they do not pay, so that its other tests see the plain ones; here they are forced.
The checks, with their asserts, are those of the oracle's other files.
"""

from __future__ import annotations

import functools

import pytest

from hfpg.fast import head
from hfpg.fast.packing import packed
from hfpg.models import ActorCritic
from hfpg.token_local import Slopes
from tests.oracle import test_exact, test_groups
from tests.oracle.world import VOCABULARY, World


@pytest.fixture(autouse=True)
def forced(monkeypatch):
    """Packed rows; logits of two tokens at a time, of which nothing stays for the backward pass."""
    monkeypatch.setattr("hfpg.models.packed", functools.partial(packed, even_if_dearer=True))
    for name, value in (("CHUNK_BYTES", 2 * 8 * VOCABULARY), ("FEWEST_TOKENS", 1), ("KEPT_BYTES", 0)):
        monkeypatch.setattr(head, name, value)


def test_rows_of_the_world_are_packed_here_and_share_their_prompt(monkeypatch):
    seen = []
    plain = ActorCritic.layout

    def layout(*args, **kwargs):
        found = plain(*args, **kwargs)
        seen.append((found.mask.dim(), found.place[found.real].unique().numel(), int(found.real.sum())))
        return found

    monkeypatch.setattr(ActorCritic, "layout", layout)
    World().rollout()
    assert seen and all(dim == 4 for dim, *_ in seen)
    assert all(places < tokens for _, places, tokens in seen)


def test_the_heads_gradient_is_made_in_the_forward_pass_here(monkeypatch):
    sizes, plain = [], Slopes.__call__

    def call(self, chunk, *args):
        sizes.append(chunk.stop - chunk.start)
        return plain(self, chunk, *args)

    monkeypatch.setattr(Slopes, "__call__", call)
    test_exact.test_reinforce_is_unbiased("none", 0.3, 0.7, "gpt2")
    assert len(sizes) > 10 and max(sizes) == 2


@pytest.mark.parametrize(("kl_coef", "temperature"), [(0.0, 1.0), (0.3, 0.7)])
def test_reinforce(kl_coef, temperature):  # house: asserts inside what it calls
    test_exact.test_reinforce_is_unbiased("none", kl_coef, temperature, "gpt2")


@pytest.mark.parametrize("aggregation", ["sequence_sum", "token_mean"])
def test_surrogates_with_a_shared_critic(aggregation):  # house: asserts inside what it calls
    test_exact.test_at_ratio_one_every_surrogate_is_reinforce(aggregation, "gpt2")


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_pairs_of_completions(kl_coef):  # house: asserts inside what it calls
    test_groups.test_leave_one_out_is_unbiased("gpt2", 2, kl_coef)
