"""The reference policy's weights in a file: the same numbers, and none of the memory between its forward passes."""

from __future__ import annotations

import copy
import errno
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel

from hfpg.algorithms import PPO
from hfpg.fast import parked
from hfpg.frozen import freeze_below
from hfpg.models import ActorCritic, Reference
from hfpg.pretrained import load_policy
from hfpg.probes import is_plain
from tests import build, tiny
from tests.test_models import inputs


linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere weights stay in memory")
LORA = dict(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", init_lora_weights=False)


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    """Tiny models are worth a file too."""
    monkeypatch.setattr(parked, "SMALLEST", 1)


def in_files() -> int:
    """Bytes of files in this process's memory: its libraries and what it has mapped."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile")]
    return int(line.split()[1]) << 10


@linux
@pytest.mark.parametrize("kind", tiny.ARCHITECTURES)
def test_a_reference_in_a_file_says_what_one_in_memory_says(kind, tmp_path):
    actor = ActorCritic(tiny.model(kind))
    samples = build.draw(actor)
    here, there = Reference(actor), Reference(actor, folder=tmp_path)
    assert there.copy.memory is not None and here.copy.memory is None
    for _ in range(2):  # and again, after its pages were let go
        assert torch.equal(there.logprobs(**inputs(samples)), here.logprobs(**inputs(samples)))
    with torch.no_grad():
        for p in actor.parameters():
            p.add_(0.3)
    assert torch.equal(there.logprobs(**inputs(samples)), here.logprobs(**inputs(samples)))
    assert not list(tmp_path.iterdir())


@linux
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_weights_are_the_same_bits_in_every_precision(dtype, tmp_path):
    model = tiny.model().to(dtype)
    found = parked.ParkedCopy(model, {}, tmp_path).module
    for (name, a), (other, b) in zip(model.named_parameters(), found.named_parameters(), strict=True):
        assert name == other and a.dtype == b.dtype and torch.equal(a, b) and not b.requires_grad
        assert a.data_ptr() != b.data_ptr()
    assert found.lm_head.weight is found.transformer.wte.weight


@linux
def test_only_the_layer_that_computes_is_in_memory(tmp_path):
    """Eight layers of 12.6 MB and an LM head of 16.8, which is read last and has no hook."""
    config = GPT2Config(n_layer=8, n_embd=512, n_head=4, n_positions=64, vocab_size=8192, eos_token_id=0)
    actor = ActorCritic(GPT2LMHeadModel(config).eval())
    samples = build.draw(actor)
    reference = Reference(actor, folder=tmp_path)
    layer = sum(p.numel() * 4 for p in actor.policy.transformer.h[0].parameters())
    reference.logprobs(**inputs(samples))  # whatever else is read once
    before, seen = in_files(), []
    for block in reference.scorer.policy.transformer.h:
        block.mlp.register_forward_hook(lambda *_: seen.append(in_files() - before))
    reference.logprobs(**inputs(samples))
    assert len(seen) == 8 and min(seen) > 0.5 * layer  # it is looked at while a layer computes …
    assert max(seen) - min(seen) < 0.5 * layer  # … and the layers before it are gone (embeddings are there for all)
    after = in_files()
    reference.copy.let_go()
    assert after - in_files() < 0.5 * layer  # nothing was left to let go of


@linux
def test_hfpg_still_computes_the_head(tmp_path):
    """A head with hooks is a stranger's: all of its logits would be made at once."""
    actor = ActorCritic(tiny.model())
    scorer = Reference(actor, folder=tmp_path).scorer
    assert scorer.chunked_head and scorer.packs == actor.packs
    assert is_plain(scorer.policy.get_output_embeddings(), next(scorer.parameters()))


@linux
def test_frozen_layers_are_shared_and_not_written(tmp_path):
    model = tiny.model()
    freeze_below(model, 1)
    actor = ActorCritic(model)
    reference = Reference(actor, folder=tmp_path)
    mine, theirs = dict(actor.policy.named_parameters()), dict(reference.scorer.policy.named_parameters())
    assert reference.copy.memory is not None
    assert {name for name in mine if mine[name] is theirs[name]} == {n for n, p in mine.items() if not p.requires_grad}


@linux
def test_a_trained_adapter_and_a_given_model(tmp_path):
    actor = ActorCritic(load_policy(tiny.model(), peft_config=LoraConfig(**LORA)))
    samples = build.draw(actor)
    given = tiny.model(seed=1)
    for other in (None, given):
        here, there = Reference(actor, copy.deepcopy(other)), Reference(actor, other, tmp_path)
        assert there.copy.memory is not None
        assert torch.equal(there.logprobs(**inputs(samples)), here.logprobs(**inputs(samples)))


@linux
def test_a_full_disk_leaves_the_weights_in_memory(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    actor = ActorCritic(tiny.model())
    samples = build.draw(actor)
    monkeypatch.setattr(os, "posix_fallocate", full)
    with caplog.at_level("INFO", logger="hfpg.fast.parked"):
        reference = Reference(actor, folder=tmp_path)
    assert "stays in memory: OSError: [Errno 28]" in caplog.text
    assert torch.equal(reference.logprobs(**inputs(samples)), Reference(actor).logprobs(**inputs(samples)))


@linux
def test_checkpoints_come_first(tmp_path, monkeypatch, caplog):
    """A disk with room for the file and little else."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=600_000))
    with caplog.at_level("INFO", logger="hfpg.fast.parked"):
        assert Reference(ActorCritic(tiny.model()), folder=tmp_path).copy.memory is None
    assert "600000 bytes are free, and 10 times the" in caplog.text


def test_few_weights_are_not_worth_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(parked, "SMALLEST", 1 << 20)
    assert Reference(ActorCritic(tiny.model()), folder=tmp_path).copy.memory is None


@linux
def test_a_run_parks_its_reference_and_learns_the_same(tmp_path, monkeypatch):
    """Exact KL, which asks the reference in every training forward, too."""
    ends = []
    for smallest in (1, 1 << 40):
        monkeypatch.setattr(parked, "SMALLEST", smallest)
        algorithm = PPO(kl_coef=0.05, kl_in="loss", kl_estimator="full")
        trainer = build.trainer(tmp_path / str(smallest), algorithm=algorithm, max_steps=2)
        trainer.train()
        assert (trainer.reference.copy.memory is not None) == (smallest == 1)
        ends.append([p.detach().clone() for p in trainer.learner.actor.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
