"""Old log-probs are those of sampling where, and only where, scoring would give the same."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

from hfpg.algorithms import A2C, PPO, Reinforce
from hfpg.learner import captured
from hfpg.models import ActorCritic
from tests import build, tiny


def forwards(trainer, monkeypatch) -> list[bool]:
    """Calls of the scoring forward, each with whether a gradient was wanted."""
    seen: list[bool] = []
    plain = ActorCritic.forward

    def forward(self, *args, **kwargs):
        if self is trainer.learner.actor:
            seen.append(torch.is_grad_enabled())
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(ActorCritic, "forward", forward)
    return seen


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2", "lstm"])
@pytest.mark.parametrize("value", [None, "shared", "separate"])
def test_what_is_captured_is_what_scoring_says(kind, value, tmp_path):
    algorithm = Reinforce() if value is None else PPO(value=value)
    trainer = build.trainer(tmp_path, model=tiny.model(kind), algorithm=algorithm)
    if value is not None:
        trainer.learner.actor.value.linear.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    samples, scores = trainer.collect()
    rollout = trainer.rescore(samples, scores)
    assert trainer.run.sampler_gap < 1e-5
    assert torch.equal(rollout.old_logprobs, samples.sampler_logprobs)
    scored = trainer.learner.score(rollout)
    torch.testing.assert_close(rollout.old_logprobs, scored.logprobs, rtol=0, atol=1e-5)
    torch.testing.assert_close(rollout.entropy, scored.entropy, rtol=0, atol=1e-5)
    if value is not None:
        torch.testing.assert_close(rollout.values, scored.values, rtol=1e-5, atol=1e-5)


def test_the_scoring_forward_runs_at_the_first_step_only(tmp_path, monkeypatch):
    trainer = build.trainer(tmp_path, algorithm=A2C(), max_steps=3)
    seen = forwards(trainer, monkeypatch)
    trainer.train()
    assert seen.count(False) == 1 and seen.count(True) == 3


def test_texts_much_longer_than_those_compared_are_compared_too(tmp_path, monkeypatch, capsys):
    trainer = build.trainer(tmp_path)
    samples, scores = trainer.collect()
    longest = int((samples.prompt_mask.sum(1) + samples.completion_mask.sum(1)).max())
    looks = []
    monkeypatch.setattr(trainer.learner, "gap", lambda rows: looks.append(1) or (1e-7 if len(looks) < 2 else 1e-3))
    trainer.rescore(samples, scores)
    trainer.rescore(samples, scores)
    assert len(looks) == 1 and trainer.run.sampler_length == longest
    trainer.run.sampler_length = longest // 2  # as if the first step had drawn shorter ones
    rollout = trainer.rescore(samples, scores)
    assert len(looks) == 2 and trainer.run.sampler_gap == 1e-3 and trainer.run.sampler_length == longest
    assert not torch.equal(rollout.old_logprobs, samples.sampler_logprobs)
    assert "old log-probs are scored again at every step" in capsys.readouterr().out.replace("\n", " ")
    trainer.run.sampler_length = 1
    trainer.rescore(samples, scores)
    assert len(looks) == 2, "what is not believed is not looked at again"


def test_a_run_that_goes_on_believes_as_before(tmp_path, monkeypatch):
    build.trainer(tmp_path, algorithm=A2C(), max_steps=2).train()
    again = build.trainer(tmp_path, algorithm=A2C(), max_steps=3, resume_from_checkpoint=True)
    seen = forwards(again, monkeypatch)
    again.train()
    assert seen.count(False) == 0 and again.run.sampler_gap < 1e-5


def test_a_sampler_that_differs_is_not_believed(tmp_path, capsys):
    trainer = build.trainer(tmp_path, max_steps=2)
    draw = trainer.collector.generator.__class__.__call__

    def off(self, *args, **kwargs):
        samples = draw(self, *args, **kwargs)
        return dataclasses.replace(samples, sampler_logprobs=samples.sampler_logprobs - 1e-3 * samples.completion_mask)

    trainer.collector.generator.__class__ = type("Off", (type(trainer.collector.generator),), {"__call__": off})
    metrics = trainer.train()
    assert metrics["sampler_gap"] == pytest.approx(1e-3, rel=0.05) and metrics["first_log_ratio_max"] < 1e-5
    assert re.search(r"sampling and scoring differ by [\d.]+e-04 of the largest log-prob", capsys.readouterr().out)


def test_rounding_that_grows_with_the_log_probs_is_believed(tmp_path, monkeypatch):
    trainer = build.trainer(tmp_path)
    samples, _ = trainer.collect()
    far = torch.where(samples.completion_mask, samples.sampler_logprobs - 30, 0)
    scored = captured(dataclasses.replace(samples, sampler_logprobs=far))
    monkeypatch.setattr(trainer.learner, "score", lambda samples: scored)
    for error in (2e-5, 2e-3):
        found = trainer.learner.gap(dataclasses.replace(samples, sampler_logprobs=far + error))
        assert found == pytest.approx(error / float(far.abs().max()), rel=0.1)
    broken = torch.where(samples.completion_mask, torch.nan, far)
    assert trainer.learner.gap(dataclasses.replace(samples, sampler_logprobs=broken)) == torch.inf, "NaN is no 0"


@pytest.mark.parametrize(
    ("settings", "algorithm"),
    [({"trust_sampler": False}, PPO()), ({}, PPO(truncation="bootstrap"))],
    ids=["switched off", "value after the last token"],
)
def test_where_it_may_not_stand_for_scoring(tmp_path, settings, algorithm):
    trainer = build.trainer(tmp_path, algorithm=algorithm, **settings)
    metrics = trainer.train()
    assert trainer.run.sampler_gap is None and 0 < metrics["sampler_gap"] < 1e-5


def test_a_generator_of_the_users_own_is_not_believed(tmp_path):
    inner = build.trainer(tmp_path / "inner").collector.generator
    trainer = build.trainer(tmp_path / "own", generator=lambda policy, prompts: inner(policy, prompts))
    assert "sampler_gap" in trainer.train() and trainer.run.sampler_gap is None


def test_another_generator_is_compared_anew(tmp_path):
    trainer = build.trainer(tmp_path)
    trainer.rescore(*trainer.collect())
    assert trainer.run.sampler_gap is not None
    inner = trainer.generator
    trainer.generator = lambda policy, prompts: inner(policy, prompts)
    assert trainer.run.sampler_gap is None and not trainer.rescorer.comparable
