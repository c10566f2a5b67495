"""ActorCritic on real architectures: what is refused, dropout, value heads, the reference, saving."""

import copy

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertLMHeadModel,
    ElectraConfig,
    Llama4TextConfig,
    RecurrentGemmaConfig,
    ReformerConfig,
    ReformerModelWithLMHead,
    RemBertConfig,
    RwkvConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from hfpg.config import ConfigError
from hfpg.models import ActorCritic, Reference
from hfpg.ops.logprobs import pack_bits
from hfpg.ops.masked import extent
from hfpg.pretrained import load_policy
from hfpg.probes import fuse_norms
from hfpg.saving import load_actor_critic, save_actor_critic
from tests import build, tiny


LORA = dict(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", lora_dropout=0.5)
INPUTS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")


def inputs(samples):
    return {name: getattr(samples, name) for name in INPUTS}


# ── refusals


def test_a_bidirectional_model_is_refused_by_name():
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(ConfigError, match="BertLMHeadModel is not causal: changing the last token moves"):
        ActorCritic(load_policy(BertLMHeadModel(config)))
    assert ActorCritic(BertLMHeadModel(BertConfig(**(config.to_dict() | {"is_decoder": True})))) is not None


def test_a_model_that_gives_nan_is_not_called_bidirectional():
    """Gemma 2 computes its softmax in float32: the mask's −1.8e308 is −inf there, a padded row all −inf, and NaN."""
    with pytest.raises(
        ConfigError, match="Gemma2ForCausalLM gives NaN on a left-padded batch in torch.float64; load it in another"
    ):
        ActorCritic(tiny.model("gemma2").double())


SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
READS_PADDING = [
    RwkvConfig(vocab_size=64, hidden_size=32, attention_hidden_size=32, num_hidden_layers=2),
    RecurrentGemmaConfig(**(SMALL | dict(num_hidden_layers=3, num_key_value_heads=1, lru_width=32, head_dim=16))),
    Llama4TextConfig(**SMALL, num_key_value_heads=1, head_dim=16, no_rope_layers=[1, 0], floor_scale=4),
    BartConfig(vocab_size=64, d_model=32, decoder_layers=1, decoder_attention_heads=2, is_encoder_decoder=False),
]


@pytest.mark.parametrize("config", READS_PADDING, ids=lambda config: config.model_type)
def test_models_that_read_left_padding_are_refused(config):
    """A state that runs over the padding, or a position that counts it: the row would depend on its neighbours."""
    torch.manual_seed(0)
    model = tiny.enlarged(AutoModelForCausalLM.from_config(config).float())
    with pytest.raises(
        ConfigError, match=f"{type(model).__name__} reads the padding on the left of a prompt.*, such as 'gpt2'"
    ):
        ActorCritic(model)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_rounding_in_half_precision_is_no_padding_that_is_read(kind):
    model = tiny.model(kind).bfloat16()
    assert ActorCritic(model) is not None


def test_a_model_without_a_gradient_in_eval_mode_is_refused():
    settings = dict(attn_layers=["local", "local"], axial_pos_embds=False, max_position_embeddings=128)
    sizes = dict(vocab_size=64, hidden_size=32, attention_head_size=16, num_attention_heads=2, feed_forward_size=64)
    model = ReformerModelWithLMHead(ReformerConfig(**settings, **sizes, is_decoder=True))
    with pytest.raises(ConfigError, match="ReformerModelWithLMHead gives no gradient in eval mode"):
        ActorCritic(model)


def test_encoder_decoders_are_refused_by_name(tmp_path):
    small = dict(d_model=16, num_layers=1, num_heads=1, d_kv=4, d_ff=8, vocab_size=64)
    with pytest.raises(ConfigError, match=r"T5ForConditionalGeneration \(t5\) is an encoder–decoder"):
        load_policy(T5ForConditionalGeneration(T5Config(**small)))
    bart = BartConfig(
        vocab_size=64,
        d_model=16,
        max_position_embeddings=32,
        **{
            f"{side}_{part}": 1 for side in ("encoder", "decoder") for part in ("layers", "attention_heads", "ffn_dim")
        },
    )
    BartForConditionalGeneration(bart).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"\(bart\) is an encoder–decoder, not a causal LM"):
        load_policy(str(tmp_path))


def test_a_model_that_does_not_exist_is_one_sentence():
    with pytest.raises(ConfigError, match="cannot load the model 'no/such-model'.*hf auth login"):
        load_policy("no/such-model")


def test_peft_that_does_not_fit_names_the_modules_there_are():
    with pytest.raises(ConfigError, match="its linear modules are"):
        load_policy(tiny.model("llama"), peft_config=LoraConfig(target_modules=["no_such_module"]))


def test_prompt_learning_and_a_second_adapter_are_refused():
    prompt_tuning = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ConfigError, match="PROMPT_TUNING is not supported"):
        load_policy(tiny.model(), peft_config=prompt_tuning)
    with pytest.raises(ConfigError, match="already has an adapter"):
        load_policy(get_peft_model(tiny.model(), LoraConfig(**LORA)), peft_config=LoraConfig(**LORA))


# ── the forward pass


@pytest.mark.parametrize(
    ("kind", "dropout"),
    [("gpt2", dict(attn_pdrop=0.4, resid_pdrop=0.4, embd_pdrop=0.4)), ("llama", dict(attention_dropout=0.4))],
)
def test_dropout_is_off_in_training_functional_dropout_included(kind, dropout):
    model = tiny.model(kind, **dropout).train()
    actor = ActorCritic(get_peft_model(model, LoraConfig(**LORA)) if kind == "gpt2" else model, "separate").train()
    samples = build.draw(actor)
    first, second = actor(**inputs(samples)), actor(**inputs(samples))
    assert torch.equal(first.logprobs, second.logprobs) and torch.equal(first.values, second.values)
    assert first.logprobs.requires_grad


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
@pytest.mark.parametrize("value", ["shared", "separate"])
def test_value_heads_start_at_zero_read_what_the_lm_head_reads_and_learn(kind, value):
    actor = ActorCritic(tiny.model(kind), value)
    samples = build.draw(actor)
    head = actor.policy.get_output_embeddings()
    assert actor.value.linear.in_features == head.weight.shape[1]
    values = actor(**inputs(samples)).values
    assert (values == 0).all()
    actor.value.linear.weight.data.normal_()
    values = actor(**inputs(samples)).values
    assert (values != 0).sum() > 20 and (values[~samples.completion_mask] == 0).all()
    values.sum().backward()
    reached = [p.grad is not None and bool(p.grad.any()) for p in actor.policy.parameters()]
    assert any(reached) == (value == "shared"), "a separate trunk keeps the policy out of the value's gradient"


WIDER = [  # the LM head reads another width than the trunk gives
    ElectraConfig(**SMALL, embedding_size=16, is_decoder=True),
    RemBertConfig(**SMALL, input_embedding_size=24, output_embedding_size=48, is_decoder=True),
]


@pytest.mark.parametrize("config", WIDER, ids=lambda config: config.model_type)
@pytest.mark.parametrize("value", ["shared", "separate"])
def test_value_heads_have_the_width_of_what_they_read(config, value):
    actor = ActorCritic(tiny.enlarged(AutoModelForCausalLM.from_config(config)), value)
    actor.value.linear.weight.data.normal_()
    scored = actor(**inputs(build.draw(actor)), with_last_values=True)
    assert (scored.values != 0).any() and (scored.last_values != 0).all()
    (scored.logprobs.sum() + scored.values.sum()).backward()


def test_value_belongs_to_the_state_before_the_token():
    """V(s_t) must not move when token t does, and must move for t + 1."""
    actor = ActorCritic(tiny.model(), "shared")
    actor.value.linear.weight.data.normal_()
    samples = build.draw(actor, stop_token_ids=[])
    changed = samples.completion_ids.clone()
    changed[:, 4] = (changed[:, 4] + 1) % tiny.VOCABULARY
    before = actor(**inputs(samples)).values
    after = actor(**(inputs(samples) | {"completion_ids": changed})).values
    assert torch.equal(before[:, :5], after[:, :5]) and (before[:, 5] != after[:, 5]).all()


def test_float64_stays_float64():
    model = tiny.model().double()
    scored = ActorCritic(model, "shared")(**inputs(build.draw(ActorCritic(model))), with_entropy=True)
    assert scored.logprobs.dtype == scored.values.dtype == scored.entropy.dtype == torch.float64


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_both_ways_to_the_logits_agree_in_value_and_gradient(kind, monkeypatch):
    """The chunked head against the model's own forward, with several chunks and row groups."""
    samples = build.draw(ActorCritic(tiny.model(kind)))
    results = []
    for elements in (1 << 22, 5 * tiny.VOCABULARY, 1):
        monkeypatch.setattr("hfpg.ops.logprobs.CHUNK_ELEMENTS", elements)
        for chunked in {True, False} if kind == "gpt2" else {False}:
            model = tiny.model(kind)
            actor = ActorCritic(model, "shared")
            actor.chunked_head = chunked
            scored = actor(**inputs(samples), temperature=0.7, with_entropy=True)
            (scored.logprobs.sum() + scored.entropy.sum() + scored.values.sum()).backward()
            grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
            results.append((scored.logprobs.detach(), scored.entropy.detach(), grads))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_a_soft_cap_is_seen_while_the_logits_are_small():
    """At 30 it moves a fresh model's logits by less than rounding, and a trained one's by nats."""
    model = tiny.model("gemma2", final_logit_softcapping=30.0)
    model.lm_head.weight = torch.nn.Parameter(0.05 * model.lm_head.weight)
    actor = ActorCritic(model)
    samples = build.draw(actor, stop_token_ids=[])
    assert not actor.chunked_head and model(samples.completion_ids).logits.abs().max() < 0.5
    with torch.no_grad():
        model.lm_head.weight.mul_(1000)
    given = inputs(samples)
    logits = actor._model_logits(actor._inputs(actor.layout(**given)), samples.completion_ids.shape[1])
    plain = logits.log_softmax(-1).gather(2, samples.completion_ids[..., None])[..., 0]
    assert logits.abs().max() > 25
    torch.testing.assert_close(actor(**given).logprobs, plain * samples.completion_mask, rtol=1e-4, atol=1e-4)


def test_a_head_without_a_cap_is_computed_in_chunks_however_small_its_logits():
    model = tiny.model("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(1e-4)
    assert ActorCritic(model).chunked_head


# ── what is read: gaps, and the state after the last token


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
@pytest.mark.parametrize("value", ["shared", "separate"])
def test_the_last_value_is_that_of_one_more_token(kind, value):
    """V after the last chosen token = V(s_t) of a token that came next; without any token, V of the prompt."""
    actor = ActorCritic(tiny.model(kind), value)
    actor.value.linear.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    given = inputs(build.draw(actor))
    rows, columns = torch.arange(12), torch.arange(10)
    given["completion_mask"] = given["completion_mask"] & (columns < rows[:, None])  # row 0: nothing was chosen
    end = extent(given["completion_mask"])
    assert len(set(end.tolist())) > 5 and actor(**given).last_values is None
    longer = {n: torch.nn.functional.pad(x, (0, 1)) if n.startswith("completion") else x for n, x in given.items()}
    longer["completion_ids"][rows, end] = 5
    longer["completion_mask"][rows, end] = True
    found = actor(**given, with_last_values=True).last_values
    torch.testing.assert_close(found, actor(**longer).values[rows, end], rtol=1e-4, atol=1e-5)
    assert len(found.unique()) == len(found)


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_a_gap_is_read_but_not_chosen(kind):
    """A token outside the mask with chosen ones after it, such as a tool's answer, was in the sequence."""
    actor = ActorCritic(tiny.model(kind), "shared")
    actor.value.linear.weight.data.normal_()
    given = inputs(build.draw(actor, stop_token_ids=[]))
    mask = given["completion_mask"].clone()
    mask[:, 2:4], mask[::2, 7:] = False, False
    whole = actor(**given, with_entropy=True)
    gaps = actor(**(given | {"completion_mask": mask}), with_entropy=True)
    for name in ("logprobs", "entropy", "values"):
        expected = torch.where(mask, getattr(whole, name), 0)
        torch.testing.assert_close(getattr(gaps, name), expected, rtol=1e-4, atol=1e-5)
    other = given["completion_ids"].clone()
    other[:, 2] = (other[:, 2] + 1) % tiny.VOCABULARY
    moved = actor(**(given | {"completion_mask": mask, "completion_ids": other})).logprobs - gaps.logprobs
    assert (moved[:, :2] == 0).all() and (moved[:, 4:7] != 0).any(1).all()


# ── the exact KL


def precise(kind):
    """float64, and tolerances; Gemma 2 has its softmax in float32, which makes NaN of a padded row in float64."""
    return (
        (tiny.model(kind), dict(rtol=1e-3, atol=2e-4))
        if kind == "gemma2"
        else (tiny.model(kind).double(), dict(rtol=1e-8, atol=1e-10))
    )


def all_logits(actor, given):
    """[B, C, V] of given completions by the definition: one plain forward, positions over real tokens."""
    mask = torch.cat([given["prompt_mask"], given["completion_mask"]], 1).long()
    ids = torch.cat([given["prompt_ids"], given["completion_ids"]], 1)
    positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if actor.takes_positions else {}
    logits = actor.policy(input_ids=ids, attention_mask=mask, **positions).logits
    return logits[:, given["prompt_ids"].shape[1] - 1 : -1]


def plain_kl(actor, other, given, temperature, kept, reverse):
    """Σ_v p (log p − log q), written out."""
    with torch.no_grad():
        theirs = all_logits(other, given) / temperature
    ours = all_logits(actor, given) / temperature
    p, q = (x.masked_fill(~kept, -1e30).log_softmax(-1) for x in ((theirs, ours) if reverse else (ours, theirs)))
    return (p.exp() * (p - q)).sum(-1) * given["completion_mask"]


def moved(actor, size=0.02):
    """The same actor with other weights."""
    other = copy.deepcopy(actor)
    with torch.no_grad():
        for i, parameter in enumerate(other.parameters()):
            parameter.add_(size * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return other


@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("elements", [1 << 22, 6 * tiny.VOCABULARY])
def test_the_kl_is_exact_in_value_and_gradient(kind, reverse, elements, monkeypatch):
    """Chunked head and the model's own forward (Gemma 2), whole and recomputed, under temperature and top-k."""
    monkeypatch.setattr("hfpg.ops.logprobs.CHUNK_ELEMENTS", elements)
    model, close = precise(kind)
    actor = ActorCritic(model)
    other = moved(actor)
    given = inputs(build.draw(actor))
    shape = (*given["completion_ids"].shape, tiny.VOCABULARY)
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    kept.scatter_(2, given["completion_ids"][..., None], True)
    settings = dict(temperature=0.8, kept=pack_bits(kept), reverse=reverse)
    found = actor(**given, **settings, reference=other)
    expected = plain_kl(actor, other, given, 0.8, kept, reverse)
    assert expected.sum() > 1e-3
    torch.testing.assert_close(found.kl, expected, **close)
    torch.testing.assert_close(found.logprobs, actor(**given, temperature=0.8, kept=settings["kept"]).logprobs)
    slope = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected.dtype)
    parameters = list(actor.policy.parameters())
    ours, theirs = (torch.autograd.grad((slope * x).sum(), parameters) for x in (found.kl, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **close)
    assert all(p.grad is None for p in other.parameters())


@pytest.mark.parametrize("kind", ["gpt2", "gemma2", "lstm"])
@pytest.mark.parametrize("elements", [1 << 22, 6 * tiny.VOCABULARY])
def test_the_kl_to_the_reference_that_is_the_policy_without_its_adapter(kind, elements, monkeypatch):
    """Only the reference's own passes have the adapter off: not the policy's, nor its recomputation in backward."""
    monkeypatch.setattr("hfpg.ops.logprobs.CHUNK_ELEMENTS", elements)
    modules = {"gpt2": ["c_attn"], "gemma2": ["q_proj", "v_proj"], "lstm": ["lm_head"]}[kind]
    base, close = precise(kind)
    plain = ActorCritic(copy.deepcopy(base))
    lora = LoraConfig(r=2, target_modules=modules, task_type="CAUSAL_LM")
    actor = ActorCritic(load_policy(base, peft_config=lora))
    reference = Reference(actor)
    assert reference.adapter_off
    with torch.no_grad():
        for name, parameter in actor.policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    actor.policy.to(next(base.parameters()).dtype)
    given = inputs(build.draw(plain))
    before = actor(**given).logprobs.detach()
    trained = [p for p in actor.parameters() if p.requires_grad]
    for reverse in (False, True):
        found, expected = (actor(**given, reference=r, reverse=reverse).kl for r in (reference, plain))
        assert expected.sum() > 1e-3
        torch.testing.assert_close(found, expected, **close)
        gradients = [torch.autograd.grad((x**2).sum(), trained) for x in (found, expected)]
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b, **close)
        assert any(g.any() for g in gradients[0])
    assert torch.equal(actor(**given).logprobs, before)
    assert [p for p in actor.parameters() if p.requires_grad] == trained


# ── the reference


def test_reference_is_the_model_as_it_was_passed():
    actor = ActorCritic(tiny.model())
    samples = build.draw(actor)
    reference = Reference(actor)
    start = actor(**inputs(samples)).logprobs.detach()
    assert not reference.adapter_off and torch.equal(reference.logprobs(**inputs(samples)), start)
    with torch.no_grad():
        next(actor.policy.parameters()).add_(0.3)
    assert torch.equal(reference.logprobs(**inputs(samples)), start)
    assert not torch.equal(actor(**inputs(samples)).logprobs, start)


def test_a_fresh_adapter_needs_no_second_model():
    base = tiny.model()
    samples = build.draw(ActorCritic(copy.deepcopy(base)))
    start = ActorCritic(copy.deepcopy(base))(**inputs(samples)).logprobs.detach()
    actor = ActorCritic(load_policy(base, peft_config=LoraConfig(**LORA)))
    reference = Reference(actor)
    assert reference.adapter_off
    with torch.no_grad():
        for name, parameter in actor.policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    assert torch.equal(reference.logprobs(**inputs(samples)), start)
    assert not torch.equal(actor(**inputs(samples)).logprobs, start)


def test_a_trained_adapter_is_its_own_reference():
    """KL at step 0 is 0 also for a PeftModel that has been tuned before: adapters off would be another model."""
    peft = get_peft_model(tiny.model(), LoraConfig(**LORA, init_lora_weights=False))
    actor = ActorCritic(load_policy(peft))
    samples = build.draw(actor)
    reference = Reference(actor)
    assert not reference.adapter_off
    assert torch.equal(reference.logprobs(**inputs(samples)), actor(**inputs(samples)).logprobs)


def test_a_reference_of_another_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="ref_model has 70 tokens and the policy 64"):
        Reference(ActorCritic(tiny.model()), tiny.model(vocabulary=70))


# ── saving


@pytest.mark.parametrize("value", [None, "shared", "separate"])
def test_save_and_load(value, tmp_path):
    actor = ActorCritic(tiny.model(), value)
    if value:
        actor.value.linear.weight.data.normal_()
    save_actor_critic(actor, tmp_path)
    samples = build.draw(actor)
    again = load_actor_critic(tmp_path)
    assert again.value_kind == value
    ours, theirs = actor(**inputs(samples)), again(**inputs(samples))
    near = dict(rtol=1e-5, atol=1e-5)  # MKL rounds by where in memory a matrix begins
    torch.testing.assert_close(ours.logprobs, theirs.logprobs, **near)
    if value:
        torch.testing.assert_close(ours.values, theirs.values, **near)
    plain, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), actor.policy.parameters(), strict=True))


def test_an_adapter_is_saved_and_loaded_as_an_adapter(tmp_path):
    tiny.model().save_pretrained(tmp_path / "base")
    actor = ActorCritic(load_policy(str(tmp_path / "base"), peft_config=LoraConfig(**LORA)), "shared")
    with torch.no_grad():
        for parameter in actor.policy.parameters():
            if parameter.requires_grad:
                parameter.normal_()
        actor.value.linear.weight.normal_()
    save_actor_critic(actor, tmp_path / "tuned")
    assert not (tmp_path / "tuned" / "model.safetensors").exists()
    again = load_actor_critic(tmp_path / "tuned")
    samples = build.draw(actor)
    assert torch.equal(actor(**inputs(samples)).logprobs, again(**inputs(samples)).logprobs)
    assert torch.equal(actor(**inputs(samples)).values, again(**inputs(samples)).values)
    trained = {n for n, p in again.policy.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral"])
def test_norms_as_torchs_own_are_the_same_function(kind: str):
    plain = tiny.model(kind)
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    fused = copy.deepcopy(plain)
    fuse_norms(fused)
    assert sum(type(m) is torch.nn.RMSNorm for m in fused.modules()) == 5, "two a layer, and the last"
    ids = torch.arange(24).view(2, 12) % tiny.VOCABULARY
    outputs = [model(ids).logits for model in (plain, fused)]
    torch.testing.assert_close(*outputs, atol=1e-6, rtol=0)
    for out in outputs:
        out.square().sum().backward()
    named = [dict(model.named_parameters()) for model in (plain, fused)]
    assert list(named[0]) == list(named[1])
    for name, parameter in named[0].items():
        close_to = 1e-5 * float(parameter.grad.abs().max())
        torch.testing.assert_close(named[1][name].grad, parameter.grad, atol=close_to, rtol=0)


def test_norms_that_are_something_else_stay():
    """Gemma's scale by 1 + w; half precision rounds elsewhere; somebody may have put in a forward of their own."""
    other = tiny.model("llama")
    for layer in other.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.forward = norm.forward

    heard = tiny.model("llama")
    heard.model.norm.register_forward_hook(lambda *_: None)
    counts = {}
    for name, model in {
        "gemma2": tiny.model("gemma2"),
        "half": tiny.model("llama").bfloat16(),
        "double": tiny.model("llama").double(),
        "replaced": other,
        "heard": heard,
    }.items():
        fuse_norms(model)
        counts[name] = sum(type(m) is torch.nn.RMSNorm for m in model.modules())
    assert counts == {"gemma2": 0, "half": 0, "double": 0, "replaced": 1, "heard": 4}
