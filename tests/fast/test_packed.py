"""Packed forward passes against their padded twin: the same scores and the same gradient."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hfpg.algorithms import CISPO, DAPO, GRPO, GSPO, PPO, RLOO, Reinforce, ReinforcePlusPlus
from hfpg.data import PromptData
from hfpg.fast import head
from hfpg.fast.packing import packed, packed_batches
from hfpg.generation.hf import HFGenerator
from hfpg.learner import Learner
from hfpg.models import ActorCritic, Reference
from hfpg.text_config import possible_windows
from hfpg.token_local import Slopes
from hfpg.types import Estimates, Samples, TokenLoss
from tests import build, tiny


PACKING = ("gpt2", "llama", "qwen2", "opt")
# in float64; Llama's and Qwen's norms compute in float32 whatever the model's dtype
EXACT = {"gpt2": 1e-9, "llama": 2e-7, "qwen2": 2e-7, "opt": 1e-9}


@pytest.fixture(autouse=True)
def even_if_dearer(monkeypatch):
    """In a model as narrow as these, attention is most of the work, and packing would seldom pay."""
    monkeypatch.setattr("hfpg.models.packed", functools.partial(packed, even_if_dearer=True))


def draw(actor: ActorCritic, per_prompt: int, fixed: bool = False) -> Samples:
    """Samples with K completions of each of a few prompts, ragged or all of one length."""
    data = PromptData(tiny.rows(4), tiny.tokenizer())
    prompts = data.rows(range(4), torch.arange(4 * per_prompt), per_prompt, "cpu")
    stop = dict(stop_token_ids=[]) if fixed else {}
    return HFGenerator(tiny.tokenizer(), seed=7, max_completion_length=10, **stop)(actor.policy, prompts)


def policy(kind: str, lora: bool, dtype: torch.dtype = torch.float64):
    model = tiny.model(kind).to(dtype)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    return model


def gradients(actor: ActorCritic) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in actor.parameters() if p.grad is not None])


@pytest.mark.parametrize("kind", PACKING)
@pytest.mark.parametrize("per_prompt", [1, 8])
@pytest.mark.parametrize("fixed", [False, True], ids=["ragged", "fixed"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_scores_and_gradient_are_those_of_padded_rows(kind, per_prompt, fixed, lora):
    actor = ActorCritic(policy(kind, lora), "shared")
    actor.value.double()
    actor.value.linear.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    assert actor.packs
    found = {}
    for packs in (True, False):
        mine = copy.deepcopy(actor)
        mine.packs = packs
        by = build.learner(mine, max_tokens_per_micro_batch=100)
        samples = draw(mine, per_prompt, fixed)
        rollout, credit = build.rollout_of(samples, by)
        metrics, _ = by.gradient(rollout, credit, PPO(entropy_coef=0.1).loss, "token_mean", with_entropy=True)
        found[packs] = rollout, metrics, gradients(mine)
    ours, theirs = found[True], found[False]
    for name in ("old_logprobs", "entropy", "values"):
        a, b = getattr(ours[0], name), getattr(theirs[0], name)
        torch.testing.assert_close(a, b, rtol=0, atol=10 * EXACT[kind])
    assert ours[1]["loss"] == pytest.approx(theirs[1]["loss"], rel=10 * EXACT[kind])
    assert (ours[2] - theirs[2]).norm() / theirs[2].norm() < EXACT[kind]


@pytest.mark.parametrize("kind", PACKING)
def test_single_precision_is_within_rounding(kind):
    actor = ActorCritic(policy(kind, lora=False, dtype=torch.float32), "separate")
    found = {}
    for packs in (True, False):
        mine = copy.deepcopy(actor)
        mine.packs = packs
        by = build.learner(mine, max_tokens_per_micro_batch=100, reference=True)
        rollout, credit = build.rollout_of(draw(mine, 4), by)
        by.gradient(rollout, credit, PPO().loss, "token_mean")
        found[packs] = rollout.ref_logprobs, gradients(mine)
    torch.testing.assert_close(found[True][0], found[False][0], rtol=0, atol=1e-5)
    assert (found[True][1] - found[False][1]).norm() / found[False][1].norm() < 1e-5


def test_eager_attention_adds_its_mask():
    model = tiny.model("llama")
    model.set_attn_implementation("eager")
    actor, plain = ActorCritic(model), ActorCritic(copy.deepcopy(model))
    plain.packs = False
    samples = draw(actor, 4)
    rows = (samples.prompt_ids, samples.prompt_mask, samples.completion_ids, samples.completion_mask)
    assert actor.packs and actor.layout(*rows).mask.dim() == 4
    torch.testing.assert_close(actor(*rows).logprobs, plain(*rows).logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["gemma2", "mistral", "lstm"])
def test_models_that_look_further_than_their_mask_are_not_packed(kind):
    assert not ActorCritic(tiny.model(kind)).packs


@pytest.mark.parametrize("level", ["text", "layer"])
def test_a_window_longer_than_the_probe_is_found_wherever_it_is_named(level):
    """Gemma 3 has its text model's window one level down; a layer may know of one that no configuration names."""
    if level == "text":
        model = tiny.nested_gemma(sliding_window=32)
        assert not hasattr(model.config, "sliding_window") and model.config.text_config.sliding_window == 32
    else:
        model = tiny.model("gpt2")
        model.transformer.h[0].attn.sliding_window = 32
    actor = ActorCritic(model)
    assert not actor.packs
    prompt, completions = torch.arange(60).repeat(4, 1) % 60 + 2, torch.arange(32).view(4, 8) + 2
    seen = [torch.ones_like(x, dtype=torch.bool) for x in (prompt, completions)]
    given = actor(prompt, seen[0], completions, seen[1]).logprobs
    logits = model(input_ids=torch.cat([prompt, completions], 1)).logits[:, 59:-1]
    plain = logits.log_softmax(-1).gather(2, completions[..., None])[..., 0]
    torch.testing.assert_close(given, plain, rtol=0, atol=1e-5)


def test_a_window_under_a_name_of_its_own_is_probed_at_its_own_length(monkeypatch):
    for module in ("probes", "text_config"):
        monkeypatch.setattr(f"hfpg.{module}.WINDOWS", ())
    assert possible_windows(tiny.model("mistral", sliding_window=30).config) == [30]
    assert not ActorCritic(tiny.model("mistral", sliding_window=30)).packs
    assert ActorCritic(tiny.model("mistral", sliding_window=600)).packs, "too long to be probed"


def test_a_window_that_the_configuration_does_not_name_is_found_by_the_probe(monkeypatch):
    model = tiny.model("gpt2")
    plain = model.base_model.forward

    def recurrent(*args, **kwargs):  # each position reads those before it in the row, but for padding on the left
        out, mask = plain(*args, **kwargs), kwargs["attention_mask"]
        read = out.last_hidden_state * mask[:, :, None] if mask.dim() == 2 else out.last_hidden_state
        out.last_hidden_state = out.last_hidden_state + 0.1 * read.cumsum(1)
        return out

    monkeypatch.setattr(model.base_model, "forward", recurrent)
    assert not ActorCritic(model).packs


def test_the_exact_kl_of_packed_rows():
    start = tiny.model("llama").double()
    other = ActorCritic(tiny.model("llama", seed=1).double())
    found = []
    for packs in (True, False):
        actor = ActorCritic(copy.deepcopy(start))
        actor.packs = packs
        samples = draw(actor, 4)
        rows = (samples.prompt_ids, samples.prompt_mask, samples.completion_ids, samples.completion_mask)
        found.append(actor(*rows, reference=Reference(actor, other.policy)).kl)
    assert found[0].abs().sum() > 0
    torch.testing.assert_close(*found, rtol=1e-8, atol=1e-10)


# ── micro-batches


def test_packed_batches_cover_every_row_and_keep_prompts_together():
    prompt, completion = torch.tensor([9, 9, 9, 3, 3, 3, 50]), torch.tensor([5, 1, 8, 2, 2, 7, 60])
    groups = torch.tensor([4, 4, 4, 2, 2, 2, 9])
    found = packed_batches(prompt, completion, groups, 64, 40)
    assert sorted(torch.cat(found).tolist()) == list(range(7))
    assert [sorted(batch.tolist()) for batch in found] == [[6], [0, 1, 2, 3, 4, 5]], "the largest first"
    assert packed_batches(*(x[:0] for x in (prompt, completion, groups)), 64, 40) == []


@pytest.mark.parametrize(
    ("prompt", "completion", "count"), [(200, 48, 8), (1000, 100, 16), (16, 48, 4), (10, 2000, 4)]
)
def test_the_memory_knob_holds_and_long_prompts_are_shared(prompt, completion, count):
    """Rows of two prompts, at a budget of 4096 positions; layouts alone, as the model would choose them."""
    rows = 2 * count
    groups = torch.arange(rows) // count
    samples = Samples(
        prompt_ids=groups[:, None].expand(-1, prompt) + 1,
        prompt_mask=torch.ones(rows, prompt, dtype=torch.bool),
        completion_ids=torch.ones(rows, completion, dtype=torch.long),
        completion_mask=torch.ones(rows, completion, dtype=torch.bool),
        finished=torch.ones(rows, dtype=torch.bool),
        sample_ids=torch.arange(rows),
        group_ids=groups,
    )
    actor = ActorCritic(tiny.model("llama"))
    actor.hidden_size, budget = 768, 4096
    by = build.learner(actor)
    batches = by.micro_batches(samples, budget)
    assert sorted(torch.cat(batches).tolist()) == list(range(rows))
    used = []
    for batch in batches:
        part = samples.take(batch)
        given = (part.prompt_ids, part.prompt_mask, part.completion_ids, part.completion_mask)
        found = packed(*given, 768)
        used.append(len(batch) * (prompt + completion) if found is None else found.ids.numel())
        assert used[-1] <= 1.1 * budget or len(batch) == 1
    if prompt >= completion:
        assert sum(used) < 0.6 * rows * (prompt + completion), "prompts are shared"


def test_micro_batches_are_of_even_size():
    """Two of 600 positions rather than one of 1000 and one of 200: less memory, and products of one shape."""
    rows = torch.arange(60)
    prompt, completion = torch.full((60,), 10), torch.full((60,), 10)
    found = packed_batches(prompt, completion, rows, 256, 1000)
    assert [len(batch) for batch in found] == [30, 30]


def test_one_minibatch_has_the_same_micro_batches_in_every_epoch(monkeypatch):
    actor = ActorCritic(tiny.model())
    by = build.learner(actor, max_tokens_per_micro_batch=40)
    seen: list[list[int]] = []
    plain = Learner.micro_batches
    look = lambda self, rows, size: seen.append(rows.sample_ids.tolist()) or plain(self, rows, size)  # noqa: E731
    rollout, credit = build.rollout_of(draw(actor, 4), by)
    monkeypatch.setattr(Learner, "micro_batches", look)
    by.optimize(rollout, credit, GRPO().loss, aggregation="token_mean", epochs=3)
    assert len(seen) == 3 and seen[0] == seen[1] == seen[2]
    seen.clear()
    by.optimize(rollout, credit, GRPO().loss, aggregation="token_mean", epochs=2, minibatches=2)
    assert len(seen) == 4 and seen[0] != seen[2], "dealt anew"


# ── the gradient of the head, in one pass


ONE_PASS = [
    Reinforce(entropy_coef=0.02),
    PPO(),
    PPO(value="separate", value_clip_range=0.2, entropy_coef=0.01),
    GRPO(kl_coef=0.1),
    GRPO(objective="cispo", is_cap=5.0, kl_coef=0.0),
    DAPO(),
]


@pytest.mark.parametrize("algorithm", ONE_PASS, ids=lambda a: f"{type(a).__name__}-{a.value}-{a.entropy_coef}")
def test_one_pass_gives_the_gradient_of_two(algorithm, monkeypatch):
    actor = ActorCritic(tiny.model().double(), value=algorithm.value)
    by = build.learner(actor, reference=True)
    rollout, credit = build.rollout_of(draw(actor, 4), by)
    rollout = dataclasses.replace(
        rollout, old_logprobs=rollout.old_logprobs - 0.3 * torch.rand(rollout.scores.shape)[:, None]
    )
    if algorithm.value:
        credit = Estimates(credit.advantages, credit.advantages + 1)
    assert algorithm.schedule(algorithm.init())["token_local"]
    calls: list[slice] = []
    plain = Slopes.__call__
    monkeypatch.setattr(Slopes, "__call__", lambda self, chunk, *a: calls.append(chunk) or plain(self, chunk, *a))
    monkeypatch.setattr(head, "KEPT_BYTES", 0)
    monkeypatch.setattr(head, "FEWEST_TOKENS", 1)
    monkeypatch.setattr(head, "CHUNK_BYTES", 5 * 8 * actor.vocabulary)
    found = []
    for token_local in (False, True):
        actor.zero_grad()
        metrics = by.gradient(
            rollout,
            credit,
            algorithm.loss,
            algorithm.aggregation,
            algorithm.entropy_coef != 0,
            token_local=token_local,
        )
        found.append((gradients(actor), metrics))
        assert bool(calls) == token_local
    assert (found[0][0] - found[1][0]).norm() / found[0][0].norm() < 1e-12
    assert found[0][1] == found[1][1]


def test_losses_that_look_at_other_tokens_do_not_say_token_local(monkeypatch):
    class Own(Reinforce):
        def loss(self, new, rows, credit, state=None):
            return TokenLoss(-credit.advantages * new.logprobs.sum(1, keepdim=True) ** 2, {})

    for algorithm in (GSPO(), GRPO(kl_estimator="full"), GRPO(kl_estimator="k2_sequence"), Own()):
        assert not algorithm.schedule(algorithm.init())["token_local"]
    actor = ActorCritic(tiny.model())
    by = build.learner(actor)
    rollout, credit = build.rollout_of(draw(actor, 4), by)
    rollout = dataclasses.replace(rollout, old_logprobs=rollout.old_logprobs - 0.5)  # the policy has moved
    monkeypatch.setattr(head, "KEPT_BYTES", 0)
    with pytest.raises(ValueError, match="the loss is not token_local"):
        by.gradient(rollout, credit, Own().loss, "token_mean", token_local=True)


@pytest.mark.parametrize("estimator", ["k2_sequence", "k2", "k3"])
@pytest.mark.parametrize("kind", [GRPO, CISPO, PPO, RLOO, Reinforce, ReinforcePlusPlus])
def test_every_kl_in_the_loss_gets_its_gradient_after_the_policy_has_moved(kind, estimator, monkeypatch):
    """As an update asks for it; a derivative made of the old policy's other tokens would be another one."""
    algorithm = kind(kl_in="loss", kl_estimator=estimator, kl_coef=0.5)
    actor = ActorCritic(tiny.model().double(), value=algorithm.value)
    by = build.learner(actor, reference=True)
    rollout, credit = build.rollout_of(draw(actor, 4), by)
    away = torch.rand(rollout.old_logprobs.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moved = {"old_logprobs": rollout.old_logprobs - 1e-4 * away, "ref_logprobs": rollout.ref_logprobs - 0.3 * away}
    rollout = dataclasses.replace(rollout, **moved)
    for name, value in (("KEPT_BYTES", 0), ("FEWEST_TOKENS", 1), ("CHUNK_BYTES", 5 * 8 * actor.vocabulary)):
        monkeypatch.setattr(head, name, value)
    found = []
    for token_local in (False, algorithm.schedule(algorithm.init())["token_local"]):
        actor.zero_grad()
        by.gradient(rollout, credit, algorithm.loss, algorithm.aggregation, token_local=token_local)
        found.append(gradients(actor))
    assert (found[0] - found[1]).norm() / found[0].norm() < 1e-12


@pytest.mark.parametrize("estimator", ["k2_sequence", "k2", "k3"])
def test_a_derivative_of_rounding_alone_is_no_error(estimator, monkeypatch):
    """The first update from the reference with equal scores: all that is left is a KL of some 1e-7."""
    algorithm = RLOO(kl_in="loss", kl_estimator=estimator, kl_coef=0.1)
    actor = ActorCritic(tiny.model())
    by = build.learner(actor, reference=True)
    rollout, credit = build.rollout_of(draw(actor, 4), by)
    noise = torch.Generator().manual_seed(0)
    rounded = lambda x: x * (1 + 1.2e-7 * torch.randint(-1, 2, x.shape, generator=noise))  # noqa: E731
    names = ("old_logprobs", "ref_logprobs")
    rollout = dataclasses.replace(rollout, **{name: rounded(rollout.old_logprobs) for name in names})
    for name, value in (("KEPT_BYTES", 0), ("FEWEST_TOKENS", 1), ("CHUNK_BYTES", 5 * 4 * actor.vocabulary)):
        monkeypatch.setattr(head, name, value)
    credit, token_local = Estimates(0 * credit.advantages), algorithm.schedule(algorithm.init())["token_local"]
    by.gradient(rollout, credit, algorithm.loss, "sequence_sum", token_local=token_local)
    assert 0 < gradients(actor).norm() < 1e-5


# ── rows that add nothing


@pytest.mark.parametrize(
    "algorithm",
    [Reinforce(kl_coef=0.0), GRPO(kl_coef=0.0, num_generations=4), GRPO(kl_in="reward", kl_estimator="k1")],
    ids=["reinforce", "grpo", "kl in the reward"],
)
def test_rows_without_advantage_are_left_out_exactly(algorithm):
    actor = ActorCritic(tiny.model().double())
    by = build.learner(actor)
    rollout, credit = build.rollout_of(draw(actor, 4), by)
    credit.advantages[:12] = 0
    state = algorithm.init()
    skips = algorithm.schedule(state)["skip_zero"]
    assert skips
    seen: list[int] = []
    look = lambda module, args, kwargs: seen.append(kwargs["position_ids"].numel())  # noqa: E731
    actor.policy.transformer.register_forward_pre_hook(look, with_kwargs=True)
    found = []
    for skip in (True, False):
        actor.zero_grad()
        seen.clear()
        by.gradient(rollout, credit, algorithm.loss, algorithm.aggregation, skip_zero=skip)
        found.append((gradients(actor), sum(seen)))
    assert (found[0][0] - found[1][0]).norm() / found[1][0].norm() < 1e-12
    assert found[0][1] < 0.5 * found[1][1]


@pytest.mark.parametrize(
    "algorithm",
    [PPO(), GRPO(), GRPO(kl_coef=0.0, entropy_coef=0.01), GRPO(kl_coef=0.0, max_kl=0.1)],
    ids=["values", "kl in the loss", "entropy", "kl stop"],
)
def test_rows_without_advantage_stay_where_they_add_something(algorithm):
    assert not algorithm.schedule(algorithm.init())["skip_zero"]


def test_a_loss_of_ones_own_sees_every_row():
    class Louder(Reinforce):
        def loss(self, new, rows, credit, state=None):
            return TokenLoss(-0.1 * new.logprobs, {})

    assert not Louder(kl_coef=0.0).schedule(Louder(kl_coef=0.0).init())["skip_zero"]
