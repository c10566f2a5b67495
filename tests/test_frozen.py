"""Training the top layers: the same gradient from states that were computed once, and nothing below learns."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BartConfig, JambaConfig, Zamba2Config

from hfpg.algorithms import PPO
from hfpg.config import ConfigError
from hfpg.frozen import freeze_below, frozen_layers, input_embeddings, layer_list
from hfpg.models import ActorCritic, Reference
from hfpg.ops.kl import full
from hfpg.saving import load_actor_critic, load_value_head, save_actor_critic
from tests import build, tiny


KINDS = [kind for kind in tiny.ARCHITECTURES if kind != "lstm"]


def actor_of(kind: str, value: str | None = "shared", layers: int = 1) -> ActorCritic:
    model = tiny.model(kind)
    freeze_below(model, layers)
    actor = ActorCritic(model, value)
    if actor.value is not None:
        actor.value.linear.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    return actor


def gradients(actor: ActorCritic) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in actor.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", ["shared", "separate"])
def test_scores_and_gradient_are_those_of_the_whole_forward(kind, value):
    by = build.learner(actor_of(kind, value), reference=True, max_tokens_per_micro_batch=80)
    assert by.actor.frozen_layers == 1
    samples = build.draw(by.actor)
    old = by.score(samples)
    rollout, credit = build.rollout_of(samples, by)
    rollout = dataclasses.replace(
        rollout, prompt_states=old.prompt_states, completion_states=old.completion_states, weights=rollout.weights
    )
    found = []
    for rows in (rollout, dataclasses.replace(rollout, prompt_states=None, completion_states=None)):
        by.actor.zero_grad()
        by.gradient(rows, credit, PPO(entropy_coef=0.1).loss, "token_mean", with_entropy=True, with_kl=True)
        found.append((by.score(rows), gradients(by.actor)))
    for name in ("logprobs", "entropy", "values", "ref_logprobs"):
        torch.testing.assert_close(getattr(found[0][0], name), getattr(found[1][0], name), rtol=1e-4, atol=1e-5)
    assert (found[0][1] - found[1][1]).norm() / found[1][1].norm() < 1e-5


def test_frozen_layers_run_once_a_rollout(tmp_path):
    runs = {"first": 0, "last": 0, "reference's first": 0, "reference's last": 0}
    trainer = build.trainer(tmp_path, algorithm=PPO(epochs=3), trainable_layers=1, max_steps=2, trust_sampler=False)
    layers = layer_list(trainer.learner.actor.policy.base_model)

    def count(name):
        def look(module, args, kwargs, out):
            runs[name] += out.shape[1] > 1 and not generating

        return look

    generating = False
    draw = trainer.collector.generator.__call__

    def sampled(*args, **kwargs):
        nonlocal generating
        generating = True
        try:
            return draw(*args, **kwargs)
        finally:
            generating = False

    trainer.collector.generator = sampled
    layers[0].register_forward_hook(count("first"), with_kwargs=True)
    layers[-1].register_forward_hook(count("last"), with_kwargs=True)
    theirs = layer_list(trainer.reference.scorer.policy.base_model)
    theirs[0].register_forward_hook(count("reference's first"), with_kwargs=True)
    theirs[-1].register_forward_hook(count("reference's last"), with_kwargs=True)
    trainer.train()
    assert runs["first"] == 2, "one rollout a step"
    assert runs["last"] >= 2 * (1 + 3), "scored once, trained three times"
    assert runs["reference's first"] == 0 and runs["reference's last"] == 2, "it goes on from the policy's states"


@pytest.mark.parametrize("value", ["shared", "separate"])
def test_only_the_top_layers_learn_and_the_model_is_saved_whole(tmp_path, value):
    model = tiny.model("llama")
    before = copy.deepcopy(model.state_dict())
    trainer = build.trainer(tmp_path, model=model, algorithm=PPO(epochs=2, value=value), trainable_layers=1)
    trainer.train()
    after = load_actor_critic(trainer.save_model(tmp_path / "tuned"))
    moved = {name for name, x in after.policy.state_dict().items() if not torch.equal(x, before[name])}
    assert moved and all(name.startswith("model.layers.1.") for name in moved)
    assert after.value is not None


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    whole = build.trainer(tmp_path / "whole", trainable_layers=1, max_steps=3)
    whole.train()
    half = build.trainer(tmp_path / "half", trainable_layers=1, max_steps=3, save_steps=2)
    half.args = dataclasses.replace(half.args, max_steps=2)
    half.train()
    again = build.trainer(tmp_path / "half", trainable_layers=1, max_steps=3, resume_from_checkpoint=True)
    again.train()
    pairs = zip(whole.learner.actor.parameters(), again.learner.actor.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_copies_share_what_is_frozen():
    actor = actor_of("gpt2", "separate")
    reference = Reference(actor)
    mine = dict(actor.policy.named_parameters())
    for name, p in reference.scorer.policy.named_parameters():
        assert (p is mine[name]) == (not mine[name].requires_grad)


def test_another_reference_is_computed_whole():
    actor = actor_of("gpt2", None)
    other = tiny.model("gpt2", seed=3)
    by = build.learner(actor)
    by.reference = Reference(actor, other)
    samples = build.draw(actor)
    rows = (samples.prompt_ids, samples.prompt_mask, samples.completion_ids, samples.completion_mask)
    wanted = ActorCritic(other)(*rows)
    torch.testing.assert_close(by.score(samples).ref_logprobs, wanted.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_the_exact_kl_to_another_policy_is_that_of_two_whole_forwards(kind):
    """By the LM head in chunks, and through the model's own forward; the other one has frozen layers of its own."""
    actor, model = actor_of(kind, None), tiny.model(kind, seed=3)
    freeze_below(model, 1)
    other = ActorCritic(model)
    assert actor.frozen_layers == other.frozen_layers == 1
    samples = build.draw(actor, count=6)
    rows = (samples.prompt_ids, samples.prompt_mask, samples.completion_ids, samples.completion_mask)
    wanted = []
    for prompt, real, completion, chosen in zip(*rows, strict=True):
        row = torch.cat([prompt[real], completion[chosen]])[None]
        kl = full(actor.policy(row).logits, model(row).logits)
        wanted.append(kl[0, real.sum() - 1 : -1].detach())
    states = dict(zip(("prompt_states", "completion_states"), actor.states(*rows), strict=True))
    for reference in (other, Reference(actor, model)):
        kl = actor(*rows, **states, reference=reference).kl.detach()
        torch.testing.assert_close(kl[samples.completion_mask], torch.cat(wanted), rtol=1e-4, atol=1e-5)


def test_an_adapter_on_the_top_layer_has_frozen_layers_below():
    top = LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1], init_lora_weights=False)
    model = get_peft_model(tiny.model("llama"), top)
    actor = ActorCritic(model)
    assert actor.frozen_layers == 1
    by = build.learner(actor)
    samples = build.draw(actor)
    plain = actor(samples.prompt_ids, samples.prompt_mask, samples.completion_ids, samples.completion_mask)
    torch.testing.assert_close(by.score(samples).logprobs, plain.logprobs.detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "layers", "message"),
    [
        ("gpt2", 3, r"trainable_layers=3 must lie between 1 and 2, the layers of this GPT2LMHeadModel"),
        ("gpt2", 0, r"trainable_layers=0 must lie between 1 and 2"),
    ],
)
def test_impossible_numbers_of_layers_are_refused(kind, layers, message):
    with pytest.raises(ConfigError, match=message):
        freeze_below(tiny.model(kind), layers)


SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=2)
MIXED = {  # layers of two classes; in Zamba's, one transformer block stands in several of them
    "jamba": lambda: JambaConfig(
        **SMALL,
        num_hidden_layers=4,
        num_key_value_heads=1,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=2,
    ),
    "zamba2": lambda: Zamba2Config(
        **SMALL,
        num_hidden_layers=4,
        num_key_value_heads=2,
        layer_types=["mamba", "hybrid"] * 2,
        hybrid_layer_ids=[1, 3],
        mamba_headdim=16,
        n_mamba_heads=4,
        mamba_ngroups=1,
        mamba_d_state=8,
        num_mem_blocks=1,
    ),
}


@pytest.mark.parametrize(("kind", "layers"), [("jamba", 1), ("zamba2", 3)])
def test_layers_of_several_classes_are_the_layers(kind, layers):
    model = tiny.enlarged(AutoModelForCausalLM.from_config(MIXED[kind]()).float())
    assert layer_list(model.base_model) is model.base_model.layers
    freeze_below(model, layers)
    learning = {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {str(i) for i in range(4 - layers, 4)}
    actor = ActorCritic(model)
    samples = build.draw(actor)
    rows = (samples.prompt_ids, samples.prompt_mask, samples.completion_ids, samples.completion_mask)
    found = build.learner(actor).score(samples).logprobs
    torch.testing.assert_close(found, actor(*rows).logprobs.detach(), rtol=0, atol=1e-5)


def test_layers_that_share_parameters_with_those_below_are_refused():
    model = AutoModelForCausalLM.from_config(MIXED["zamba2"]())
    with pytest.raises(
        ConfigError,
        match="layers of Zamba2ForCausalLM share parameters with layers below.*use trainable_layers=3",
    ):
        freeze_below(model, 1)
    assert all(p.requires_grad for p in model.parameters())


def test_the_layers_of_a_nested_model_are_its_text_models():
    model = tiny.nested_gemma()
    assert layer_list(model.base_model) is model.base_model.language_model.layers
    freeze_below(model, 1)
    assert ActorCritic(model).frozen_layers == 1


@pytest.mark.parametrize(("learning", "frozen"), [([0], 0), ([0, 2], 0), ([1], 1), ([2], 2)])
def test_only_layers_below_the_first_that_learns_are_frozen(learning, frozen):
    model = tiny.model("gpt2", n_layer=3).requires_grad_(False)
    for place in learning:
        model.transformer.h[place].requires_grad_(True)
    assert frozen_layers(model.transformer) == frozen


def test_a_trunk_that_does_not_say_its_embeddings_has_no_frozen_layers():
    """The wrapper around BART's decoder raises."""
    config = BartConfig(vocab_size=64, d_model=32, decoder_layers=1, is_encoder_decoder=False)
    trunk = AutoModelForCausalLM.from_config(config).base_model
    assert input_embeddings(trunk) is None and frozen_layers(trunk) == 0


def test_an_adapter_says_itself_what_is_trained():
    model = get_peft_model(tiny.model("llama"), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="an adapter is trained here; give layers_to_transform"):
        freeze_below(model, 1)


def test_a_loaded_critic_leaves_the_policy_alone(tmp_path):
    """A critic's trunk that was trained whole says other things in its lower layers than the policy's do."""
    whole = ActorCritic(tiny.model("gpt2"), "separate")
    for p in whole.value.parameters():
        p.data.normal_(std=0.3)
    save_actor_critic(whole, tmp_path)
    actor = actor_of("gpt2", "separate")
    before = copy.deepcopy(actor.policy.state_dict())
    load_value_head(actor, tmp_path)
    assert all(torch.equal(x, before[name]) for name, x in actor.policy.state_dict().items())
    assert not actor.value.shares_frozen
    by = build.learner(actor)
    samples = build.draw(actor)
    rows = (samples.prompt_ids, samples.prompt_mask, samples.completion_ids, samples.completion_mask)
    torch.testing.assert_close(by.score(samples).values, whole(*rows).values.detach(), rtol=1e-4, atol=1e-4)


def test_what_learns_below_the_layers_is_not_frozen():
    model = tiny.model("gpt2")
    freeze_below(model, 1)
    model.transformer.wpe.weight.requires_grad_(True)
    assert ActorCritic(model).frozen_layers == 0
