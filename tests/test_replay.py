"""Stored rollouts, extra baselines and dynamic sampling: what the trainer adds around an algorithm."""

import dataclasses
import math

import pytest
import torch
from safetensors.torch import load_file

from hfpg import ConfigError
from hfpg.algorithms import DAPO, GRPO, PPO, RLOO, DrGRPO, Reinforce, ReMax
from hfpg.replay import REPLAY_FILE, Replay
from tests import build, tiny
from tests.algorithms.test_reinforce import rollout


def parameters(trainer):
    """All of them, flat."""
    return torch.cat([p.detach().flatten() for p in trainer.learner.actor.parameters()])


# ── replay


def behaved(shift: float = 0.0, **changes):
    """A rollout whose current policy is `shift` nats per token from μ on its second row."""
    rows = rollout(weights=torch.ones(4), **changes)
    moved = rows.old_logprobs.clone()
    moved[2] -= shift
    mu = torch.where(rows.completion_mask, moved, 0)
    return dataclasses.replace(rows, behaviour_logprobs=mu, sampler_logprobs=mu)


def test_the_last_rollouts_join_and_are_marked():
    said = []
    replay = Replay(2, said.append)
    for step in range(3):
        fresh = behaved(sample_ids=torch.arange(4) + 4 * step)
        together, metrics = replay.add_to(fresh, lambda stored: stored)
        replay.turn(fresh)
    assert len(together) == 12 and together.stored.tolist() == [True] * 8 + [False] * 4
    assert metrics == {"effective_sample_size": pytest.approx(1.0), "replayed": 8.0}
    assert together.new_weights.tolist() == [0.0] * 8 + [1.0] * 4
    assert [int(r.sample_ids[0]) for r in replay.rollouts] == [4, 8] and not said


def test_stored_rows_join_as_the_policy_is_now_and_are_kept_as_they_were_drawn():
    replay, old, fresh = Replay(2, print), behaved(0.5), behaved()
    replay.turn(old)
    for _ in range(2):
        together, _ = replay.add_to(
            fresh, lambda stored: dataclasses.replace(stored, old_logprobs=stored.old_logprobs + 0.25)
        )
        assert torch.equal(together.old_logprobs, torch.cat([old.old_logprobs + 0.25, fresh.old_logprobs]))
        assert torch.equal(together.behaviour_logprobs, torch.cat([old.sampler_logprobs, fresh.sampler_logprobs]))
    replay.turn(fresh)
    for stored, drawn in zip(replay.rollouts, (old, fresh), strict=True):
        assert torch.equal(stored.old_logprobs, drawn.old_logprobs)
        assert torch.equal(stored.behaviour_logprobs, drawn.sampler_logprobs)


def test_a_small_effective_sample_size_is_said_and_a_tiny_one_ends_the_reuse():
    said = []
    replay = Replay(2, said.append)
    replay.turn(behaved())
    log_weights = torch.tensor([0.0, 0.0, 3.0, 0.0])  # of the stored rows, as the policy is now

    def now(stored):
        old = stored.behaviour_logprobs.clone()
        old[:, 0] += log_weights
        return dataclasses.replace(stored, old_logprobs=old)

    together, metrics = replay.add_to(behaved(), now)
    assert len(together) == 8 and "effective sample size of a stored rollout is 0.3" in said[0]
    replay.rollouts = [dataclasses.replace(r.take(torch.arange(4).repeat(8))) for r in replay.rollouts]
    log_weights = torch.zeros(32).index_fill(0, torch.tensor([0]), 9.0)
    together, metrics = replay.add_to(behaved(), now)
    assert len(together) == 4 and metrics["replayed"] == 0
    assert len(replay.rollouts) == 1  # an update that fails leaves what is stored as it was
    replay.turn(behaved())
    assert len(replay.rollouts) == 1 and len(replay.rollouts[0]) == 4
    assert "a stored rollout is dropped: its effective sample size is 0.03, below 0.1" in said[1]


def test_a_run_with_replay_resumes_bit_for_bit(tmp_path):
    algorithm = RLOO(kl_coef=0.02, replay=2, off_policy="truncated")
    settings = dict(algorithm=algorithm, max_steps=5, save_steps=3)
    whole = build.trainer(tmp_path / "a", **settings)
    whole.train()
    assert load_file(tmp_path / "a" / "checkpoint-3" / REPLAY_FILE)["1|scores"].shape == (32,)
    resumed = build.trainer(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"), **settings)
    resumed.train()
    assert torch.equal(parameters(whole), parameters(resumed))
    assert [len(r) for r in resumed.replay.rollouts] == [32, 32]
    logged = whole.state.log_history
    assert [row["replayed"] for row in logged] == [0, 32, 64, 64, 64]
    assert all(0 < row["effective_sample_size"] <= 1 + 1e-6 for row in logged)


def test_replay_is_off_unless_asked_for(tmp_path):
    trainer = build.trainer(tmp_path, save_steps=1)
    trainer.train()
    assert not (tmp_path / "checkpoint-2" / REPLAY_FILE).exists()
    assert "effective_sample_size" not in trainer.state.log_history[-1]


def test_without_the_samplers_logprobs_nothing_is_corrected(tmp_path):
    trainer = build.trainer(tmp_path, algorithm=PPO(off_policy="token"))
    mine = trainer.generator
    trainer.generator = lambda policy, prompts: dataclasses.replace(mine(policy, prompts), sampler_logprobs=None)
    with pytest.raises(ConfigError, match="the generator gave no sampler_logprobs; return them with the samples"):
        trainer.train()


# ── baselines that cost another score


def test_the_greedy_completion_is_one_per_prompt_and_the_same_for_all_its_samples(tmp_path):
    trainer = build.trainer(tmp_path, algorithm=ReMax(num_generations=3), prompts_per_step=4)
    samples, scores = trainer.collect()
    policy = trainer.learner.actor.policy
    for row in (0, 3, 6, 9):
        prompt = samples.prompt_ids[row][samples.prompt_mask[row]][None]
        out = policy.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=6,
            pad_token_id=0,
            eos_token_id=trainer.generator.stops(policy),
        )[0, prompt.shape[1] :]
        text = tiny.tokenizer().decode(out, skip_special_tokens=True)
        assert scores.baseline_scores[row : row + 3].tolist() == pytest.approx(tiny.count_a([text]) * 3)
    metrics = trainer.train() and trainer.state.log_history[-1]
    assert -1 <= metrics["baseline_correlation"] <= 1 and "baseline_score" in metrics


def test_a_generator_without_greedy_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"function has no method greedy\(policy, prompts\)"):
        build.trainer(tmp_path, algorithm=ReMax(), generator=lambda policy, prompts: None)


def test_the_prompts_own_score(tmp_path):
    seen = []

    def judge(prompts, completions):
        seen.append((prompts, completions))
        return [float(len(c)) for c in completions]

    trainer = build.trainer(tmp_path, algorithm=Reinforce(baseline="input"), reward=judge, prompts_per_step=4)
    _, scores = trainer.collect()
    prompts, completions = seen[-1]
    assert prompts == [""] * 4 and completions == seen[-2][0]
    assert scores.baseline_scores.tolist() == [float(len(text)) for text in completions]
    assert trainer.collector.said["by_function"]["judge"] != [float(len(text)) for text in completions]


@pytest.mark.parametrize(
    ("judge", "sentence"),
    [
        (lambda prompts, completions: [1.0 / bool(p) for p in prompts], "ZeroDivisionError"),
        (lambda prompts, completions: [1.0 if p else None for p in prompts], "all abstained"),
    ],
)
def test_a_judge_that_cannot_score_a_prompt_is_refused_before_training(judge, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence) as caught:
        build.trainer(tmp_path, algorithm=Reinforce(baseline="input"), reward=judge)
    assert "use baseline='ema', or a judge that scores any text" in str(caught.value)


def test_a_prompt_that_nobody_scores_has_no_baseline(tmp_path):
    def judge(prompts, completions):
        return [None if not p and "a" in c[:8] else 1.0 for p, c in zip(prompts, completions, strict=True)]

    trainer = build.trainer(tmp_path, algorithm=Reinforce(baseline="input"), reward=judge)
    found = trainer.collect()[1].baseline_scores.tolist()
    assert any(math.isnan(x) for x in found) and any(x == 1.0 for x in found)
    assert all(math.isfinite(v) for v in trainer.train().values())


# ── dynamic sampling


def sometimes_equal(prompts, completions):
    """Half of the prompts score all their completions alike."""
    return [float(sum(map(ord, p)) % 2) * len(c) for p, c in zip(prompts, completions, strict=True)]


def test_prompts_of_equal_scores_are_replaced_while_rounds_last(tmp_path):
    plain = build.trainer(tmp_path / "a", algorithm=DrGRPO(num_generations=2), reward=sometimes_equal)
    again = build.trainer(
        tmp_path / "b", algorithm=DrGRPO(num_generations=2, resample_rounds=9), reward=sometimes_equal
    )
    samples, scores = again.collect()
    assert len(plain.collect()[0]) == 16 and len(samples) > 16
    assert len(samples.sample_ids.unique()) == len(samples) == len(scores)
    used = again.algorithm.rewards(again.rescore(samples, scores), again.algorithm_state, 6)[0]
    assert int((used.weights > 0).sum()) == 16  # the eight informative prompts of the step
    assert torch.equal(again.collect()[0].completion_ids, samples.completion_ids)  # the same again until `step`
    again.train()
    assert again.run.position > 16  # the stream has moved past all that were drawn
    assert len(again.collector.said["by_function"]["sometimes_equal"]) >= 16


@pytest.mark.parametrize(("truncation", "informative"), [("mask", 0), ("terminal", 8)])
def test_a_prompt_tells_nothing_where_what_differs_was_cut_and_is_left_out(truncation, informative, tmp_path):
    algorithm = DrGRPO(num_generations=2, resample_rounds=1, truncation=truncation)
    trainer = build.trainer(tmp_path, algorithm=algorithm)
    samples, scores = trainer.collect()
    half = torch.arange(len(samples)) % 2 == 0  # one completion of each prompt ended by itself
    samples = dataclasses.replace(samples.take(torch.arange(16)), finished=half[:16])
    scores = dataclasses.replace(scores.take(torch.arange(16)), scores=torch.arange(16.0), weights=torch.ones(16))
    assert trainer.collector._informative(scores, samples) == informative


def test_when_every_score_is_equal_the_rounds_end_and_nothing_moves(tmp_path):
    trainer = build.trainer(
        tmp_path,
        algorithm=DAPO(num_generations=2, resample_rounds=2, soft_overlong=0.0),
        max_steps=5,  # a task that is solved is no error
        reward=lambda completions: [1.0] * len(completions),
    )
    before = parameters(trainer).clone()
    trainer.train()
    assert torch.equal(parameters(trainer), before)
    assert len(trainer.collector.said["by_function"]["<lambda>"]) == 3 * 16


def test_a_constant_reward_without_kl_leaves_the_parameters_bit_for_bit(tmp_path):
    """The negative control of every comparison: nothing to learn, nothing learnt."""
    for number, algorithm in enumerate(
        [RLOO(kl_coef=0.0), GRPO(kl_coef=0.0), Reinforce(baseline="batch", kl_coef=0.0)]
    ):
        trainer = build.trainer(
            tmp_path / str(number), algorithm=algorithm, reward=lambda completions: [0.1] * len(completions)
        )
        before = parameters(trainer).clone()
        trainer.train()
        assert torch.equal(parameters(trainer), before)
