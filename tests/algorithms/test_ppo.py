"""PPO: its first gradient is the policy gradient, and everything after is bounded."""

import dataclasses
import math
from typing import Any

import pytest
import torch

from hfpg.algorithms import PPO, Reinforce, ReinforcePlusPlus
from hfpg.algorithms.method import State
from hfpg.config import ConfigError
from hfpg.ops.masked import aggregate, masked_mean
from hfpg.ops.returns import gae, token_rewards
from hfpg.types import Estimates, Rollout, Scored
from tests.algorithms.test_reinforce import FakeLearner, bandit, new_scores, rollout


AGGREGATIONS = ("sequence_sum", "token_mean", "sequence_mean", "constant")


def rewards_of(rows: Rollout) -> torch.Tensor:
    return token_rewards(rows.scores, rows.completion_mask)


def estimate(algorithm: Any, rows: Rollout) -> Estimates:
    return algorithm.estimate(rows, rewards_of(rows), algorithm.init())[0]


def moved(rows: Rollout, by: float) -> Scored:
    """The policy after it moved every chosen log-probability."""
    return new_scores(dataclasses.replace(rows, old_logprobs=rows.old_logprobs + by), values=True)


# ── credit


def test_advantages_are_gae_and_returns_are_advantage_plus_value():
    rows, algorithm = rollout(), PPO(whiten_advantages=False, gamma=0.9, lam=0.8)
    found = estimate(algorithm, rows)
    expected = gae(rewards_of(rows), rows.values, rows.completion_mask, 0.9, 0.8)
    torch.testing.assert_close(found.advantages, expected)
    torch.testing.assert_close(found.returns, torch.where(rows.completion_mask, expected + rows.values, 0))


def test_at_lambda_1_the_returns_do_not_depend_on_the_critic():
    rows = rollout()
    other = dataclasses.replace(rows, values=rows.values * 7 + 3)
    for one, two in zip(estimate(PPO(), rows).returns, estimate(PPO(), other).returns, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(estimate(PPO(), rows).returns[2], torch.full((4,), 4.0))


@pytest.mark.parametrize("kind", [PPO, ReinforcePlusPlus])
def test_whitening_is_over_the_counting_tokens_of_the_rollout_and_leaves_the_returns(kind: Any):
    rows = rollout()
    found, plain = (estimate(kind(whiten_advantages=on), rows) for on in (True, False))
    mask, weights = rows.completion_mask, rows.weights
    assert float(masked_mean(found.advantages, mask, weights)) == pytest.approx(0, abs=1e-6)
    assert float(masked_mean(found.advantages**2, mask, weights)) == pytest.approx(1, abs=1e-5)
    assert plain.returns is None or torch.equal(found.returns, plain.returns)


def test_the_stop_token_has_credit_and_padding_has_none():
    rows = rollout()
    for algorithm in (PPO(whiten_advantages=False), PPO()):
        found = estimate(algorithm, rows).advantages
        last = rows.completion_mask.sum(1) - 1
        assert (found[torch.arange(3), last[:3]] != 0).all()
        assert not found[~rows.completion_mask].any()


def test_a_constant_score_and_a_fresh_critic_leave_nothing_to_learn():
    """Every advantage is the same number: whitened, it is 0, and not rounding made large."""
    for value in (0.1, 5.3):
        rows = rollout(scores=torch.full((4,), value), weights=torch.ones(4), values=torch.zeros(4, 4))
        rows = rows.take(torch.arange(4).repeat(7))
        assert float(estimate(PPO(), rows).advantages.abs().max()) < 1e-3


# ── loss


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("knobs", [{}, {"dual_clip": 3.0}, {"clip_range_high": 0.28}])
def test_the_first_gradient_is_the_policy_gradient(aggregation: str, knobs: dict[str, float]):
    rows, algorithm = rollout(), PPO(aggregation=aggregation, **knobs)
    credit = estimate(algorithm, rows)
    found = []
    for method in (algorithm, Reinforce(aggregation=aggregation)):
        new = new_scores(rows, values=True)
        loss = aggregate(method.loss(new, rows, credit).loss, rows.completion_mask, rows.weights, aggregation)
        found.append(torch.autograd.grad(loss, new.logprobs)[0])
    assert torch.equal(*found) and found[0].any()


def test_a_policy_that_moved_far_has_no_gradient_the_good_way():
    rows = rollout()
    credit = estimate(PPO(whiten_advantages=False), rows)
    for by in (0.5, -0.5):
        new = moved(rows, by)
        out = PPO().loss(new, rows, credit)
        (gradient,) = torch.autograd.grad(out.loss.sum(), new.logprobs)
        good_way = rows.completion_mask & (credit.advantages * by > 0)
        assert not gradient[good_way].any() and gradient[rows.completion_mask & ~good_way].all()
        assert torch.equal(out.metrics["clip_fraction"].bool() & rows.completion_mask, good_way)
        torch.testing.assert_close(out.metrics["ratio"], torch.full((4, 4), math.exp(by)))


def test_dual_clip_and_clip_higher_reach_the_loss():
    rows = rollout()
    bad = Estimates(torch.full((4, 4), -1.0), torch.zeros(4, 4))
    assert PPO(dual_clip=3.0).loss(moved(rows, 5.0), rows, bad).metrics["policy_loss"].max() == 3
    good = Estimates(torch.ones(4, 4), torch.zeros(4, 4))
    policy = PPO(clip_range_high=0.5).loss(moved(rows, 5.0), rows, good).metrics["policy_loss"]
    torch.testing.assert_close(policy, torch.full((4, 4), -1.5))


def test_the_value_error_and_the_entropy_are_weighed():
    rows = rollout()
    algorithm = PPO(value_coef=0.3, entropy_coef=0.2)
    credit, new = estimate(algorithm, rows), new_scores(rows, values=True)
    loss = algorithm.loss(new, rows, credit).loss
    values, entropy = torch.autograd.grad(loss.sum(), (new.values, new.entropy))
    torch.testing.assert_close(values, 0.3 * (rows.values - credit.returns))
    torch.testing.assert_close(entropy, torch.full((4, 4), -0.2))


def test_value_clipping_is_off_unless_asked_for():
    rows = rollout()
    far = moved(rows, 0.0)._replace(values=rows.values + 2)
    credit = Estimates(torch.zeros(4, 4), rows.values + 9)
    off, on = (PPO(value_clip_range=c).loss(far, rows, credit).metrics["value_error"] for c in (None, 0.2))
    torch.testing.assert_close(off, torch.full((4, 4), 0.5 * 7**2))
    torch.testing.assert_close(on, torch.full((4, 4), 0.5 * 8.8**2))


def test_kl_to_old_is_never_negative_and_small_for_small_moves():
    rows = rollout()
    credit = estimate(PPO(), rows)
    for by in (0.1, -0.1):
        kl = PPO().loss(moved(rows, by), rows, credit).metrics["kl_to_old"]
        torch.testing.assert_close(kl, torch.full((4, 4), math.exp(by) - 1 - by))


def test_kl_to_old_is_unbiased_for_the_kl_from_the_old_to_the_new_policy():
    """All 6 tokens of a vocabulary, drawn by the old policy."""
    g = torch.Generator().manual_seed(3)
    old, new = (torch.randn(6, generator=g).log_softmax(0) for _ in range(2))
    rows = bandit(6, old_logprobs=old[:, None], values=torch.zeros(6, 1))
    credit = Estimates(torch.zeros(6, 1), torch.zeros(6, 1))
    kl = PPO().loss(Scored(new[:, None], None, torch.zeros(6, 1)), rows, credit).metrics["kl_to_old"][:, 0]
    assert float((old.exp() * kl).sum()) == pytest.approx(float((old.exp() * (old - new)).sum()), abs=1e-6)


# ── steps


def test_update_hands_the_knobs_to_the_learner():
    learner, rows = FakeLearner(), rollout()
    algorithm = PPO(epochs=3, minibatches=2, max_kl=0.1, entropy_coef=0.01, aggregation="constant")
    metrics, state = algorithm.update(learner, rows, estimate(algorithm, rows), State(0.05))
    assert metrics == {"loss": 1.0} and state == State(0.05, step=1)
    assert learner.settings == dict(
        aggregation="constant",
        epochs=3,
        minibatches=2,
        max_kl=0.1,
        with_entropy=True,
        with_kl=False,
        skip_zero=False,
        token_local=True,
    )


@pytest.mark.parametrize(("kl", "factor"), [(12.0, 1.02), (1.0, 0.98), (6.06, 1.001)])
def test_the_kl_coefficient_moves_toward_its_target_from_the_state_and_not_from_the_default(kl: float, factor: float):
    rows = rollout()
    lengths = rows.completion_mask.sum(1, keepdim=True)
    shift = torch.where(rows.completion_mask, kl / lengths, 0)
    shift[3] = 1e6  # a row of an earlier step
    stored = torch.tensor([False, False, False, True])
    rows = dataclasses.replace(rows, ref_logprobs=rows.old_logprobs - shift, stored=stored)
    algorithm = PPO(kl_coef=0.05, kl_target=6.0)
    assert algorithm.init() == State(0.05)
    _, state = algorithm.update(FakeLearner(), rows, estimate(algorithm, rows), State(0.4))
    assert state.kl_coef == pytest.approx(0.4 * factor, rel=1e-5)


# ── refusals


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kl_coef": -0.1}, "kl_coef=-0.1 must not be negative; 0 switches the reference off"),
        ({"kl_target": -1.0}, "kl_target=-1.0 must be above 0 nats per completion, such as 6"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_target=6.0 moves kl_coef by a factor, and kl_coef=0 stays 0; start"),
        ({"num_generations": 0}, "num_generations=0 must be at least 1"),
        ({"epochs": 0}, "epochs=0 must be at least 1"),
        ({"minibatches": 0}, "minibatches=0 must be at least 1"),
        ({"clip_range": 0.0}, "clip_range=0.0 must lie between 0 and 1, such as 0.2"),
        ({"clip_range": 1.0}, "clip_range=1.0 must lie between 0 and 1, such as 0.2"),
        ({"lam": 1.1}, "lam=1.1 must lie between 0 and 1"),
        ({"lam": -0.1}, "lam=-0.1 must lie between 0 and 1"),
        ({"gamma": 0.0}, "gamma=0.0 must be above 0 and at most 1"),
        ({"gamma": 1.5}, "gamma=1.5 must be above 0 and at most 1"),
        ({"dual_clip": 1.1}, "dual_clip=1.1 must exceed 1 + the upper clip range, 1.2; 3 is usual"),
        ({"dual_clip": 1.3, "clip_range_high": 0.5}, "dual_clip=1.3 must exceed 1 + the upper clip range, 1.5; 3 is"),
    ],
)
def test_a_setting_that_cannot_be_says_why(changes: dict[str, Any], sentence: str):
    with pytest.raises(ConfigError) as caught:
        PPO(**changes)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("changes", [{"value": "none"}, {"aggregation": "mean"}])
def test_an_unknown_choice_is_refused_when_it_is_made(changes: dict[str, Any]):
    with pytest.raises(ConfigError, match="|".join(changes)):
        PPO(**changes)


@pytest.mark.parametrize(
    "changes", [{"value_clip_range": -0.2}, {"max_kl": -1.0}, {"clip_range_high": -0.1}], ids=lambda c: [*c][0]
)
def test_a_bound_below_0_is_refused(changes: dict[str, float]):
    """A negative range makes `clamp` give its upper bound everywhere; a negative max_kl ends every update at once."""
    with pytest.raises(ConfigError, match="|".join(changes)):
        PPO(**changes)


def test_the_edges_that_are_allowed():
    assert PPO(lam=0.0, gamma=1.0, kl_coef=0.0, dual_clip=3.0).init().kl_coef == 0.0
    assert PPO(lam=1.0, kl_target=6.0).kl_target == 6.0
