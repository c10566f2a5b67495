"""What all methods share: from scores to token rewards, the KL's place, off-policy weights, refusals."""

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch

from hfpg.algorithms import (
    A2C,
    CISPO,
    DAPO,
    GRPO,
    GSPO,
    PPO,
    PRESETS,
    RLOO,
    TRPO,
    DrGRPO,
    Reinforce,
    ReinforcePlusPlus,
    ReMax,
)
from hfpg.algorithms.kl_control import kl_per_completion
from hfpg.algorithms.method import State
from hfpg.config import ConfigError, parse
from hfpg.ops.baselines import RunningMoments
from hfpg.ops.returns import token_rewards
from hfpg.report.metrics import describe
from hfpg.types import Estimates
from tests.algorithms.test_reinforce import FakeLearner, new_scores, rollout


LONGEST = 4


def shaped(algorithm: Any, rows: Any = None, state: Any = None) -> Any:
    """Scores after shaping."""
    rows = rollout() if rows is None else rows
    return algorithm.rewards(rows, state or algorithm.init(), LONGEST)[0]


# ── from scores to rewards


def test_without_any_knob_the_rewards_are_the_scores_and_the_kl():
    rows = rollout()
    for name, kind in PRESETS.items():
        if name == "dapo":
            continue
        algorithm = kind()
        used, rewards, state = algorithm.rewards(rows, algorithm.init(), LONGEST)
        log_ratio = rows.old_logprobs - rows.ref_logprobs if algorithm.kl_in == "reward" else None
        assert torch.equal(rewards, token_rewards(rows.scores, rows.completion_mask, log_ratio, algorithm.kl_coef))
        assert torch.equal(used.weights, rows.weights) and state == algorithm.init()


def test_the_order_is_normalise_clip_penalties():
    algorithm = Reinforce(
        reward_normalization="fixed", reward_mean=1.0, reward_std=0.5, reward_clip=3.0, missing_eos_penalty=7.0
    )
    assert shaped(algorithm).scores.tolist() == pytest.approx([0.0, -3.0, 3.0 - 7.0, -2.0])


def test_running_moments_serve_before_they_take_the_batch_in():
    algorithm, rows = Reinforce(reward_normalization="running"), rollout()
    first, _, state = algorithm.rewards(rows, algorithm.init(), LONGEST)
    assert float(first.scores[:3].mean()) == pytest.approx(0.0, abs=1e-6)  # nothing seen before: the batch itself
    assert state.score_count == 3 and state.score_mean == pytest.approx(1.0)
    other = rollout(scores=torch.tensor([10.0, 10.0, 10.0, 99.0]))
    second, _, later = algorithm.rewards(other, state, LONGEST)
    std = (torch.tensor([0.0, -3.0, 3.0]) ** 2).mean().sqrt()
    assert second.scores[0] == pytest.approx(float(9.0 / std)) and later.score_count == 6
    stored = dataclasses.replace(rows, stored=torch.ones(4, dtype=torch.bool))
    assert algorithm.rewards(stored, state, LONGEST)[2] == state  # rows of an earlier step were counted then


@pytest.mark.parametrize("score", [0.1, 0.5, 1e6])
def test_equal_scores_in_the_first_batch_are_normalised_to_0(score: float):
    algorithm = Reinforce(reward_normalization="running", kl_coef=0.0)
    rewards = algorithm.rewards(rollout(scores=torch.full((4,), score)), algorithm.init(), LONGEST)[1]
    assert torch.equal(rewards, torch.zeros(4, 4))


def test_the_soft_penalty_rises_over_the_last_share_of_the_length():
    rows = rollout(scores=torch.zeros(4))  # lengths 3, 1, 4, 2
    assert shaped(Reinforce(soft_overlong=0.5), rows).scores.tolist() == pytest.approx([-0.5, 0.0, -1.0, 0.0])
    shape = Reinforce(soft_overlong=0.07)._shape  # .07 · 100 is 7.000000000000001
    paid = shape(torch.zeros(2), None, torch.tensor([93, 94]), RunningMoments(), 100)
    assert paid.tolist() == pytest.approx([0.0, -1 / 7])


def test_masked_completions_count_for_nothing_and_bootstrapped_ones_go_on():
    used = shaped(RLOO(truncation="mask"))
    assert used.weights.tolist() == [1.0, 1.0, 0.0, 0.0]
    rows = rollout(last_values=torch.tensor([5.0, 5.0, 5.0, 5.0]), values=torch.zeros(4, 4))
    plain = PPO(whiten_advantages=False, kl_coef=0.0)
    longer = dataclasses.replace(plain, truncation="bootstrap")
    difference = []
    for algorithm in (plain, longer):
        used, rewards, state = algorithm.rewards(rows, algorithm.init(), LONGEST)
        difference.append(algorithm.estimate(used, rewards, state)[0].advantages)
    gained = difference[1] - difference[0]
    assert not gained[[0, 1, 3]].any()  # they ended by themselves
    torch.testing.assert_close(gained[2], torch.full((4,), 5.0))
    value = Reinforce(baseline="value", truncation="bootstrap", kl_coef=0.0)
    used, rewards, state = value.rewards(rows, value.init(), LONGEST)
    assert float(value.estimate(used, rewards, state)[0].advantages[2, 0]) == pytest.approx(4.0 + 5.0)


@pytest.mark.parametrize(
    "algorithm",
    [
        RLOO(truncation="mask"),
        TRPO(truncation="mask"),
        GRPO(baseline="leave_one_out", scale="batch", truncation="mask"),
    ],
    ids=lambda a: type(a).__name__,
)
def test_the_only_completion_of_its_group_that_ended_has_no_credit(algorithm: Any):
    finished, scores = torch.tensor([True, True, True, False]), torch.tensor([1.0, 2.0, 4.0, 0.0])
    rows = rollout(group_ids=torch.tensor([0, 0, 1, 1]), finished=finished, scores=scores, weights=torch.ones(4))
    used, rewards, state = algorithm.rewards(rows, algorithm.init(), LONGEST)
    advantages = algorithm.estimate(used, rewards, state)[0].advantages
    assert advantages[:2, 0].all() and not advantages[2].any()


def test_the_greedy_score_is_shaped_like_the_samples_scores():
    rows = rollout(
        baseline_scores=torch.tensor([2.0, 2.0, 2.0, float("nan")]),
        baseline_finished=torch.tensor([True, True, False, True]),
        baseline_lengths=torch.tensor([1, 1, 4, 1]),
    )
    algorithm = ReMax(missing_eos_penalty=1.0, reward_clip=1.5, kl_coef=0.0)
    used, rewards, state = algorithm.rewards(rows, algorithm.init(), LONGEST)
    assert used.baseline_scores[:3].tolist() == [1.5, 1.5, 0.5]
    advantages = algorithm.estimate(used, rewards, state)[0].advantages
    assert advantages[:3, 0].tolist() == pytest.approx([1.0 - 1.5, -1.5 - 1.5, 1.5 - 1.0 - 0.5])
    assert float(advantages[3, 0]) == 0.0  # nobody could score its prompt: no baseline; its own score is 0


def greedy(lengths: list[int], **changes: Any) -> Any:
    """A rollout whose greedy completions have these lengths and the score 5."""
    columns = dict(baseline_scores=torch.full((4,), 5.0), baseline_finished=torch.ones(4, dtype=torch.bool))
    return rollout(**columns, baseline_lengths=torch.tensor(lengths), **changes)


def test_a_long_greedy_completion_pays_the_soft_penalty_too():
    rows = greedy([1, 3, 4, 2])
    assert shaped(ReMax(soft_overlong=0.5), rows).baseline_scores.tolist() == pytest.approx([5.0, 4.5, 4.0, 5.0])


def test_the_greedy_score_is_normalised_by_the_moments_of_the_steps_before():
    algorithm = ReMax(reward_normalization="running", kl_coef=0.0)
    state = dataclasses.replace(algorithm.init(), score_count=4.0, score_mean=2.0, score_m2=16.0)
    used = shaped(algorithm, greedy([1, 1, 1, 1]), state)
    assert used.baseline_scores.tolist() == pytest.approx([(5 - 2) / 2] * 4)
    assert used.scores[:3].tolist() == pytest.approx([(1 - 2) / 2, (-2 - 2) / 2, (4 - 2) / 2])


def test_the_score_of_the_prompt_is_a_baseline_without_penalties():
    rows = rollout(baseline_scores=torch.full((4,), 0.25))
    algorithm = Reinforce(baseline="input", missing_eos_penalty=1.0, kl_coef=0.0)
    used, rewards, state = algorithm.rewards(rows, algorithm.init(), LONGEST)
    advantages = algorithm.estimate(used, rewards, state)[0].advantages
    assert advantages[:3, 0].tolist() == pytest.approx([0.75, -2.25, 4.0 - 1.0 - 0.25])


# ── the KL in the loss


@pytest.mark.parametrize("estimator", ["k2", "k3", "k2_sequence", "full"])
def test_the_loss_side_kl_has_its_gradient(estimator: str):
    rows = rollout()
    algorithm = Reinforce(kl_in="loss", kl_estimator=estimator, kl_coef=0.5, baseline="none")
    new = new_scores(rows)
    new = new._replace(kl=3 * new.logprobs)
    used, rewards, state = algorithm.rewards(rows, algorithm.init(), LONGEST)
    assert torch.equal(rewards, token_rewards(rows.scores, rows.completion_mask))  # none of it in the reward
    credit, state = algorithm.estimate(used, rewards, state)
    zero = dataclasses.replace(credit, advantages=torch.zeros_like(credit.advantages))
    loss = algorithm.loss(new, rows, zero, dataclasses.replace(state, kl_coef=0.25)).loss
    (gradient,) = torch.autograd.grad(torch.where(rows.completion_mask, loss, 0).sum(), new.logprobs)
    delta = torch.where(rows.completion_mask, rows.old_logprobs - rows.ref_logprobs, 0)
    expected = {
        "k2": delta,
        "k3": 1 - (-delta).exp(),
        "k2_sequence": delta.sum(1, keepdim=True).expand(4, 4),
        "full": torch.full((4, 4), 3.0),
    }[estimator]
    torch.testing.assert_close(gradient, torch.where(rows.completion_mask, 0.25 * expected, 0))


def test_the_exact_kl_is_asked_of_the_learner_only_where_it_is_used():
    for algorithm, wanted in [
        (GRPO(), False),
        (GRPO(kl_estimator="full"), True),
        (DrGRPO(), False),
    ]:
        assert algorithm.schedule(algorithm.init())["with_kl"] is wanted


@pytest.mark.parametrize(
    ("algorithm", "weights"),
    [
        (RLOO(kl_target=1.0), torch.tensor([1.0, 1.0, 1.0, 0.0])),  # one that nobody scored
        (RLOO(kl_target=1.0, truncation="mask"), torch.ones(4)),  # one that was cut
        (DAPO(kl_coef=0.05, kl_target=1.0), torch.ones(4)),  # groups of one: all scores equal, nobody counts
        (PPO(kl_target=1.0), torch.zeros(4)),
    ],
    ids=["unscored", "cut", "equal scores", "no score at all"],
)
@pytest.mark.parametrize("kl", [0.5, 2.0])
def test_the_controller_follows_the_reported_kl_of_all_that_was_drawn(algorithm: Any, weights: Any, kl: float):
    rows = rollout(weights=weights)
    lengths = rows.completion_mask.sum(1, keepdim=True)
    shift = torch.where(rows.completion_mask, torch.tensor([[1.0], [2.0], [0.0], [5.0]]) * kl / 2 / lengths, 0)
    rows = dataclasses.replace(rows, ref_logprobs=rows.old_logprobs - shift)
    assert describe(rows, {})["kl_to_ref"] == pytest.approx(kl, abs=1e-6)
    used, _, state = algorithm.rewards(rows, algorithm.init(), LONGEST)
    assert kl_per_completion(used) == pytest.approx(kl, abs=1e-6)
    _, state = algorithm.update(FakeLearner(), used, Estimates(rows.old_logprobs), state)
    assert state.kl_coef == pytest.approx(0.05 * (1.02 if kl > 1 else 0.98), rel=1e-6)


# ── off-policy weights


@pytest.mark.parametrize("kind", [Reinforce, RLOO, PPO, A2C, GRPO, CISPO, GSPO, ReinforcePlusPlus])
def test_advantages_are_weighted_by_what_the_policy_has_become(kind: Any):
    rows = rollout(group_ids=torch.tensor([0, 0, 0, 1]))
    rows = dataclasses.replace(rows, behaviour_logprobs=rows.old_logprobs - 0.1 * rows.completion_mask)
    plain, corrected = kind(), kind(off_policy="sequence")
    found = []
    for algorithm in (plain, corrected):
        used, rewards, state = algorithm.rewards(rows, algorithm.init(), LONGEST)
        found.append(algorithm.estimate(used, rewards, state)[0].advantages)
    w = (0.1 * rows.completion_mask.sum(1, keepdim=True)).exp()
    torch.testing.assert_close(found[1], found[0] * w)


def test_on_policy_nothing_is_weighted():
    rows = rollout()
    rows = dataclasses.replace(rows, behaviour_logprobs=rows.old_logprobs)
    algorithm = PPO(off_policy="truncated", self_normalize=True)
    used, rewards, state = algorithm.rewards(rows, algorithm.init(), LONGEST)
    torch.testing.assert_close(
        algorithm.estimate(used, rewards, state)[0].advantages, PPO().estimate(used, rewards, state)[0].advantages
    )


# ── warm-up


def test_the_value_function_warms_up_alone():
    algorithm, learner = PPO(value_warmup=2, lam=0.9), FakeLearner()
    state, rows = algorithm.init(), rollout()
    trained = []
    for _ in range(4):
        credit, state = algorithm.estimate(rows, token_rewards(rows.scores, rows.completion_mask), state)
        _, state = algorithm.update(learner, rows, credit, state)
        trained.append(learner.settings.get("train", "all"))
    assert trained == ["value", "value", "all", "all"] and state.step == 4


def test_the_critic_may_have_a_lambda_of_its_own():
    rows = rollout(last_values=torch.full((4,), 5.0))
    rewards = token_rewards(rows.scores, rows.completion_mask)
    for truncation, target in (("terminal", 4.0), ("bootstrap", 4.0 + 5.0)):  # of the row that was cut
        kind = functools.partial(PPO, truncation=truncation)
        mixed = kind(lam=0.5, value_lam=1.0).estimate(rows, rewards, State(0.0))[0]
        assert torch.equal(mixed.advantages, kind(lam=0.5).estimate(rows, rewards, State(0.0))[0].advantages)
        assert torch.equal(mixed.returns, kind(lam=1.0).estimate(rows, rewards, State(0.0))[0].returns)
        torch.testing.assert_close(mixed.returns[2], torch.full((4,), target))


# ── refusals and warnings


REFUSED = [
    (functools.partial(GRPO, num_generations=1), "GRPO compares the samples of one prompt, and num_generations=1"),
    (functools.partial(DAPO, num_generations=1), "set it to 8, or use Reinforce(baseline='ema')"),
    (functools.partial(GRPO, baseline="leave_one_out"), "divides by a spread that is next to 0 when the others agree"),
    (functools.partial(GRPO, objective="cispo"), "is_cap=5 is usual"),
    (functools.partial(CISPO, dual_clip=3.0), "objective='cispo' clips no loss, so dual_clip would do nothing"),
    (functools.partial(CISPO, clip_range_high=0.3), "so clip_range_high would do nothing"),
    (functools.partial(CISPO, importance="sequence"), "use importance='token'"),
    (functools.partial(GRPO, is_cap=5.0), "is_cap=5.0 is the largest ratio of objective='cispo'"),
    (functools.partial(CISPO, is_cap=0.2), "is_cap=0.2 is the largest ratio, and must be at least 1"),
    (functools.partial(Reinforce, kl_in="loss"), "kl_in='loss' with kl_estimator='k1' regularises nothing"),
    (functools.partial(PPO, kl_estimator="k3"), "kl_in='reward' with kl_estimator='k3' hardly regularises"),
    (functools.partial(GRPO, kl_in="reward"), "use kl_estimator='k1', or kl_in='loss'"),
    (functools.partial(PPO, kl_coef=0.0, kl_target=6.0), "kl_coef=0 stays 0; start it at 0.05"),
    (functools.partial(Reinforce, truncation="bootstrap"), "Reinforce has no value function here"),
    (functools.partial(GRPO, truncation="bootstrap"), "use truncation='terminal', or PPO or A2C"),
    (functools.partial(ReMax, truncation="mask"), "baseline='greedy' with truncation='mask' pays for ending, or"),
    (functools.partial(GRPO, truncation="mask", missing_eos_penalty=1.0), "truncation='mask' leaves them out"),
    (functools.partial(Reinforce, truncation="mask"), "use baseline='group' with num_generations=4 (RLOO), or"),
    (functools.partial(RLOO, baseline="batch", truncation="mask"), "baseline='batch' with truncation='mask' pays"),
    (functools.partial(Reinforce, replay=2), "off_policy='none' would count them as the policy's own"),
    (functools.partial(PPO, replay=-1, off_policy="token"), "replay=-1 must be 0 (off) or more"),
    (functools.partial(PPO, weight_cap=2.0), "off_policy='none' has none; use 'truncated'"),
    (functools.partial(PPO, off_policy="sequence", weight_cap=0.0), "weight_cap=0.0 must be above 0, or absent"),
    (functools.partial(PPO, off_policy="token", self_normalize=True), "off_policy='token' has none; use 'sequence'"),
    (functools.partial(PPO, off_policy="prefix", self_normalize=True), "off_policy='prefix' has none"),
    (functools.partial(PPO, reward_mean=1.0), "are read only with reward_normalization='fixed'"),
    (functools.partial(PPO, reward_normalization="fixed", reward_std=0.0), "reward_std=0.0 must be above 0"),
    (functools.partial(PPO, reward_clip=0.0), "reward_clip=0.0 must be above 0, or absent"),
    (functools.partial(PPO, missing_eos_penalty=-1.0), "missing_eos_penalty=-1.0 must be 0 (off) or more"),
    (functools.partial(PPO, soft_overlong=1.0), "soft_overlong=1.0 must be a share of the length, like 0.2"),
    (functools.partial(PPO, value_warmup=-1), "value_warmup=-1 must be 0 (off) or more"),
    (functools.partial(A2C, value_lam=1.5), "value_lam=1.5 must lie between 0 and 1"),
    (functools.partial(GRPO, resample_rounds=-1), "resample_rounds=-1 must be 0 (off) or more"),
    (functools.partial(ReinforcePlusPlus, gamma=0.0), "gamma=0.0 must be above 0 and at most 1"),
    (functools.partial(A2C, value_coef=-1), "value_coef=-1 must be 0 (off) or more"),
    (functools.partial(PPO, entropy_coef=-0.1), "entropy_coef=-0.1 must be 0 (off) or more"),
    (functools.partial(PPO, kl_coef=math.inf), "kl_coef=inf must be a finite number, such as 0.05"),
    (functools.partial(PPO, kl_target=math.nan), "kl_target=nan must be a finite number, or absent"),
    (functools.partial(RLOO, ema_decay=0.5), "ema_decay=0.5 is read only with baseline='ema', and it is 'group'"),
    (functools.partial(Reinforce, value_coef=0.3), "value_coef=0.3 is read only with baseline='value', and it is"),
    (functools.partial(ReMax, value_coef=0.3), "and it is 'greedy'; remove it"),
    (functools.partial(TRPO, value_epochs=7), "value_epochs=7 is the critic's, and critic='none'; use"),
    (functools.partial(TRPO, lam=0.9), "lam=0.9 is the critic's, and critic='none'; use critic='separate'"),
    (functools.partial(CISPO, clip_range=0.9), "clip_range=0.9 is not read with objective='cispo'"),
    (functools.partial(DrGRPO, kl_estimator="full"), "kl_estimator='full' is about a KL, and kl_coef=0 has none"),
    (
        functools.partial(PPO, kl_coef=0.0, kl_in="loss", kl_estimator="k3"),
        "kl_in='loss' is about a KL, and kl_coef=0",
    ),
    (functools.partial(PPO, truncation="drop"), "truncation='drop' is unknown; choose from"),
]


@pytest.mark.parametrize(("make", "sentence"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_what_cannot_go_together_is_refused_with_the_fix(make: Any, sentence: str):
    with pytest.raises(ConfigError) as caught:
        make()
    assert sentence in str(caught.value)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_refused_in_every_field(name: str, value: float):
    kind = PRESETS[name]
    numbers = [f for f in dataclasses.fields(kind) if "float" in str(f.type)]
    assert len(numbers) > 10
    for field in numbers:
        with pytest.raises(ConfigError, match=f"{field.name}={value} must be a finite number, (such as|or absent)"):
            kind(**{field.name: value})


@pytest.mark.parametrize("name", PRESETS)
def test_a_number_below_0_is_refused_where_it_means_nothing(name: str):
    kind = PRESETS[name]
    for field in dataclasses.fields(kind):
        if "float" in str(field.type) and field.name != "reward_mean":
            with pytest.raises(ConfigError, match=f"{field.name}=-1.0"):
                kind(**{field.name: -1.0})


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_made_of_its_own_fields_and_without_a_kl(name: str):
    """As the command does: it passes every field, at its default or as the flag says."""
    kind = PRESETS[name]
    assert kind(**dataclasses.asdict(kind())) == kind()
    assert parse((kind,), ["--kl_coef", "0"])[0] == kind(kl_coef=0.0)


def test_a_default_of_ones_own_is_not_refused():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(RLOO):
        ema_decay: float = 0.5

    assert Mine().ema_decay == 0.5
    with pytest.raises(ConfigError, match="ema_decay=0.9 is read only with baseline='ema', and it is 'group'"):
        Mine(ema_decay=0.9)


@pytest.mark.parametrize(
    "algorithm", [PPO(), A2C(), Reinforce(baseline="value"), TRPO(critic="separate")], ids=lambda a: type(a).__name__
)
def test_a_value_head_that_is_not_there_is_one_sentence(algorithm: Any):
    rows = rollout(values=None)
    with pytest.raises(ConfigError, match=r"the policy has none; build it with ActorCritic\(policy, value='shared'\)"):
        algorithm.estimate(rows, token_rewards(rows.scores, rows.completion_mask), algorithm.init())


@pytest.mark.parametrize(
    ("algorithm", "fresh", "sentence"),
    [
        (PPO(lam=0.95), True, "lam=0.95 trusts a value head that knows nothing yet"),
        (PPO(lam=0.95, value_warmup=3), True, None),
        (PPO(lam=0.95), False, None),
        (PPO(), True, None),
        (GSPO(clip_range=0.2), True, "clip_range=0.2 with importance='sequence' never clips"),
        (GSPO(), True, None),
        (GRPO(epochs=2), True, "the KL term is not corrected for it"),
        (DrGRPO(epochs=2), True, None),
        (GRPO(replay=1, off_policy="truncated"), True, "off-policy weights do not reach it"),
        (PPO(epochs=4), True, None),
        (PPO(truncation="mask"), True, "ending is paid for or punished"),
        (A2C(truncation="mask"), True, "ending is paid for or punished"),
        (ReinforcePlusPlus(truncation="mask"), True, "ending is paid for or punished"),
        (TRPO(critic="separate", truncation="mask"), True, "ending is paid for or punished"),
        (RLOO(truncation="mask"), True, None),
        (DAPO(truncation="mask"), True, None),
    ],
)
def test_what_is_rarely_meant_is_said(algorithm: Any, fresh: bool, sentence: str | None):
    found = " ".join(algorithm.warnings(fresh_value_head=fresh))
    assert (sentence is None and not found) or (sentence is not None and sentence in found)


def test_every_preset_says_what_it_is():
    for name, kind in PRESETS.items():
        assert kind.paper and kind.formula and kind.bias and kind.__doc__, name
        for knob in dataclasses.fields(kind):
            assert knob.metadata.get("help"), f"{name}.{knob.name} has no help"
