"""Shortcuts that tests share: prompts, samples, a learner, a trainer, all tiny."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator

from hfpg import PolicyGradientTrainer, TrainConfig
from hfpg.algorithms import PPO
from hfpg.data import PromptData
from hfpg.generation.hf import HFGenerator
from hfpg.learner import Learner
from hfpg.models import ActorCritic, Reference
from hfpg.types import Estimates, Rollout, Samples
from tests import tiny


def draw(
    actor: ActorCritic, *, count: int = 12, length: int = 10, seed: int = 7, data: Any = None, **options: Any
) -> Samples:
    """Samples of the first `count` rows, ragged and left-padded."""
    data = data or PromptData(tiny.rows(count), tiny.tokenizer())
    prompts = data.rows(range(count), torch.arange(count), 1, "cpu")
    generator = HFGenerator(tiny.tokenizer(), seed=seed, max_completion_length=length, **options)
    return generator(actor.policy, prompts)


def learner(actor: ActorCritic, *, reference: bool = False, **settings: Any) -> Learner:
    """A learner on the CPU."""
    args = TrainConfig(**({"learning_rate": 1e-3, "lr_scheduler_type": "constant"} | settings))
    return Learner(actor, Accelerator(cpu=True), args, Reference(actor) if reference else None)


def rollout_of(samples: Samples, by: Learner, seed: int = 0) -> tuple[Rollout, Estimates]:
    """A scored rollout with random scores and advantages."""
    old = by.score(samples)
    noise = torch.Generator().manual_seed(seed)
    shape = samples.completion_ids.shape
    rollout = Rollout(
        **{name: getattr(samples, name) for name in Samples.__dataclass_fields__},
        scores=torch.randn(len(samples), generator=noise),
        weights=torch.ones(len(samples)),
        old_logprobs=old.logprobs,
        entropy=old.entropy,
        ref_logprobs=old.ref_logprobs,
        values=old.values,
    )
    credit = torch.randn(shape, generator=noise) * samples.completion_mask
    return rollout, Estimates(credit, torch.randn(shape, generator=noise) * samples.completion_mask)


def trainer(folder: Any, *, algorithm: Any = None, model: Any = None, reward: Any = None, **settings: Any) -> Any:
    """A trainer on a tiny GPT-2; `settings` are TrainConfig fields or trainer arguments."""
    own = set(TrainConfig.__dataclass_fields__)
    config = {
        "max_steps": 2,
        "prompts_per_step": 8,
        "max_completion_length": 6,
        "learning_rate": 1e-3,
        "save_steps": 0,
    }
    config |= {"completions_steps": 0, "torch_threads": 1, "use_cpu": True, "output_dir": str(folder)}
    config |= {k: v for k, v in settings.items() if k in own}
    given = {"train_dataset": tiny.rows(), "processing_class": tiny.tokenizer()}
    given |= {k: v for k, v in settings.items() if k not in own}
    return PolicyGradientTrainer(
        tiny.model() if model is None else model,
        algorithm or PPO(epochs=2, kl_coef=0.05),
        reward or tiny.count_a,
        args=TrainConfig(**config),
        **given,
    )
