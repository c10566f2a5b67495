"""Samples of another policy μ: which weights give ∇J of the policy, and how far off the others are, by enumeration."""

import dataclasses

import pytest
import torch

from hfpg.algorithms import A2C, GRPO, PPO, RLOO, Reinforce
from hfpg.ops.importance import effective_sample_size
from tests.oracle.world import World, error


EXACT = 1e-12


def behaved(world: World, values: torch.Tensor | None = None, size: float = 2.5):
    """All rows, drawn by a perturbed copy of the policy: weights μ(y|x), `behaviour_logprobs` log μ."""
    own = [p.detach().clone() for p in world.parameters]
    noise = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in world.parameters:
            p.add_(size * p.std() * torch.randn(p.shape, generator=noise, dtype=p.dtype))
        mu = world.logprobs().detach()
        for p, value in zip(world.parameters, own, strict=True):
            p.copy_(value)
    rollout = world.rollout(weights=mu.sum(1).exp(), behaviour_logprobs=mu)
    return rollout if values is None else dataclasses.replace(rollout, values=values)


def test_the_behaviour_policy_is_another_one():
    world = World()
    rollout = behaved(world)
    assert float(rollout.weights[world.samples.group_ids == 0].sum()) == pytest.approx(1, abs=1e-12)
    log_ratio = rollout.old_logprobs - rollout.behaviour_logprobs
    size = float(effective_sample_size(log_ratio, rollout.completion_mask, rollout.weights))
    w = torch.where(rollout.completion_mask, log_ratio, 0).sum(1).exp()
    assert size == pytest.approx(float(2 / (rollout.weights * w**2).sum()), rel=1e-9) and 0.2 < size < 0.8


@pytest.mark.parametrize("kind", ["gpt2", "lstm"])
@pytest.mark.parametrize(
    "algorithm",
    [
        Reinforce(baseline="none", off_policy="sequence", kl_coef=0.3),
        PPO(off_policy="sequence", whiten_advantages=False, value_coef=0.0, aggregation="sequence_sum", kl_coef=0.3),
        A2C(off_policy="sequence", value_coef=0.0, aggregation="sequence_sum", kl_coef=0.3),
    ],
    ids=["reinforce", "decoupled ppo", "a2c"],
)
def test_sequence_weights_are_unbiased(algorithm, kind):
    world = World(algorithm.value, kind=kind)
    rollout = behaved(world, size=2.5 if kind == "gpt2" else 0.6)  # an LSTM pushed further is off by more than e^20
    found = world.estimated_gradient(algorithm, rollout)
    assert error(found, world.objective_gradient(0.3)) < EXACT


def test_prefix_weights_are_unbiased_with_the_true_advantage_of_the_token():
    """At λ = 0 with the exact V, δ_t is Q − V: what follows token t has been summed over."""
    world = World("shared")
    algorithm = A2C(off_policy="prefix", lam=0.0, value_coef=0.0, aggregation="sequence_sum", kl_coef=0.0)
    found = world.estimated_gradient(algorithm, behaved(world, world.exact_values()))
    assert error(found, world.objective_gradient()) < EXACT


@pytest.mark.parametrize("algorithm", [RLOO(off_policy="sequence", kl_coef=0.0)], ids=["rloo"])
def test_leave_one_out_stays_unbiased_under_sequence_weights(algorithm):
    world = World(prompts=([1, 2],), longest=2)
    found = world.tuples(algorithm, 2, behaved(world))
    assert error(found, world.objective_gradient()) < EXACT


# relative error of E[gradient], by enumeration: the table of docs/algorithms/off_policy.md
BIAS = {
    "none": 1.7859,
    "token": 0.1699,
    "token, cap 2": 0.1696,
    "prefix": 0.1371,
    "truncated": 0.0258,
}


@pytest.mark.parametrize("name", BIAS)
def test_the_others_are_biased_as_documented(name):
    how, _, cap = name.partition(", cap ")
    world = World()
    algorithm = Reinforce(baseline="none", off_policy=how, weight_cap=float(cap) if cap else None, kl_coef=0.0)
    found = error(world.estimated_gradient(algorithm, behaved(world)), world.objective_gradient())
    assert found == pytest.approx(BIAS[name], abs=1e-3)


def test_self_normalising_is_a_bias_of_order_one_over_the_number_of_samples():
    world = World(prompts=([1, 2],), longest=2)
    rollout, truth = behaved(world), world.objective_gradient()
    algorithm = Reinforce(baseline="none", off_policy="sequence", self_normalize=True, kl_coef=0.0)
    errors = [error(world.tuples(algorithm, n, rollout), truth) for n in (1, 2, 3, 4)]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < 0.45 * errors[0]


def test_without_correction_reuse_is_biased_for_every_method():
    world = World(prompts=([1, 2],), longest=2)
    rollout, truth = behaved(world), world.objective_gradient()
    for off_policy, low, high in (("none", 0.02, 1), ("sequence", 0, EXACT)):
        algorithm = GRPO(
            scale="none",
            baseline="leave_one_out",
            off_policy=off_policy,
            kl_coef=0.0,
            aggregation="sequence_sum",
        )
        assert low <= error(world.tuples(algorithm, 2, rollout), truth) <= high
