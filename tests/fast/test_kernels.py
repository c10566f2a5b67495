"""liger-kernel's layers: refused where they could do nothing, and put in before anything looks at the model.

The package needs a GPU (Triton's interpreter would not do, see docs/log.md): a module of the same shape stands for it.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hfpg import trainer
from hfpg.algorithms import PPO
from hfpg.config import ConfigError
from hfpg.fast import kernels
from hfpg.fast.kernels import NO_LOSS, check_liger, use_liger
from tests import build, tiny


GPU = torch.device("cuda", 0)


@pytest.fixture
def liger(monkeypatch):
    """A package that knows Llama, and the calls of it."""
    calls = []
    top, models, patches = (ModuleType(f"liger_kernel{rest}") for rest in ("", ".transformers", ".transformers.patch"))
    models._apply_liger_kernel_to_instance = lambda model, **settings: calls.append((model, settings))
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": print, "qwen2": print}
    monkeypatch.setitem(sys.modules, "liger_kernel", top)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", models)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", patches)
    monkeypatch.setattr(kernels, "is_liger_kernel_available", lambda: True)
    return calls


def test_on_a_cpu_it_is_refused_before_the_model_loads(tmp_path, liger):
    with pytest.raises(ConfigError, match="use_liger_kernel=True on a CPU, .* leave it out"):
        build.trainer(tmp_path, use_liger_kernel=True)


def test_without_the_package_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(kernels, "is_liger_kernel_available", lambda: False)
    with pytest.raises(ConfigError, match=r"pip install 'hfpg\[liger\]'"):
        check_liger(tiny.model("llama").config, GPU)


def test_models_that_it_does_not_know_are_refused(liger):
    check_liger(tiny.model("llama").config, GPU)
    with pytest.raises(ConfigError, match="no layers for 'gpt2'; leave it out, or use one of llama, qwen2"):
        check_liger(tiny.model("gpt2").config, GPU)


def test_it_gets_the_causal_lm_inside_an_adapter_and_leaves_the_losses_alone(liger):
    lm = tiny.model("llama")
    use_liger(get_peft_model(lm, LoraConfig(target_modules=["q_proj"])))
    assert liger == [(lm, NO_LOSS)]


def test_the_layers_are_there_when_policy_reference_and_critic_are_made(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(trainer, "check_liger", lambda config, device: seen.append(config.model_type))
    monkeypatch.setattr(trainer, "use_liger", lambda policy: setattr(policy.model, "fused", True))
    made = build.trainer(
        tmp_path, model=tiny.model("llama"), algorithm=PPO(value="separate", kl_coef=0.1), use_liger_kernel=True
    )
    trunks = [made.learner.actor.policy.model, made.reference.scorer.policy.model, made.learner.actor.value.trunk]
    assert seen == ["llama"] and all(trunk.fused for trunk in trunks)
