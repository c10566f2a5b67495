"""What only a GPU can show. Run by hand: `ACCELERATE_USE_CPU=false python -m pytest -m gpu tests/gpu`."""

from __future__ import annotations

import copy
import functools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model

from hfpg import TrainConfig
from hfpg.algorithms import GRPO, PPO, RLOO
from hfpg.data import PromptData
from hfpg.fast.head import head_scores
from hfpg.fast.kernels import use_liger
from hfpg.fast.packing import packed
from hfpg.generation.graphs import ReplayedDecoding, record
from hfpg.generation.hf import HFGenerator
from hfpg.learner import Learner
from hfpg.models import ActorCritic, Reference
from hfpg.types import Rollout, Samples
from tests import build, tiny


pytestmark = pytest.mark.gpu
KINDS = ("gpt2", "llama", "qwen2", "opt")
GPU = "cuda"


@pytest.fixture
def recordings(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every step that was recorded."""
    made: list[int] = []
    plain = ReplayedDecoding._recorded

    def counted(self: ReplayedDecoding) -> Any:
        advance = plain(self)
        assert advance is not None, "recording must not have failed"
        made.append(len(self.tokens))
        return advance

    monkeypatch.setattr(ReplayedDecoding, "_recorded", counted)
    return made


def draw(policy: Any, own_loop: bool = True, per_prompt: int = 4, length: int = 40, **options: Any) -> Samples:
    """Ragged samples of a model on the GPU."""
    data = PromptData(tiny.rows(12), tiny.tokenizer())
    prompts = data.rows(range(12), torch.arange(12 * per_prompt), per_prompt, GPU)
    generator = HFGenerator(tiny.tokenizer(), seed=7, max_completion_length=length, **options)
    generator.own_loop = own_loop
    return generator(policy, prompts)


def assert_same(ours: Samples, theirs: Samples) -> None:
    for name in ("completion_ids", "completion_mask", "finished", "kept"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None) and (a is None or torch.equal(a, b)), name
    for name in ("sampler_logprobs", "sampler_entropy", "sampler_values"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=2e-5, rtol=0)


# ── recorded steps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_prompt", [1, 8])
def test_replayed_steps_draw_what_the_stock_loop_draws(recordings, kind: str, per_prompt: int):
    model = tiny.model(kind).to(GPU)
    samples = draw(model, per_prompt=per_prompt)
    assert recordings and samples.finished.any()
    assert_same(samples, draw(model, own_loop=False, per_prompt=per_prompt))


@pytest.mark.parametrize("law", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8, "temperature": 1.4}])
def test_kept_sets_are_recorded_too(recordings, law: dict[str, Any]):
    model = tiny.model("llama").to(GPU)
    assert_same(draw(model, **law), draw(model, own_loop=False, **law))
    assert recordings


def test_values_are_recorded_too(recordings):
    actor = ActorCritic(tiny.model("llama"), "shared").to(GPU)
    torch.nn.init.normal_(actor.value.linear.weight)
    samples = draw(actor.policy, value_head=actor.value)
    assert recordings and samples.sampler_values is not None
    with torch.no_grad():
        scored = actor(*columns(samples), with_entropy=True)
    torch.testing.assert_close(samples.sampler_logprobs, scored.logprobs, atol=2e-5, rtol=0)
    torch.testing.assert_close(samples.sampler_values, scored.values, atol=1e-4, rtol=1e-4)


def test_an_adapter_is_recorded_and_weights_may_change(recordings):
    """A recording reads the weights where they are: the next call sees the new ones."""
    model = get_peft_model(tiny.model("llama"), LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"]))
    model = model.to(GPU).eval()
    for _ in range(2):
        assert_same(draw(model), draw(model, own_loop=False))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
    assert recordings


def test_a_step_that_asks_the_gpu_for_a_number_cannot_be_recorded():
    x = torch.ones(3, device=GPU)
    with pytest.raises(RuntimeError):
        record(lambda: x.add_(float(x.sum())), torch.cuda.graph_pool_handle(), x.device)
    torch.cuda.synchronize()
    advance = record(lambda: x.add_(1), torch.cuda.graph_pool_handle(), x.device)
    advance()
    assert x.tolist() == [2, 2, 2], "and the GPU is as good as before"


def test_where_recording_fails_the_tokens_are_the_same(monkeypatch, caplog):
    model, plain = tiny.model("llama").to(GPU), ReplayedDecoding._note

    def asks(self: Any, tokens: torch.Tensor) -> None:
        int(tokens.sum())
        plain(self, tokens)

    expected = draw(model)
    monkeypatch.setattr(ReplayedDecoding, "_note", asks)
    with caplog.at_level(logging.INFO):
        assert_same(draw(model), expected)
    assert "a step of LlamaForCausalLM cannot be recorded" in caplog.text


def test_bfloat16(recordings):
    """Sampling and scoring round differently; on average they say the same."""
    Accelerator(mixed_precision="bf16")
    by = learner(ActorCritic(tiny.model("llama")).to(GPU))
    with by.accelerator.autocast():
        samples = draw(by.actor.policy)
    assert recordings
    gap = (samples.sampler_logprobs - by.score(samples).logprobs)[samples.completion_mask].abs()
    assert float(gap.median()) < 0.02


# ── scores and gradients


def columns(samples: Samples) -> tuple[torch.Tensor, ...]:
    return samples.prompt_ids, samples.prompt_mask, samples.completion_ids, samples.completion_mask


def learner(actor: ActorCritic, reference: bool = False, **settings: Any) -> Learner:
    args = TrainConfig(learning_rate=1e-3, lr_scheduler_type="constant", **settings)
    return Learner(actor, Accelerator(), args, Reference(actor) if reference else None)


def update(actor: ActorCritic, rollout: Rollout, credit: Any, **settings: Any) -> tuple[torch.Tensor, dict]:
    """The gradient of PPO, and its metrics."""
    by = learner(actor, **settings)
    metrics, _ = by.gradient(rollout, credit, PPO(entropy_coef=0.1).loss, "token_mean", with_entropy=True)
    return torch.cat([p.grad.flatten().cpu() for p in actor.parameters() if p.grad is not None]), metrics


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packs", [True, False], ids=["packed", "padded"])
def test_the_gradient_is_that_of_a_cpu(monkeypatch, kind: str, packs: bool):
    monkeypatch.setattr("hfpg.models.packed", functools.partial(packed, even_if_dearer=True))
    actor = ActorCritic(tiny.model(kind), "shared")
    assert actor.packs
    on_cpu, on_gpu = copy.deepcopy(actor), copy.deepcopy(actor).to(GPU)
    samples = build.draw(actor)
    rollout, credit = build.rollout_of(samples, build.learner(on_cpu))
    by = build.learner(on_cpu)
    by.gradient(rollout, credit, PPO(entropy_coef=0.1).loss, "token_mean", with_entropy=True)
    expected = torch.cat([p.grad.flatten() for p in on_cpu.parameters() if p.grad is not None])
    reset()
    on_gpu.packs = packs
    found, _ = update(on_gpu, rollout.to(GPU), credit.to(GPU), max_tokens_per_micro_batch=100)
    assert (found - expected).norm() / expected.norm() < 1e-4


def reset() -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    GradientState._reset_state()


@pytest.mark.parametrize("with_entropy", [False, True])
def test_the_head_on_a_gpu_is_the_head_on_a_cpu(with_entropy: bool):
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64, dtype=torch.float64), torch.randn(5000, 64, dtype=torch.float64)
    tokens, slopes = torch.randint(5000, (300,)), torch.randn(300, dtype=torch.float64)

    def run(device: str, dtype: torch.dtype) -> list[torch.Tensor]:
        h, w = (x.to(device, dtype).requires_grad_() for x in (hidden, weight))
        scores, spread = head_scores(h, w, None, tokens.to(device), 0.9, with_entropy=with_entropy)
        total = (scores * slopes.to(device, dtype)).sum() + (0 if spread is None else spread.sum())
        total.backward()
        return [scores.detach().cpu(), h.grad.cpu(), w.grad.cpu()]

    for a, b in zip(run(GPU, torch.float32), run("cpu", torch.float64), strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_liger_kernels_change_neither_scores_nor_gradient(kind: str):
    plain = ActorCritic(tiny.model(kind).to(GPU), "shared")
    samples = draw(plain.policy)
    rollout, credit = build.rollout_of(samples.to("cpu"), build.learner(ActorCritic(tiny.model(kind), "shared")))
    reset()
    theirs, _ = update(plain, rollout.to(GPU), credit.to(GPU))  # before: liger changes functions of the class
    policy = tiny.model(kind).to(GPU)
    use_liger(policy)
    names = {type(m).__name__ for m in policy.modules()} | {m.forward.__module__ for m in policy.modules()}
    assert any("iger" in name for name in names)
    fused = ActorCritic(policy, "shared")
    assert fused.chunked_head and fused.packs
    ours, _ = update(fused, rollout.to(GPU), credit.to(GPU))
    assert (ours - theirs).norm() / theirs.norm() < 1e-3
    assert torch.equal(draw(policy).completion_ids, samples.completion_ids)


# ── whole runs


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("algorithm", [PPO(epochs=2, kl_coef=0.05), RLOO(num_generations=4)])
def test_a_run(tmp_path: Path, recordings, algorithm: Any, bf16: bool):
    trainer = build.trainer(
        tmp_path,
        algorithm=algorithm,
        model=tiny.model("llama"),
        use_cpu=False,
        bf16=bf16,
        max_steps=3,
        max_completion_length=24,
    )
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) >= 3 and recordings
    gap = trainer.run.sampler_gap
    assert gap is None if bf16 else gap < 1e-5


@pytest.mark.parametrize("bf16", [False, True])
def test_a_judge_on_the_gpu_while_steps_are_recorded(tmp_path: Path, recordings, bf16: bool):
    """The judge's thread also leaves blocks of autocast, which clears the cache of weights of the whole process."""
    matrix = torch.randn(512, 512, device=GPU)

    def slow(prompts: list, completions: list, **_: Any) -> list[float]:
        total = matrix
        for _ in range(50):
            with torch.autocast(GPU, torch.bfloat16):
                total = torch.tanh(torch.nn.functional.linear(total, matrix))
        return [len(c) + float(total[0, 0]) for c in completions]

    trainer = build.trainer(
        tmp_path,
        algorithm=GRPO(num_generations=4),
        reward=slow,
        use_cpu=False,
        judge_chunks=4,
        bf16=bf16,
        max_completion_length=40,
    )
    trainer.train()
    assert recordings
