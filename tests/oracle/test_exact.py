"""The expected gradient of each method, computed exactly by hfpg's own rollout → estimate → loss → Learner."""

import dataclasses
import itertools

import pytest
import torch

from hfpg.algorithms import A2C, CISPO, GRPO, GSPO, PPO, RLOO, Reinforce, ReinforcePlusPlus, ReMax
from hfpg.algorithms.reinforce import ReinforceState
from hfpg.types import Estimates
from tests.oracle.world import PROMPTS, World, error


EXACT = 1e-12  # relative, float64; single precision anywhere on the way would give 1e-7


def test_the_world_is_a_world():
    world = World()
    p = world.probabilities().detach()
    for prompt in range(len(PROMPTS)):
        assert float(p[world.samples.group_ids == prompt].sum()) == pytest.approx(1, abs=1e-12)
    assert torch.allclose(world.rollout().old_logprobs, world.logprobs(), atol=1e-12)
    assert world.rollout().old_logprobs.dtype == torch.float64
    assert p.min() > 1e-4 and world.objective_gradient().norm() > 0.01


KINDS = ["gpt2", "lstm"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("baseline", ["none", "ema", "value", "greedy", "input"])
def test_reinforce_is_unbiased(baseline, kl_coef, temperature, kind):
    """With any past mean, any value function, any score of the prompt; with KL to another reference in the reward."""
    world = World("shared" if baseline == "value" else None, temperature, kind)
    policy_alone = {"value_coef": 0.0} if baseline == "value" else {}
    algorithm = Reinforce(baseline=baseline, kl_coef=kl_coef, **policy_alone)
    state = ReinforceState(kl_coef, return_total=0.9, return_weight=0.5)
    of_prompt = world.of_greedy() if baseline == "greedy" else torch.tensor([0.8, -1.7])[world.samples.group_ids]
    found = world.estimated_gradient(algorithm, world.rollout(baseline_scores=of_prompt), state)
    assert error(found, world.objective_gradient(kl_coef)) < EXACT


@pytest.mark.parametrize("kind", KINDS)
def test_the_named_faces_are_unbiased(kind):
    world = World(kind=kind)
    rollout = world.rollout(baseline_scores=world.of_greedy())
    assert error(world.estimated_gradient(ReMax(kl_coef=0.3), rollout), world.objective_gradient(0.3)) < EXACT


@pytest.mark.parametrize("aggregation", ["sequence_sum", "token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("kind", KINDS)
def test_at_ratio_one_every_surrogate_is_reinforce(aggregation, kind):
    """PPO, dual clip, REINFORCE++ and CISPO: the same gradient, with the same credit and the same aggregation."""
    world = World("shared", kind=kind)
    rollout = world.rollout()
    plain = Reinforce(baseline="none", kl_coef=0.3, aggregation=aggregation)
    truth = world.estimated_gradient(plain, rollout)
    shared = dict(kl_coef=0.3, aggregation=aggregation)
    zero = world.rollout(values=torch.zeros_like(rollout.old_logprobs))
    for algorithm, rows in [
        (PPO(whiten_advantages=False, value_coef=0.0, **shared), zero),
        (PPO(whiten_advantages=False, value_coef=0.0, dual_clip=3.0, clip_range_high=0.28, **shared), zero),
        (A2C(value_coef=0.0, **shared), zero),
        (ReinforcePlusPlus(whiten_advantages=False, **shared), rollout),
    ]:
        assert error(world.estimated_gradient(algorithm, rows), truth) < EXACT
    credit, state = plain.estimate(*plain.rewards(rollout, plain.init(), world.longest)[:2], plain.init())
    for algorithm in (GRPO(aggregation=aggregation, kl_coef=0.0), CISPO(aggregation=aggregation)):
        assert error(world.loss_gradient(algorithm, rollout, credit, algorithm.init()), truth) < EXACT


def test_gspo_at_ratio_one_is_reinforce_with_a_mean_per_sequence():
    """One advantage per sequence: the ratio's gradient is the mean of the token ratios' gradients."""
    world = World()
    rollout, algorithm = world.rollout(), GSPO()
    credit = Estimates(torch.where(rollout.completion_mask, world.scores[:, None], 0))
    found = world.loss_gradient(algorithm, rollout, credit, algorithm.init())
    plain = Reinforce(baseline="none", kl_coef=0.0, aggregation="sequence_mean")
    assert error(found, world.estimated_gradient(plain, rollout)) < EXACT


@pytest.mark.parametrize("value", ["shared", "separate"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_ppo_takes_the_policy_gradient_first(kl_coef, value):
    """At ratio 1, λ = 1, any value function, without whitening, summed over sequences."""
    world = World(value)
    algorithm = PPO(
        kl_coef=kl_coef,
        value=value,
        whiten_advantages=False,
        value_coef=0.0,
        aggregation="sequence_sum",
        dual_clip=3.0,
    )
    assert error(world.estimated_gradient(algorithm, world.rollout()), world.objective_gradient(kl_coef)) < EXACT


@pytest.mark.parametrize("value", ["shared", "separate"])
def test_a2c_is_unbiased_at_lambda_one_for_any_value_function(value):
    world = World(value)
    algorithm = A2C(kl_coef=0.3, value=value, value_coef=0.0, aggregation="sequence_sum")
    assert error(world.estimated_gradient(algorithm, world.rollout()), world.objective_gradient(0.3)) < EXACT


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_gae_is_unbiased_with_the_exact_value_function_for_every_lambda(lam):
    world = World("shared")
    algorithm = PPO(kl_coef=0.0, lam=lam, whiten_advantages=False, value_coef=0.0, aggregation="sequence_sum")
    rollout = world.rollout(values=world.exact_values())
    assert error(world.estimated_gradient(algorithm, rollout), world.objective_gradient()) < EXACT


def test_gae_with_a_wrong_value_function_is_biased_below_lambda_one():
    """The documented bias: a silent change of λ's meaning would lose it."""
    world = World("shared")
    truth, errors = world.objective_gradient(), []
    for lam in (0.0, 0.5, 0.95):
        algorithm = PPO(kl_coef=0.0, lam=lam, whiten_advantages=False, value_coef=0.0, aggregation="sequence_sum")
        errors.append(error(world.estimated_gradient(algorithm, world.rollout()), truth))
    assert errors[0] > errors[1] > errors[2] > 1e-3


@pytest.mark.parametrize(
    "algorithm", [Reinforce(baseline="batch", kl_coef=0.3), RLOO(kl_coef=0.3)], ids=["batch", "rloo"]
)
def test_leave_one_out_over_pairs_is_unbiased(algorithm):
    """The batch and the group baseline, end to end: every pair of completions, weighted by its probability."""
    world = World(temperature=1.3)
    rollout = world.rollout()
    expected = torch.zeros_like(world.objective_gradient())
    prompt = 0
    rows = (world.samples.group_ids == prompt).nonzero()[:, 0].tolist()
    p = world.probabilities().detach()
    for pair in itertools.product(rows, repeat=2):
        two = rollout.take(torch.tensor(pair))
        two = dataclasses.replace(two, weights=torch.ones(2, dtype=torch.float64))
        expected += p[pair[0]] * p[pair[1]] * world.estimated_gradient(algorithm, two)
    world.scores = torch.where(world.samples.group_ids == prompt, world.scores, 0)
    weights = (world.samples.group_ids == prompt).double()
    value = world.scores - 0.3 * (world.logprobs().sum(1) - rollout.ref_logprobs.sum(1))
    truth = world.flat(
        torch.autograd.grad((world.probabilities() * value * weights).sum(), world.parameters, allow_unused=True)
    )
    assert error(expected, truth) < EXACT


def test_the_other_aggregations_are_what_is_documented():
    """Up to a factor `constant` is ∇J, and so is `token_mean` where its denominator is not random, as here.

    A mean per sequence favours short ones: another direction.
    """
    world = World(max_completion_length=3)
    truth, rollout = world.objective_gradient(), world.rollout()
    found = {
        how: world.estimated_gradient(Reinforce(baseline="none", kl_coef=0.0, aggregation=how), rollout)
        for how in ("constant", "token_mean", "sequence_mean")
    }
    expected_length = float((rollout.weights * rollout.completion_mask.sum(1)).sum() / rollout.weights.sum())
    assert error(found["constant"] * 3, truth) < EXACT
    assert error(found["token_mean"] * expected_length, truth) < EXACT
    assert torch.nn.functional.cosine_similarity(found["sequence_mean"], truth, dim=0) < 0.999


def test_under_top_p_the_policy_is_what_was_sampled_from():
    """Only some tokens can be drawn; the gradient is that of J under the renormalised policy, support held fixed."""
    world = World(temperature=0.8)
    kept, logp = world.kept(0.8)
    possible = (logp > -torch.inf).all(1)
    assert 0 < int((~possible).sum()) < len(possible)
    p = torch.where(possible, logp.sum(1).exp(), 0)
    assert float(p.sum().detach()) == pytest.approx(2, abs=1e-12)
    total = (torch.where(possible[:, None], logp, 0).sum(1).exp() * possible * world.scores).sum() / 2
    truth = world.flat(torch.autograd.grad(total, world.parameters, allow_unused=True))
    world.samples = dataclasses.replace(world.samples, kept=kept).take(possible.nonzero()[:, 0])
    world.scores = world.scores[possible]
    rollout = world.rollout(weights=p.detach()[possible])
    assert error(world.estimated_gradient(Reinforce(baseline="none", kl_coef=0.0), rollout), truth) < EXACT
