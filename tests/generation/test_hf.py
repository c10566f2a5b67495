"""Keyed sampling inside `generate`: one run, whatever the batch layout."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, ModernBertDecoderConfig

from hfpg.config import ConfigError
from hfpg.data import PromptData
from hfpg.generation.hf import HFGenerator
from hfpg.models import ActorCritic
from hfpg.types import join
from tests import build, tiny


def test_tokens_do_not_depend_on_batch_split_or_padding_width():
    """More than 100,000 tokens with prompts of different lengths, in one call and in small ones: no mismatch."""
    actor = ActorCritic(tiny.model("gpt2", bos_token_id=None, eos_token_id=None))
    data = PromptData(tiny.rows(1700, longest=9), tiny.tokenizer())
    generator = HFGenerator(tiny.tokenizer(), seed=3, max_completion_length=64, stop_token_ids=[], max_tokens=1 << 30)
    ids = torch.arange(1700)
    whole = generator(actor.policy, data.rows(range(1700), ids, 1, "cpu"))
    parts, start = [], 0
    while start < 1700:
        stop = min(start + 97, 1700)
        parts.append(generator(actor.policy, data.rows(range(start, stop), ids[start:stop], 1, "cpu")))
        start = stop
    split = join(parts)
    compared = int(whole.completion_mask.sum())
    mismatches = int((whole.completion_ids != split.completion_ids).sum())
    print(f"{compared} tokens compared, {mismatches} mismatches")
    assert compared > 100_000 and mismatches == 0


def test_draws_follow_the_models_distribution():
    """40,000 first tokens of one prompt against softmax(logits / τ): chi-square per degree of freedom near 1."""
    actor = ActorCritic(tiny.model("gpt2"))
    data = PromptData([{"prompt": "aa ba ca"}, {"prompt": "da"}], tiny.tokenizer())
    count, tau = 40_000, 0.7
    prompts = data.rows([0, 1], torch.arange(2 * count), count, "cpu")
    generator = HFGenerator(tiny.tokenizer(), seed=5, max_completion_length=1, temperature=tau, max_tokens=1 << 20)
    drawn = generator(actor.policy, prompts).completion_ids[count:, 0]
    logits = actor.policy(input_ids=torch.tensor([data.encoded[1]])).logits[0, -1].detach()
    expected = (logits.double() / tau).softmax(0) * count
    observed = torch.bincount(drawn, minlength=tiny.VOCABULARY)
    likely = expected > 5
    chi2 = ((observed - expected)[likely] ** 2 / expected[likely]).sum() / likely.sum()
    assert 0.5 < chi2 < 1.6


def test_samples_of_one_prompt_differ_and_repeat_with_the_seed():
    actor = ActorCritic(tiny.model("gpt2"))
    data = PromptData([{"prompt": "aa"}], tiny.tokenizer())
    prompts = data.rows([0], torch.arange(8), 8, "cpu")
    make = lambda seed: HFGenerator(tiny.tokenizer(), seed=seed, max_completion_length=12)(actor.policy, prompts)  # noqa: E731
    first, again, other = make(1), make(1), make(2)
    assert torch.equal(first.completion_ids, again.completion_ids)
    assert first.completion_ids.shape != other.completion_ids.shape or not torch.equal(
        first.completion_ids, other.completion_ids
    )
    assert len({tuple(row) for row in first.completion_ids.tolist()}) == 8


def test_several_stop_tokens():
    actor = ActorCritic(tiny.model("gpt2"))
    samples = build.draw(actor, count=30, length=30, stop_token_ids=[0, 5, 9])
    assert samples.finished.any()
    stops = torch.tensor([0, 5, 9])
    for ids, mask, ended in zip(samples.completion_ids, samples.completion_mask, samples.finished, strict=True):
        chosen = ids[mask]
        assert not torch.isin(chosen[:-1], stops).any()
        assert torch.isin(chosen[-1], stops) == ended


def test_stop_strings_end_a_completion():
    tokenizer = tiny.byte_tokenizer()
    actor = ActorCritic(tiny.model("gpt2", vocabulary=257))
    data = PromptData([{"prompt": "go " + chr(97 + i)} for i in range(20)], tokenizer)
    prompts = data.rows(range(20), torch.arange(20), 1, "cpu")
    words = ["e", "qu", "7"]
    generator = HFGenerator(
        tokenizer, seed=1, max_completion_length=60, stop_token_ids=[], stop_strings=words, temperature=2.0
    )
    samples = generator(actor.policy, prompts)
    assert samples.finished.any() and not samples.finished.all()
    for ids, mask, ended in zip(samples.completion_ids, samples.completion_mask, samples.finished, strict=True):
        text = tokenizer.decode(ids[mask])
        assert any(word in text for word in words) == bool(ended)
        assert not any(word in tokenizer.decode(ids[mask][:-1]) for word in words), "it ends where the string does"
        assert int(mask.sum()) == 60 or bool(ended)


def test_the_models_own_generation_config_has_no_say_and_is_left_alone():
    model = tiny.model("gpt2")
    plain = build.draw(ActorCritic(model))
    own = GenerationConfig(top_k=2, repetition_penalty=5.0, forced_eos_token_id=0, eos_token_id=0, suppress_tokens=[3])
    model.generation_config = own
    assert torch.equal(plain.completion_ids, build.draw(ActorCritic(model)).completion_ids)
    assert model.generation_config is own


@pytest.mark.parametrize("name", ["repetition_penalty", "min_p", "forced_eos_token_id", "num_beams", "typical_p"])
def test_options_that_change_the_distribution_are_refused(name):
    with pytest.raises(ConfigError, match=f"generation_kwargs has '{name}': sampling would follow another"):
        HFGenerator(tiny.tokenizer(), seed=0, max_completion_length=4, generation_kwargs={name: 1})


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("max_new_tokens", "which is set by max_completion_length; remove it and set that"),
        ("temperature", "which is set by temperature; remove it and set that"),
        ("use_cash", "which is no option of generate; did you mean 'use_cache'"),
    ],
)
def test_options_that_are_settings_or_none(name, said):
    with pytest.raises(ConfigError, match=f"generation_kwargs has '{name}', {said}"):
        HFGenerator(tiny.tokenizer(), seed=0, max_completion_length=4, generation_kwargs={name: 1})


def test_a_harmless_option_is_passed_on():
    actor = ActorCritic(tiny.model("gpt2"))
    plain = build.draw(actor)
    uncached = build.draw(actor, generation_kwargs={"use_cache": False})
    assert torch.equal(plain.completion_ids, uncached.completion_ids)


def test_top_k_one_is_greedy():
    actor = ActorCritic(tiny.model("gpt2"))
    samples = build.draw(actor, top_k=1, count=4, length=5)
    assert samples.sampler_logprobs.abs().max() < 1e-6
    greedy = actor.policy.generate(
        input_ids=samples.prompt_ids,
        attention_mask=samples.prompt_mask.long(),
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=0,
    )[:, samples.prompt_ids.shape[1] :]
    width = greedy.shape[1]
    assert torch.equal(samples.completion_ids[:, :width] * samples.completion_mask[:, :width], greedy)


def test_drawn_tokens_are_not_taken_for_padding(caplog, monkeypatch):
    """GPT-2 warns of a missing mask where the last token is that of its padding; here it was drawn, and read."""
    from transformers.utils import logging

    model = tiny.model("gpt2")
    model.config.pad_token_id = 52
    warned = []
    monkeypatch.setattr(logging.get_logger("transformers.modeling_utils"), "warning_once", warned.append)
    data = PromptData([{"prompt": "ab"}] * 8, tiny.tokenizer())
    prompts = data.rows(range(8), torch.arange(8), 1, "cpu")
    samples = HFGenerator(tiny.tokenizer(), seed=1, max_completion_length=20)(model, prompts)
    assert (samples.completion_ids[samples.completion_mask] == 52).any()
    assert not warned and model.config.pad_token_id == 52


def test_a_configuration_that_insists_on_its_padding():
    """ModernBERT's refuses None as the id of its padding: it is left alone."""
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = ModernBertDecoderConfig(**sizes, bos_token_id=0, eos_token_id=0, pad_token_id=1)
    model = tiny.enlarged(AutoModelForCausalLM.from_config(config))
    data = PromptData(tiny.rows(4), tiny.tokenizer())
    samples = HFGenerator(tiny.tokenizer(), seed=1, max_completion_length=6)(
        model, data.rows(range(4), torch.arange(4), 1, "cpu")
    )
    assert samples.completion_mask.any() and model.config.pad_token_id == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cache_implementation": "foo"}, "Invalid `cache_implementation` .foo."),
        ({"use_cache": "no"}, "generation_kwargs has use_cache='no'; it must be True or False"),
        ({"prefill_chunk_size": 1.5}, "prefill_chunk_size=1.5; it must be a whole number"),
        ({3: 1}, "generation_kwargs has '3', which is no option of generate"),
    ],
)
def test_values_that_an_option_cannot_have_are_refused_before_the_model_loads(options, said, tmp_path):
    with pytest.raises(ConfigError, match=said):
        build.trainer(tmp_path, model="no/model", generation_kwargs=options)
