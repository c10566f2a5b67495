"""The keystone: what `generate` sampled from is what the training forward scores, token by token."""

import dataclasses

import pytest
import torch

from hfpg.models import ActorCritic
from hfpg.ops.objectives import clipped_surrogate
from hfpg.types import TokenLoss
from tests import build, tiny


def score(actor, samples, temperature):
    return actor(
        samples.prompt_ids,
        samples.prompt_mask,
        samples.completion_ids,
        samples.completion_mask,
        temperature=temperature,
        kept=samples.kept,
    )


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampled_logprobs_equal_the_scoring_forward(kind, temperature):
    actor = ActorCritic(tiny.model(kind))
    samples = build.draw(actor, temperature=temperature, length=14)
    assert not samples.prompt_mask.all(), "the batch must be left-padded for this test to mean anything"
    scored = score(actor, samples, temperature)
    assert samples.completion_mask.sum() > 60
    torch.testing.assert_close(scored.logprobs, samples.sampler_logprobs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
@pytest.mark.parametrize("cut", [{"top_k": 5}, {"top_p": 0.7}, {"top_k": 20, "top_p": 0.9}])
def test_policies_are_renormalised_over_the_set_that_was_kept(kind, cut):
    actor = ActorCritic(tiny.model(kind))
    samples = build.draw(actor, temperature=0.8, **cut)
    kept = score(actor, samples, 0.8).logprobs
    torch.testing.assert_close(kept, samples.sampler_logprobs, atol=1e-5, rtol=0)
    raw = score(actor, dataclasses.replace(samples, kept=None), 0.8).logprobs
    assert (raw - samples.sampler_logprobs).abs().max() > 0.05, (
        "without the kept set the score is another distribution"
    )


def test_gpt2_is_wrong_without_position_ids():
    """Guards the test above: a forward that forgets position_ids must fail it."""
    actor = ActorCritic(tiny.model("gpt2"))
    samples = build.draw(actor)
    actor.takes_positions = actor.packs = False
    assert (score(actor, samples, 1.0).logprobs - samples.sampler_logprobs).abs().max() > 0.01


def test_mistral_text_is_longer_than_its_window():
    actor = ActorCritic(tiny.model("mistral"))
    samples = build.draw(actor, length=14)
    assert actor.policy.config.sliding_window < samples.completion_mask.sum(1).max()


def test_soft_capped_logits_do_not_go_through_the_chunked_head():
    assert not ActorCritic(tiny.model("gemma2")).chunked_head
    assert ActorCritic(tiny.model("llama")).chunked_head


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_the_ratio_on_the_first_minibatch_is_one(kind):
    actor = ActorCritic(tiny.model(kind), "shared")
    by = build.learner(actor, max_tokens_per_micro_batch=64)
    rollout, credit = build.rollout_of(build.draw(actor, temperature=1.0), by)
    seen = []

    def loss(new, rows, estimates):
        log_ratio = new.logprobs - rows.old_logprobs
        seen.append(log_ratio[rows.completion_mask].exp())
        return TokenLoss(clipped_surrogate(log_ratio, estimates.advantages, 0.2), {})

    metrics = by.optimize(rollout, credit, loss, aggregation="token_mean", minibatches=2)
    assert metrics["first_log_ratio_max"] < 1e-5
    assert (seen[0] - 1).abs().max() < 1e-5


def test_eos_is_chosen_counted_and_gets_gradient():
    model = tiny.model("gpt2")
    actor = ActorCritic(model)
    samples = build.draw(actor, length=40, count=30)
    ended = samples.finished.nonzero()[:, 0]
    assert len(ended) > 3
    for row in ended.tolist():
        chosen = samples.completion_ids[row][samples.completion_mask[row]]
        assert chosen[-1] == 0 and (chosen[:-1] != 0).all(), "the first stop token is the last chosen one"
    row = ended[:1]
    one = samples.take(row)
    last = int(one.completion_mask.sum()) - 1
    score(actor, one, 1.0).logprobs[0, last].backward()
    assert model.transformer.wte.weight.grad[0].abs().max() > 1e-4


def test_pad_equal_to_eos_changes_nothing():
    """Masks come from positions: whichever id stands in the padding, scores are bit-identical."""
    actor = ActorCritic(tiny.model("gpt2"))
    samples = build.draw(actor, length=40, count=30)
    assert not samples.completion_mask.all()
    other = dataclasses.replace(
        samples,
        completion_ids=torch.where(samples.completion_mask, samples.completion_ids, 9),
        prompt_ids=torch.where(samples.prompt_mask, samples.prompt_ids, 9),
    )
    assert torch.equal(score(actor, samples, 1.0).logprobs, score(actor, other, 1.0).logprobs)
