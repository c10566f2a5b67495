"""Scores per token and per step; failures that drop completions; judging while sampling goes on."""

import json
import threading
import time

import numpy as np
import pytest
import torch

from hfpg import ConfigError
from hfpg.algorithms import DAPO, PPO, RLOO, Reinforce
from hfpg.data import step_ends
from hfpg.ops.returns import rewards_to_go, token_rewards
from hfpg.rewards import Judge, RewardError
from tests import build, tiny


IDS = [[5, 6, 7], [8], [9, 10]]
TEXTS = ["a b c", "d", "e f"]


def judged(*functions, weights=None, **settings):
    """Scores of three completions of 3, 1 and 2 tokens."""
    log = settings.pop("log", None)
    return Judge(list(functions), weights, **settings)(["p"] * 3, TEXTS, IDS, {}, log=log)


# ── per token, per step


def test_a_list_per_completion_is_one_score_per_token():
    found = judged(lambda completions: [[1.0, 2.0, 3.0], [4.0], None])
    assert found.scores.tolist() == [6.0, 4.0, 0.0] and found.weights.tolist() == [1.0, 1.0, 0.0]
    assert found.token_scores.tolist() == [[1, 2, 3], [4, 0, 0], [0, 0, 0]]
    assert found.by_function == {"<lambda>": [6.0, 4.0, None]}


@pytest.mark.parametrize("kind", [torch.tensor, np.float32, np.array])
def test_the_scores_of_tokens_may_be_numbers_of_torch_and_numpy(kind):
    found = judged(lambda completions: [[kind(1.0), 2, kind(3.0)], [kind(4.0)], None])
    assert found.token_scores.tolist() == [[1, 2, 3], [4, 0, 0], [0, 0, 0]]
    with pytest.raises(RewardError, match="returned a list with nan for sample 1"):
        judged(lambda completions: [[1, 2, 3], [kind(float("nan"))], None])


def test_functions_of_both_kinds_add_up():
    def per_token(completions):
        return [torch.ones(len(ids)) for ids in IDS]

    def whole(completions):
        return [10.0, 20.0, 30.0]

    found = judged(per_token, whole, weights=[0.5, 1.0])
    assert found.scores.tolist() == [11.5, 20.5, 31.0]
    assert found.token_scores.tolist() == [[0.5, 0.5, 0.5], [0, 0, 0], [0.5, 0.5, 0]]  # one number is one number
    mask = torch.tensor([[True, True, True], [True, False, False], [True, True, False]])
    rewards = token_rewards(found.scores, mask, token_scores=found.token_scores)
    assert rewards.tolist() == [[0.5, 0.5, 10.5], [20.5, 0, 0], [0.5, 30.5, 0]]  # what is no token's is the last one's
    torch.testing.assert_close(rewards.sum(1), found.scores)
    assert rewards_to_go(rewards, mask)[0].tolist() == [11.5, 11.0, 10.5]


def test_steps_end_where_the_marker_is_complete():
    tokenizer = tiny.byte_tokenizer()
    ids = tokenizer("ab\ncd\n\nef").input_ids
    places = step_ends(tokenizer, "\n", ids)
    assert [tokenizer.decode(ids[: p + 1]) for p in places] == ["ab\n", "ab\ncd\n", "ab\ncd\n\n", "ab\ncd\n\nef"]
    assert step_ends(tokenizer, "\n", tokenizer("ab\n").input_ids) == [2] and step_ends(tokenizer, "\n", []) == []
    found = judged(lambda completions: [[1.0, 2.0], [3.0], [0.0, 4.0]], step_ends=lambda ids: [0, len(ids) - 1][-2:])
    assert found.token_scores.tolist()[0] == [1.0, 0.0, 2.0]


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        (
            [[1.0, 2.0], 1.0, 1.0],
            "returned 2 scores for sample 0 ('a b c'), which has 3 tokens; give one per completion",
        ),
        ([[1.0, float("nan"), 1.0], 1.0, 1.0], "returned a list with nan for sample 0"),
        ([["x", 1.0, 1.0], 1.0, 1.0], "each entry is a finite number"),
    ],
)
def test_a_list_that_does_not_fit_is_named(output, sentence):
    with pytest.raises(RewardError) as caught:
        judged(lambda completions: output)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("algorithm", [PPO(kl_coef=0.0, epochs=2), RLOO(kl_coef=0.0)], ids=["ppo", "rloo"])
def test_token_scores_reach_the_tokens_and_train(algorithm, tmp_path):
    def per_token(completion_ids):
        return [[float(i % 2) / 6 for i in ids] for ids in completion_ids]

    trainer = build.trainer(
        tmp_path, algorithm=algorithm, reward=per_token, max_steps=20, prompts_per_step=16, learning_rate=5e-3
    )
    rollout = trainer.rescore(*trainer.collect())
    expected = torch.where(rollout.completion_mask, (rollout.completion_ids % 2) / 6, 0)
    torch.testing.assert_close(rollout.token_scores, expected)
    _, rewards, _ = algorithm.rewards(rollout, algorithm.init(), 6)
    torch.testing.assert_close(rewards, expected)
    trainer.train()
    scores = [row["score"] for row in trainer.state.log_history]
    assert sum(scores[-4:]) > 1.2 * sum(scores[:4])


def test_shaping_keeps_the_sum_and_the_unit():
    algorithm = Reinforce(kl_coef=0.0, reward_normalization="fixed", reward_mean=1.0, reward_std=2.0)
    from tests.algorithms.test_reinforce import rollout

    parts = torch.tensor([[1.0, 1, 1, 0], [4, 0, 0, 0], [0, 0, 2, 2], [0, 0, 0, 0]])
    rows = rollout(scores=parts.sum(1), token_scores=parts)
    used, rewards, _ = algorithm.rewards(rows, algorithm.init(), 4)
    torch.testing.assert_close(rewards.sum(1), used.scores)
    assert rewards[0].tolist() == [0.5, 0.5, 0.0, 0.0]  # the mean is taken off at the last token


# ── failures


def test_a_failure_drops_the_completions_that_it_concerns():
    from hfpg.rewards.judge import Log

    log = Log()
    found = judged(
        lambda completions: [1.0, float("inf"), 3.0],
        lambda completions: [1.0, 1.0, 1.0],
        on_error="drop",
        log=log,
    )
    assert found.weights.tolist() == [1.0, 0.0, 1.0] and found.scores.tolist() == [2.0, 0.0, 4.0]
    assert len(log.errors) == 1 and "returned inf for sample 1" in log.errors[0]


@pytest.mark.parametrize("bad", [lambda completions: 1 / 0, lambda completions: [1.0], lambda completions: "no"])
def test_a_function_that_fails_as_a_whole_drops_them_all(bad):
    assert judged(bad, lambda completions: [1.0] * 3, on_error="drop").weights.tolist() == [0, 0, 0]
    watching = judged(bad, lambda completions: [1.0] * 3, on_error="drop", weights=[0.0, 1.0])
    assert watching.weights.tolist() == [1, 1, 1]  # one that only watches spoils nothing
    with pytest.raises(RewardError):
        judged(bad, lambda completions: [1.0] * 3)


def flaky(share: int):
    """Fails on one of `share` completions, but not in the dry call."""

    def judge(completions):
        return [float("nan") if len(completions) > 2 and i % share == 0 else 1.0 for i in range(len(completions))]

    return judge


def test_a_run_goes_on_without_them_and_counts_them(tmp_path):
    trainer = build.trainer(tmp_path, reward=flaky(4), reward_on_error="drop")
    trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["dropped"] for row in rows] == [0.25, 0.25] and rows[0]["unscored"] == 0.25


def test_too_many_end_the_run_after_saving(tmp_path):
    calls = []

    def judge(completions):
        calls.append(1)
        late = len(calls) > 4  # the dry call asks twice
        return [float("nan") if late else 1.0] * len(completions)

    trainer = build.trainer(tmp_path, reward=judge, reward_on_error="drop", max_steps=6, max_dropped=0.25)
    with pytest.raises(RuntimeError, match="8 of 8 completions of this step were dropped, more than max_dropped=0.25"):
        trainer.train()
    assert (tmp_path / f"checkpoint-{trainer.state.global_step}" / "model.safetensors").is_file()


def test_what_would_be_dropped_is_refused_in_the_dry_call(tmp_path):
    with pytest.raises(ConfigError, match="in a dry call on 2 rows, before training"):
        build.trainer(tmp_path, reward=lambda completions: [float("nan")] * 2, reward_on_error="drop")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"max_dropped": 1.5}, "max_dropped=1.5"),
        ({"step_marker": ""}, "marks nothing"),
        ({"judge_chunks": 0}, "judge_chunks=0"),
    ],
)
def test_settings_that_cannot_be(settings, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        build.trainer(tmp_path, **settings)


# ── metrics of one's own


def test_a_metric_is_the_mean_over_all_resampling_rounds(tmp_path):
    """Later rounds draw fewer prompts: a mean of the rounds' means would count their completions for more."""
    rounds = []

    def judge(prompts, completions, log_metric):
        rounds.append([float(len(rounds) + i) for i in range(len(completions))])
        for value in rounds[-1]:
            log_metric("mine", value)
        return [len(c) * (len(p) % 2) for p, c in zip(prompts, completions, strict=True)]

    algorithm = DAPO(num_generations=2, resample_rounds=3, soft_overlong=0.0)
    trainer = build.trainer(tmp_path, algorithm=algorithm, reward=judge, train_dataset=tiny.rows(40), max_steps=1)
    rounds.clear()
    metrics = trainer.train()
    assert len(rounds) > 1 and len(rounds[-1]) < len(rounds[0])
    values, means = [v for values in rounds for v in values], [sum(r) / len(r) for r in rounds]
    assert metrics["mine"] == pytest.approx(sum(values) / len(values)) != pytest.approx(sum(means) / len(means))


# ── overlap


def test_chunks_change_neither_tokens_nor_scores_nor_their_order(tmp_path):
    def judge(prompts, completions, log_extra, log_metric):
        log_extra("length", [len(c) for c in completions])
        log_metric("calls", 1.0)
        return [float(len(p) + 2 * len(c)) for p, c in zip(prompts, completions, strict=True)]

    found = []
    for chunks in (1, 3, 50):
        trainer = build.trainer(
            tmp_path / str(chunks), algorithm=RLOO(num_generations=2), reward=judge, judge_chunks=chunks
        )
        found.append((*trainer.collect(), trainer.collector.said))
    for samples, scores, said in found[1:]:
        assert torch.equal(samples.completion_ids, found[0][0].completion_ids)
        assert torch.equal(scores.scores, found[0][1].scores) and scores.extra == found[0][1].extra
        assert said | {"logged": 0} == found[0][2] | {"logged": 0}  # each call logs


def test_one_chunk_is_judged_while_the_next_is_sampled(tmp_path):
    events = []

    def judge(completions):
        if len(completions) == 2 and threading.current_thread() is not threading.main_thread():
            events.append("judging")
            time.sleep(0.2)
            events.append("judged")
        return [0.0] * len(completions)

    trainer = build.trainer(tmp_path, algorithm=Reinforce(), reward=judge, prompts_per_step=6, judge_chunks=3)
    plain = trainer.generator

    def generator(policy, prompts):
        events.append("sampling")
        return plain(policy, prompts)

    trainer.generator = generator
    trainer.collect()
    first = events.index("judging")
    assert events.index("sampling", first) < events.index("judged", first)


def test_an_error_in_a_thread_is_that_of_the_run(tmp_path):
    def judge(completions):
        if threading.current_thread() is not threading.main_thread():
            raise KeyError("gone")
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match="reward function 'judge' raised KeyError"):
        build.trainer(tmp_path, reward=judge, judge_chunks=2).train()
