"""REINFORCE: what each baseline takes away, and that the loss is the policy gradient."""

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hfpg.algorithms import RLOO, Reinforce
from hfpg.algorithms.kl_control import kl_per_completion
from hfpg.algorithms.reinforce import ReinforceState
from hfpg.config import ConfigError
from hfpg.ops.masked import aggregate
from hfpg.ops.returns import rewards_to_go, token_rewards
from hfpg.types import Estimates, Rollout, Scored


def rollout(**changes: Any) -> Rollout:
    """Four completions: stopped after 3 tokens, stop token at once, cut at 4, and one that nobody judged."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.tensor([3, 1, 4, 2])
    mask = torch.arange(4) < lengths[:, None]
    made = Rollout(
        prompt_ids=torch.ones(4, 2, dtype=torch.long),
        prompt_mask=torch.ones(4, 2, dtype=torch.bool),
        completion_ids=torch.ones(4, 4, dtype=torch.long),
        completion_mask=mask,
        finished=torch.tensor([True, True, False, True]),
        sample_ids=torch.arange(4),
        group_ids=torch.arange(4),
        scores=torch.tensor([1.0, -2.0, 4.0, 0.0]),
        weights=torch.tensor([1.0, 1.0, 1.0, 0.0]),
        old_logprobs=torch.where(mask, -torch.rand(4, 4, generator=g), 0),
        entropy=torch.where(mask, torch.rand(4, 4, generator=g), 0),
        ref_logprobs=torch.where(mask, -torch.rand(4, 4, generator=g), 0),
        values=torch.where(mask, torch.randn(4, 4, generator=g), 0),
    )
    return dataclasses.replace(made, **changes)


def bandit(rows: int, **changes: Any) -> Rollout:
    """Completions of one token."""
    base = rollout().take(torch.zeros(rows, dtype=torch.long))
    columns = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    wide = ("completion_ids", "completion_mask", "old_logprobs", "entropy", "ref_logprobs", "values")
    return Rollout(**(columns | {name: columns[name][:, :1] for name in wide} | changes))


def estimate(algorithm: Reinforce, rows: Rollout, state: ReinforceState | None = None, kl_coef: float = 0.0):
    """The algorithm's estimates and next state, with the rewards as the trainer makes them."""
    log_ratio = rows.old_logprobs - rows.ref_logprobs
    rewards = token_rewards(rows.scores, rows.completion_mask, log_ratio, kl_coef)
    return algorithm.estimate(rows, rewards, state or algorithm.init())


def new_scores(rows: Rollout, values: bool = False) -> Scored:
    """What the policy says now, as leaves of the graph."""
    return Scored(
        rows.old_logprobs.clone().requires_grad_(),
        rows.entropy.clone().requires_grad_(),
        rows.values.clone().requires_grad_() if values else None,
    )


class FakeLearner:
    """Keeps what it was asked to optimise."""

    def optimize(self, rollout: Rollout, credit: Estimates, loss: Any, **settings: Any) -> dict[str, float]:
        self.settings = settings
        return {"loss": 1.0}


# ── credit


def test_without_baseline_the_advantage_is_the_return():
    rows = rollout()
    found, state = estimate(Reinforce(baseline="none"), rows)
    assert torch.equal(found.advantages, torch.where(rows.completion_mask, rows.scores[:, None], 0))
    assert found.returns is None and state == Reinforce(baseline="none").init()


def test_kl_is_credited_to_the_tokens_before_it():
    """Reward-to-go: a token answers for its own KL and for all KL that follows."""
    rows = rollout()
    found, _ = estimate(Reinforce(baseline="none"), rows, kl_coef=0.3)
    k1 = rows.old_logprobs - rows.ref_logprobs
    for b, length in enumerate(rows.completion_mask.sum(1).tolist()):
        for t in range(length):
            expected = rows.scores[b] - 0.3 * k1[b, t:length].sum()
            torch.testing.assert_close(found.advantages[b, t], expected)


def test_the_running_mean_serves_before_it_takes_the_batch_in():
    algorithm, rows = Reinforce(baseline="ema", ema_decay=0.8), rollout()
    first, state = estimate(algorithm, rows)
    assert torch.equal(first.advantages, torch.where(rows.completion_mask, rows.scores[:, None], 0))  # mean 0 before
    assert state.return_total / state.return_weight == pytest.approx(1.0)  # (1 − 2 + 4) / 3: the last has weight 0

    second, later = estimate(algorithm, rollout(scores=torch.tensor([10.0, 10.0, 10.0, 99.0])), state)
    torch.testing.assert_close(second.advantages[0, :3], torch.full((3,), 9.0))  # the old mean, 1
    assert later.return_total / later.return_weight == pytest.approx((0.8 * 1 + 10) / 1.8)
    assert later.kl_coef == state.kl_coef


def test_the_batch_baseline_leaves_the_row_itself_and_unjudged_rows_out():
    found, _ = estimate(Reinforce(baseline="batch"), rollout())
    assert found.advantages[:3, 0].tolist() == pytest.approx([1 - 1, -2 - 2.5, 4 + 0.5])
    torch.testing.assert_close(found.advantages[2], torch.full((4,), 4.5))


def test_the_value_baseline_is_the_value_before_the_token():
    rows = rollout()
    algorithm = Reinforce(baseline="value", gamma=0.9)
    found, _ = estimate(algorithm, rows)
    rewards = token_rewards(rows.scores, rows.completion_mask)
    returns = rewards_to_go(rewards, rows.completion_mask, 0.9)
    torch.testing.assert_close(found.returns, returns)
    torch.testing.assert_close(found.advantages, torch.where(rows.completion_mask, returns - rows.values, 0))


@pytest.mark.parametrize("baseline", ["none", "ema", "batch", "value"])
def test_the_stop_token_has_credit_and_padding_has_none(baseline: str):
    rows = rollout()
    found, _ = estimate(Reinforce(baseline=baseline), rows, ReinforceState(0.0, return_total=0.25, return_weight=0.5))
    last = rows.completion_mask.sum(1) - 1
    assert (found.advantages[torch.arange(3), last[:3]] != 0).all() or baseline == "batch"
    assert found.advantages[1, 0] != 0 and found.advantages[2, 3] != 0
    assert not found.advantages[~rows.completion_mask].any()


def test_equal_scores_leave_nothing_to_learn_with_the_batch_baseline():
    found, _ = estimate(Reinforce(baseline="batch"), rollout(scores=torch.full((4,), 0.5)))
    assert not found.advantages[:3].any()


def test_a_batch_that_nobody_judged_leaves_the_running_mean():
    algorithm, state = Reinforce(), ReinforceState(0.05, return_total=0.3, return_weight=0.1)
    assert estimate(algorithm, rollout(weights=torch.zeros(4)), state)[1] == state


# ── loss


@pytest.mark.parametrize("aggregation", ["sequence_sum", "token_mean", "sequence_mean", "constant"])
def test_the_gradient_is_minus_the_advantage_on_every_chosen_token(aggregation: str):
    rows = rollout()
    algorithm = Reinforce(aggregation=aggregation)
    credit, _ = estimate(algorithm, rows)
    new = new_scores(rows)
    loss = algorithm.loss(new, rows, credit).loss
    (gradient,) = torch.autograd.grad(aggregate(loss, rows.completion_mask, rows.weights, aggregation), new.logprobs)
    ones = torch.ones(4, 4, requires_grad=True)
    means = aggregate(ones, rows.completion_mask, rows.weights, aggregation)
    (coefficients,) = torch.autograd.grad(means, ones)
    torch.testing.assert_close(gradient, -credit.advantages * coefficients)
    assert not gradient[3].any()  # nobody judged it


def test_the_expected_gradient_is_that_of_the_expected_score():
    """All completions of length 1 over 5 tokens, weighted by their probability: ∇ Σ_v π(v) r(v), whatever b is."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(5, generator=g, dtype=torch.float64).requires_grad_()
    scores = torch.randn(5, generator=g, dtype=torch.float64)
    (exact,) = torch.autograd.grad((logits.softmax(0) * scores).sum(), logits)
    p, one = logits.softmax(0).detach(), torch.ones(5, 1, dtype=torch.bool)
    logp = logits.log_softmax(0)[:, None]
    rows = bandit(5, scores=scores, weights=p, values=torch.full((5, 1), 0.7, dtype=torch.float64))
    for baseline, state in [
        ("none", None),
        ("ema", ReinforceState(0.0, return_total=3.0, return_weight=1.0)),
        ("value", None),
    ]:
        algorithm = Reinforce(baseline=baseline)
        credit, _ = algorithm.estimate(rows, scores[:, None], state or algorithm.init())
        loss = algorithm.loss(Scored(logp, None, None), rows, credit).loss
        (found,) = torch.autograd.grad(aggregate(loss, one, p, "sequence_sum"), logits, retain_graph=True)
        torch.testing.assert_close(-found, exact, rtol=0, atol=1e-12)


def test_values_are_fitted_only_with_the_value_baseline():
    rows = rollout()
    algorithm = Reinforce(baseline="value", value_coef=0.3)
    credit, _ = estimate(algorithm, rows)
    new = new_scores(rows, values=True)
    out = algorithm.loss(new, rows, credit)
    (gradient,) = torch.autograd.grad(out.loss.sum(), new.values)
    torch.testing.assert_close(gradient, 0.3 * (rows.values - credit.returns))
    assert set(out.metrics) == {"policy_loss", "value_error"}
    assert set(Reinforce().loss(new_scores(rows), rows, estimate(Reinforce(), rows)[0]).metrics) == {"policy_loss"}


def test_entropy_is_paid_for():
    rows = rollout()
    new = new_scores(rows)
    loss = Reinforce(entropy_coef=0.2).loss(new, rows, estimate(Reinforce(), rows)[0]).loss
    (gradient,) = torch.autograd.grad(loss.sum(), new.entropy)
    torch.testing.assert_close(gradient, torch.full((4, 4), -0.2))


# ── steps


def test_the_value_head_is_there_only_for_the_value_baseline():
    assert Reinforce(baseline="value").value == "shared"
    assert all(Reinforce(baseline=b).value is None for b in ("none", "ema", "batch"))


def test_update_is_one_optimizer_step_and_moves_the_kl_coefficient():
    rows, learner = rollout(), FakeLearner()
    algorithm = Reinforce(kl_coef=0.1, kl_target=1e-3, entropy_coef=0.01, aggregation="token_mean")
    kl = kl_per_completion(rows)
    assert kl == pytest.approx(float((rows.old_logprobs - rows.ref_logprobs).sum()) / 4, abs=1e-6)
    state = ReinforceState(0.1, return_total=3.0, return_weight=1.0)
    metrics, after = algorithm.update(learner, rows, Estimates(rows.old_logprobs), state)
    assert metrics == {"loss": 1.0}
    settings = {"aggregation": "token_mean", "with_entropy": True, "with_kl": False}
    settings |= {"skip_zero": False, "token_local": True}
    assert learner.settings == settings
    assert after == dataclasses.replace(state, step=1, kl_coef=pytest.approx(0.1 * (1.02 if kl > 1e-3 else 0.98)))


NO_KL = {"no reference": dict(ref_logprobs=None), "nothing drawn": dict(stored=torch.ones(4, dtype=torch.bool))}


@pytest.mark.parametrize(("target", "changes"), [(None, {}), *((6.0, changes) for changes in NO_KL.values())])
def test_the_coefficient_stays_without_a_target_and_where_no_kl_was_measured(target: float | None, changes: Any):
    rows = rollout(**changes)
    after = Reinforce(kl_target=target).update(FakeLearner(), rows, SimpleNamespace(), ReinforceState(0.05))[1]
    assert after.kl_coef == 0.05


# ── refusals


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"kl_coef": -0.1}, "kl_coef=-0.1 must not be negative; 0 switches the reference off"),
        ({"kl_target": 0.0}, "kl_target=0.0 must be above 0 nats per completion, such as 6"),
        ({"kl_target": 6.0, "kl_coef": 0.0}, "kl_target=6.0 moves kl_coef by a factor, and kl_coef=0 stays 0; start"),
        ({"num_generations": 0}, "num_generations=0 must be at least 1"),
        ({"ema_decay": 1.0}, "ema_decay=1.0 must be at least 0 and below 1, such as 0.9"),
        ({"ema_decay": -0.1}, "ema_decay=-0.1 must be at least 0 and below 1, such as 0.9"),
        ({"gamma": 0.0}, "gamma=0.0 must be above 0 and at most 1"),
        ({"gamma": 1.01}, "gamma=1.01 must be above 0 and at most 1"),
        ({"gamma": math.nan}, "gamma=nan must be a finite number, such as 1.0"),
    ],
)
def test_a_setting_that_cannot_be_says_why(changes: dict[str, Any], sentence: str):
    with pytest.raises(ConfigError) as caught:
        Reinforce(**changes)
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("changes", [{"baseline": "group"}, {"aggregation": "mean"}])
def test_an_unknown_choice_is_refused_when_it_is_made(changes: dict[str, Any]):
    """In Python no parser checks it; baseline='group' would train as 'value' without a value head."""
    with pytest.raises(ConfigError, match="|".join(changes)):
        Reinforce(**changes)


def test_settings_are_frozen_and_by_keyword():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Reinforce().gamma = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError):
        Reinforce(4)  # type: ignore[misc]


def test_a_group_of_one_has_nothing_to_compare_with():
    with pytest.raises(
        ConfigError, match="baseline='group' compares the samples of one prompt, and num_generations=1"
    ):
        Reinforce(baseline="group")
    with pytest.raises(ConfigError, match="set it to 4, or use baseline='ema'"):
        RLOO(num_generations=1)
    assert RLOO().num_generations == 4 and RLOO().baseline == "group"
