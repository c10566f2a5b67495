"""truncation='mask': E[gradient] against ∇ of J given that the completion ended, by enumeration.

J_e(x) = E[score − β log π(y|x, ended)/π_ref(y|x) | y ended]. Among such completions E[∇ log π] = ∇ log P(ended) and
not 0: a baseline other than the mean of the same prompt's other completions that ended pays for ending.
"""

import dataclasses

import pytest
import torch
from torch import Tensor

from hfpg.algorithms import GRPO, PPO, RLOO, TRPO, DrGRPO, Reinforce, ReinforcePlusPlus
from hfpg.algorithms.reinforce import ReinforceState
from tests.oracle.test_groups import small
from tests.oracle.world import World, cosine, error


EXACT = 1e-12


def given_that_it_ended(world: World, kl_coef: float = 0.0) -> Tensor:
    """Σ_x P(ended|x) ∇J_e(x) by autograd on the sums: a prompt counts by how many of its completions end."""
    p, reference = world.probabilities(), world.rollout().ref_logprobs.sum(1)
    total = torch.zeros((), dtype=torch.float64)
    for prompt in range(len(world.prompts)):
        rows = (world.samples.group_ids == prompt) & world.samples.finished
        ended = p[rows].sum()
        among = p[rows] / ended
        total = (
            total + ended.detach() * (among * (world.scores[rows] - kl_coef * (among.log() - reference[rows]))).sum()
        )
    return world.flat(torch.autograd.grad(total, world.parameters, allow_unused=True))


def direction(gradient: Tensor) -> Tensor:
    """Of length 1."""
    return gradient / gradient.norm()


def masked(algorithm):
    """With truncation='mask' also where hfpg refuses it, to show why."""
    made = dataclasses.replace(algorithm)
    object.__setattr__(made, "truncation", "mask")
    return made


def in_reward(kl_coef: float, **changes) -> GRPO:
    """GRPO with its KL in the reward, without the division by a spread."""
    same = dict(scale="none", aggregation="sequence_sum", truncation="mask", kl_coef=kl_coef)
    return GRPO(**(same | (dict(kl_in="reward", kl_estimator="k1") if kl_coef else {}) | changes))


@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
@pytest.mark.parametrize("count", [2, 3])
def test_comparing_the_completions_of_a_prompt_that_ended_has_the_exact_direction(count, kl_coef):
    world = small()
    truth = direction(given_that_it_ended(world, kl_coef))
    assert cosine(truth, world.objective_gradient(kl_coef)) < 0.2, "another objective"
    for algorithm in (
        RLOO(truncation="mask", kl_coef=kl_coef),
        Reinforce(baseline="group", num_generations=2, truncation="mask", kl_coef=kl_coef),
        TRPO(truncation="mask", kl_coef=kl_coef),
        in_reward(kl_coef),
        in_reward(kl_coef, baseline="leave_one_out"),
    ):
        assert error(direction(world.tuples(algorithm, count)), truth) < EXACT, algorithm


def test_the_gradient_is_as_long_as_two_of_a_prompt_end():
    """E = P(both ended) ∇J_e: a completion that is left alone adds nothing."""
    world = small()
    ended = float(world.probabilities().detach()[world.samples.finished].sum())
    truth = given_that_it_ended(world) / ended
    assert error(world.tuples(RLOO(truncation="mask", kl_coef=0.0), 2), ended**2 * truth) < EXACT
    dr_grpo = world.tuples(DrGRPO(truncation="mask"), 2)
    assert error(dr_grpo, ended**2 * truth / 2 / world.longest) < EXACT


# refused, or said with a warning: cosine with ∇J given that it ended, two prompts; docs/algorithms/shared.md
OTHERS = {
    "none": (Reinforce(baseline="none", kl_coef=0.0), 0.2628),
    "ema": (Reinforce(baseline="ema", kl_coef=0.0), 0.4190),
    "value": (Reinforce(baseline="value", kl_coef=0.0, value_coef=0.0), 0.8237),
    "PPO": (PPO(kl_coef=0.0, whiten_advantages=False, aggregation="sequence_sum", value_coef=0.0), 0.8237),
    "PPO, whitened": (PPO(kl_coef=0.0, value_coef=0.0), 0.8237),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_baseline_pays_for_ending(name):
    """The running mean is at its limit, and V the exact one of what ended."""
    algorithm, pinned = OTHERS[name]
    world = World(value="shared")
    rows, p = world.samples, world.probabilities().detach()
    values = torch.zeros_like(p)[:, None].repeat(1, world.longest)
    for row in range(len(p)):
        for t in range(int(rows.completion_mask[row].sum())):
            same = (rows.group_ids == rows.group_ids[row]) & rows.finished & rows.completion_mask[:, t]
            same &= (rows.completion_ids[:, :t] == rows.completion_ids[row, :t]).all(1)
            values[row, t] = (p * world.scores)[same].sum() / p[same].sum() if same.any() else 0
    mean = float((p * world.scores)[rows.finished].sum() / p[rows.finished].sum())
    state = ReinforceState(0.0, return_total=mean, return_weight=1.0) if name == "ema" else None
    found = world.estimated_gradient(masked(algorithm), world.rollout(values=values), state)
    assert cosine(found, given_that_it_ended(world)) == pytest.approx(pinned, abs=1e-3)


def test_the_exact_mean_of_what_ended_would_do():
    """So the bias of the others is that of their baseline, and of nothing else."""
    world = World()
    p, rows = world.probabilities().detach(), world.samples
    means = [
        (p * world.scores)[mine].sum() / p[mine].sum()
        for mine in (rows.finished & (rows.group_ids == x) for x in (0, 1))
    ]
    exact = world.rollout(baseline_scores=torch.stack(means)[rows.group_ids])
    found = world.estimated_gradient(masked(Reinforce(baseline="input", kl_coef=0.0)), exact)
    assert error(direction(found), direction(given_that_it_ended(world))) < EXACT


def test_a_mean_over_the_rollout_pays_for_ending():
    world = small()
    found = world.tuples(ReinforcePlusPlus(truncation="mask", kl_coef=0.0), 3)
    assert cosine(found, given_that_it_ended(world)) == pytest.approx(0.8753, abs=1e-3)
