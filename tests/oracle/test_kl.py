"""Where the KL goes decides what is optimised: gradients against ∇KL(π ‖ π_ref), and the optimum that is reached."""

import dataclasses

import pytest
import torch

from hfpg.algorithms import Reinforce
from hfpg.ops.kl import k1, k2, k3
from tests.oracle.world import World, error


EXACT = 1e-12


def in_loss(estimator: str, kl_coef: float) -> Reinforce:
    """REINFORCE with the KL in the loss."""
    return Reinforce(baseline="none", kl_in="loss", kl_estimator=estimator, kl_coef=kl_coef)


def allow_k1_in_the_loss(monkeypatch: pytest.MonkeyPatch) -> Reinforce:
    """hfpg refuses this one; here it is made all the same, to show why."""
    monkeypatch.setattr("hfpg.algorithms.method.token_kl", lambda how, new, rows: k1(new.logprobs - rows.ref_logprobs))
    return in_loss("k3", 1.0)


# relative error against ∇KL, by enumeration: the table of docs/numerics.md
PLACEMENTS = {"k2": 0.0679, "k3": 0.1533, "full": 0.0679}


@pytest.mark.parametrize("kind", ["gpt2", "lstm"])
def test_k1_in_the_reward_and_k2_of_the_sequence_have_the_gradient_of_the_kl(kind):
    world = World(kind=kind)
    world.scores = torch.zeros_like(world.scores)
    truth = world.objective_gradient(1.0)  # −∇KL
    for algorithm in (Reinforce(baseline="none", kl_coef=1.0), in_loss("k2_sequence", 1.0)):
        assert error(world.estimated_gradient(algorithm, world.rollout()), truth) < EXACT


@pytest.mark.parametrize("estimator", PLACEMENTS)
def test_the_others_in_the_loss_are_other_objectives(estimator):
    world = World()
    with torch.no_grad():
        for parameter in world.reference.scorer.parameters():
            parameter.mul_(1.3)
    world.scores = torch.zeros_like(world.scores)
    found = world.estimated_gradient(in_loss(estimator, 1.0), world.rollout())
    assert error(found, world.objective_gradient(1.0)) == pytest.approx(PLACEMENTS[estimator], abs=1e-3)


def test_k2_and_the_exact_kl_per_token_agree_and_k3_is_the_reverse_kl():
    """In expectation over visited states: ∇k2 = ∇Σ KL(π ‖ ref); ∇k3 = ∇Σ KL(ref ‖ π); each without the future."""
    world = World()
    world.scores = torch.zeros_like(world.scores)
    rollout = world.rollout()
    exact = world.estimated_gradient(in_loss("full", 1.0), rollout)
    assert error(world.estimated_gradient(in_loss("k2", 1.0), rollout), exact) < EXACT
    rows = world.samples
    scored = world.actor(
        rows.prompt_ids,
        rows.prompt_mask,
        rows.completion_ids,
        rows.completion_mask,
        reference=world.reference,
        reverse=True,
    )
    states = (rollout.weights[:, None] * scored.kl).sum() / len(world.prompts)
    reverse = -world.flat(torch.autograd.grad(states, world.parameters, allow_unused=True))
    assert error(world.estimated_gradient(in_loss("k3", 1.0), rollout), reverse) < EXACT


def test_k1_in_the_loss_is_nothing(monkeypatch):
    world = World()
    world.scores = torch.zeros_like(world.scores)
    algorithm = allow_k1_in_the_loss(monkeypatch)
    assert float(world.estimated_gradient(algorithm, world.rollout()).norm()) < 1e-13


BETA = 0.5


def climb(algorithm: Reinforce, steps: int = 200) -> tuple[float, float]:
    """(J reached, J* = β · mean log Σ_y π_ref e^{r/β}) by exact gradients of the method, through Learner.optimize."""
    world = World(prompts=([1, 2],), longest=2, learning_rate=3e-2, max_tokens_per_micro_batch=1000)
    reference = world.rollout().ref_logprobs.sum(1)
    best = BETA * float((reference + world.scores / BETA).logsumexp(0))
    state = algorithm.init()
    for step in range(steps):
        for group in world.learner.optimizer.param_groups:
            group["lr"] = 3e-2 * (1 - step / steps)
        used, rewards, state = algorithm.rewards(world.rollout(), state, world.longest)
        credit, state = algorithm.estimate(used, rewards, state)
        _, state = algorithm.update(world.learner, used, credit, state)
    p = world.probabilities().detach()
    return float((p * (world.scores - BETA * (p.log() - reference))).sum()), best


def test_k1_in_the_reward_reaches_the_optimum():
    reached, best = climb(Reinforce(baseline="none", kl_coef=BETA))
    assert 0 <= best - reached < 1e-3


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_in_the_loss_miss_it(estimator, monkeypatch):
    algorithm = in_loss("k3", BETA)
    if estimator == "k1":
        algorithm = dataclasses.replace(allow_k1_in_the_loss(monkeypatch), kl_coef=BETA)
    reached, best = climb(algorithm)
    assert best - reached > 2e-3


# k2 and k3 as rewards: relative error against ∇KL with the farther reference, by enumeration
IN_REWARD = {"k2": 0.8345, "k3": 0.8583}


@pytest.mark.parametrize("estimator", IN_REWARD)
def test_other_estimators_in_the_reward_are_far_off(estimator):
    """hfpg refuses them: only the score-function part of their gradient is left, which is third order in δ."""
    world = World()
    with torch.no_grad():
        for parameter in world.reference.scorer.parameters():
            parameter.mul_(1.3)
    world.scores = torch.zeros_like(world.scores)
    rollout, algorithm = world.rollout(), Reinforce(baseline="none", kl_coef=0.0)
    delta = torch.where(rollout.completion_mask, rollout.old_logprobs - rollout.ref_logprobs, 0)
    credit, state = algorithm.estimate(rollout, -{"k2": k2, "k3": k3}[estimator](delta), algorithm.init())
    found = error(world.loss_gradient(algorithm, rollout, credit, state), world.objective_gradient(1.0))
    assert found == pytest.approx(IN_REWARD[estimator], abs=1e-3)
