"""How noisy each baseline's gradient is, exactly: √(tr Cov) / |∇J| at 24 samples, over all completions and tuples.

The order is what is asserted; the numbers stand in docs/numerics.md (`pytest tests/oracle/test_variance.py -s`).
"""

import dataclasses
import itertools

import torch

from hfpg.algorithms import A2C, RLOO, Reinforce
from hfpg.algorithms.reinforce import ReinforceState
from tests.oracle.world import World


SAMPLES = 24


def single(world: World, algorithm, rollout, state=None) -> float:
    """Noise of an estimator that looks at one completion at a time: hfpg's estimate × score vectors of hfpg's loss."""
    used, rewards, state = algorithm.rewards(rollout, state or algorithm.init(), world.longest)
    credit, _ = algorithm.estimate(used, rewards, state)
    per_row = torch.einsum("bt,btd->bd", credit.advantages, world.vectors)
    return noise(world, per_row, rollout.weights / len(world.prompts), SAMPLES)


def grouped(world: World, algorithm, count: int, rollout) -> float:
    """The same of an estimator on groups of `count`: all tuples of each prompt, as groups of one big rollout."""
    index, p = [], []
    for prompt in range(len(world.prompts)):
        rows = (world.samples.group_ids == prompt).nonzero()[:, 0].tolist()
        for chosen in itertools.product(rows, repeat=count):
            index += chosen
            p.append(float(rollout.weights[list(chosen)].prod()) / len(world.prompts))
    rows = torch.tensor(index)
    ids = torch.arange(len(p)).repeat_interleave(count)
    big = dataclasses.replace(rollout.take(rows), group_ids=ids, weights=torch.ones(len(rows), dtype=torch.float64))
    used, rewards, state = algorithm.rewards(big, algorithm.init(), world.longest)
    credit, _ = algorithm.estimate(used, rewards, state)
    per_row = torch.einsum("bt,btd->bd", credit.advantages, world.vectors[rows])
    return noise(world, per_row.view(len(p), count, -1).mean(1), torch.tensor(p, dtype=torch.float64), SAMPLES / count)


def noise(world: World, estimates, p, repeats: float) -> float:
    """√(tr Cov / repeats) / |∇J| of independent estimates with probabilities p."""
    mean = (p[:, None] * estimates).sum(0)
    assert float((mean - world.truth).norm() / world.truth.norm()) < 1e-10  # every one of them is unbiased
    trace = (p * (estimates**2).sum(1)).sum() - (mean**2).sum()
    return float((trace / repeats).sqrt() / world.truth.norm())


def test_the_order_of_the_baselines():
    world = World("shared", longest=2)
    rollout = world.rollout()
    plain = Reinforce(baseline="none", kl_coef=0.0)
    world.truth, world.vectors = world.objective_gradient(), world.score_vectors(plain, rollout)
    values, prompts = world.exact_values(), world.samples.group_ids
    mean = float((rollout.weights * world.scores).sum()) / 2
    exact = dataclasses.replace(rollout, values=values)
    of_prompt = dataclasses.replace(
        rollout, baseline_scores=torch.stack([values[prompts == p][0, 0] for p in (0, 1)])[prompts]
    )
    greedy = dataclasses.replace(rollout, baseline_scores=world.of_greedy())
    a2c = dict(kl_coef=0.0, aggregation="sequence_sum", value_coef=0.0)
    input_baseline = Reinforce(baseline="input", kl_coef=0.0)
    found = {
        "none": single(world, plain, rollout),
        "ema (the true mean)": single(
            world,
            Reinforce(baseline="ema", kl_coef=0.0),
            rollout,
            ReinforceState(0.0, return_total=mean, return_weight=1.0),
        ),
        "greedy": single(world, Reinforce(baseline="greedy", kl_coef=0.0), greedy),
        "rloo, K = 2": grouped(world, RLOO(kl_coef=0.0), 2, rollout),
        "rloo, K = 3": grouped(world, RLOO(kl_coef=0.0), 3, rollout),
        "rloo, K = 4": grouped(world, RLOO(kl_coef=0.0), 4, rollout),
        "V(x), exact": single(world, input_baseline, of_prompt),
        "V(s_t), exact, λ = 1": single(world, A2C(lam=1.0, **a2c), exact),
        "V(s_t), exact, λ = 0.95": single(world, A2C(lam=0.95, **a2c), exact),
        "V(s_t), exact, λ = 0.5": single(world, A2C(lam=0.5, **a2c), exact),
        "V(s_t), exact, λ = 0": single(world, A2C(lam=0.0, **a2c), exact),
    }
    for name, value in found.items():
        print(f"{name:26} {value:.3f}")
    order = [v for name, v in found.items() if name != "greedy"]  # how good the greedy score is depends on the policy
    assert all(a > b for a, b in zip(order, order[1:], strict=False)), found
    assert found["none"] > found["greedy"]
