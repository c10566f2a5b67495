"""Estimators that compare completions: E[gradient] over all K-tuples, by hfpg's own estimate and loss.

The world here has one prompt and at most two tokens: 7 completions, 49 pairs, 343 triples.
"""

import dataclasses
import itertools

import pytest
import torch

from hfpg.algorithms import CISPO, DAPO, GRPO, GSPO, RLOO, DrGRPO, Reinforce, ReinforcePlusPlus
from hfpg.algorithms.reinforce import ReinforceState
from tests.oracle.world import World, cosine, error


EXACT = 1e-12


def small(kind: str = "gpt2", **settings) -> World:
    """One prompt, two tokens."""
    return World(kind=kind, prompts=([1, 2],), longest=2, **settings)


@pytest.mark.parametrize("kind", ["gpt2", "lstm"])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_leave_one_out_is_unbiased(kind, count, kl_coef):
    world = small(kind)
    truth = world.objective_gradient(kl_coef)
    in_reward = dict(kl_in="reward", kl_estimator="k1") if kl_coef else {}
    for algorithm in (
        RLOO(kl_coef=kl_coef),
        Reinforce(baseline="batch", kl_coef=kl_coef),
        GRPO(baseline="leave_one_out", scale="none", aggregation="sequence_sum", kl_coef=kl_coef, **in_reward),
    ):
        found = world.tuples(algorithm, count)
        if isinstance(algorithm, GRPO) and kl_coef:
            # it credits a token with the KL of the tokens before it, too: another estimator of the same gradient
            assert error(found, truth) < EXACT
        assert error(found, truth) < EXACT


@pytest.mark.parametrize("count", [2, 3])
def test_the_running_mean_is_unbiased_because_it_serves_before_it_learns(count):
    world = small()
    algorithm, state = Reinforce(baseline="ema", ema_decay=0.5, kl_coef=0.0), ReinforceState(0.0)
    found = world.tuples(algorithm, count, state=dataclasses.replace(state, return_total=0.4, return_weight=0.5))
    assert error(found, world.objective_gradient()) < EXACT


@pytest.mark.parametrize("count", [2, 3])
def test_a_mean_that_holds_the_sample_itself_shrinks_the_gradient_by_k_minus_1_over_k(count):
    world = small()
    truth = world.objective_gradient()
    grpo = GRPO(scale="none", aggregation="sequence_sum", kl_coef=0.0)
    assert error(world.tuples(grpo, count), truth * (count - 1) / count) < EXACT
    assert error(world.tuples(DrGRPO(), count), truth * (count - 1) / count / world.longest) < EXACT


@pytest.mark.parametrize("count", [2, 3])
def test_the_tuples_are_what_the_learner_accumulates(count):
    """The contraction of score vectors against the whole path, end to end, for some tuples."""
    world = small()
    rollout = world.rollout()
    algorithm = RLOO(kl_coef=0.3)
    vectors = world.score_vectors(algorithm, rollout)
    for rows in list(itertools.product(range(7), repeat=count))[:: 5 * count]:
        index = torch.tensor(rows)
        batch = dataclasses.replace(rollout.take(index), weights=torch.ones(count, dtype=torch.float64))
        whole = world.estimated_gradient(algorithm, batch)
        used, rewards, state = algorithm.rewards(batch, algorithm.init(), 2)
        credit, _ = algorithm.estimate(used, rewards, state)
        parts = torch.einsum("bt,btd->d", credit.advantages, vectors[index]) / count
        assert float((whole - parts).norm()) < 1e-12 * max(1.0, float(whole.norm()))


def test_rloo_is_the_sample_covariance_of_return_and_score_function():
    """(1/K) Σ (R_i − mean of the others) s_i = Σ (R_i − R̄)(s_i − s̄) / (K − 1)."""
    world = small()
    rollout, algorithm = world.rollout(), RLOO(kl_coef=0.0)
    index = torch.tensor([0, 3, 3, 6])
    batch = dataclasses.replace(rollout.take(index), weights=torch.ones(4, dtype=torch.float64))
    s = world.score_vectors(algorithm, rollout).sum(1)[index]
    r = batch.scores
    covariance = ((r - r.mean())[:, None] * (s - s.mean(0))).sum(0) / 3
    assert error(world.estimated_gradient(algorithm, batch), covariance) < EXACT


# What is biased stays biased as documented: method, K, cosine with ∇J, |E g| / |∇J|, by enumeration in this world.
# A change of any of them is a change of the method: docs/numerics.md shows this table.
BIASED = [
    ("grpo", GRPO(kl_coef=0.0), 2, (0.835512, 0.462238)),
    ("grpo", GRPO(kl_coef=0.0), 3, (0.877696, 0.617276)),
    (
        "grpo, scale=batch, sequence_sum",
        GRPO(scale="batch", kl_coef=0.0, aggregation="sequence_sum"),
        3,
        (0.989601, 0.807463),
    ),
    ("dapo", DAPO(soft_overlong=0.0), 2, (0.904237, 0.361127)),
    ("gspo", GSPO(), 3, (0.877696, 0.617276)),
    ("cispo", CISPO(), 3, (0.963439, 0.485986)),
    ("reinforce++", ReinforcePlusPlus(kl_coef=0.0), 3, (0.923467, 0.674157)),
]


@pytest.mark.parametrize(("name", "algorithm", "count", "pinned"), BIASED, ids=[f"{b[0]} K={b[2]}" for b in BIASED])
def test_a_known_bias_is_the_documented_one(name, algorithm, count, pinned):
    world = small()
    found, truth = world.tuples(algorithm, count), world.objective_gradient()
    assert (cosine(found, truth), float(found.norm() / truth.norm())) == pytest.approx(pinned, abs=1e-4)
    assert cosine(found, truth) < 0.995
