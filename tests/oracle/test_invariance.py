"""What must not matter: padding, pad ids, the order of rows, micro-batches. Gradients to 1e-9, relative.

In float64, so that a real dependence cannot hide behind rounding: float32 itself moves them by some 1e-6.
"""

import dataclasses
from typing import Any

import pytest
import torch

from hfpg.algorithms import GRPO, PPO, RLOO
from hfpg.learner import Learner
from hfpg.models import ActorCritic
from hfpg.types import Rollout
from tests import build, tiny


KINDS = tiny.ARCHITECTURES
CLOSE = {torch.float64: 1e-9, torch.float32: 5e-6}


def setting(kind: str, algorithm: Any, **changes: Any) -> tuple[Learner, Rollout]:
    """A learner and a rollout of ragged, left-padded rows in three groups."""
    dtype = torch.float32 if kind == "gemma2" else torch.float64  # transformers' Gemma-2 gives NaN in float64, padded
    actor = ActorCritic(tiny.model(kind).to(dtype), algorithm.value).to(dtype)
    learner = build.learner(actor, **({"max_tokens_per_micro_batch": 10_000} | changes))
    rollout, _ = build.rollout_of(build.draw(actor, count=12, length=8), learner)
    return learner, dataclasses.replace(rollout, group_ids=torch.arange(12) // 4)


def gradient(learner: Learner, algorithm: Any, rollout: Rollout) -> torch.Tensor:
    """Score, estimate, accumulate: one flat gradient in float64."""
    old = learner.score(rollout)
    rollout = dataclasses.replace(rollout, old_logprobs=old.logprobs, values=old.values)
    used, rewards, state = algorithm.rewards(rollout, algorithm.init(), 8)
    credit, _ = algorithm.estimate(used, rewards, state)
    learner.actor.zero_grad()
    learner.gradient(used, credit, algorithm.loss, algorithm.aggregation)
    found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in learner.actor.parameters()]
    return torch.cat([g.flatten() for g in found]).double()


def padded(rollout: Rollout, left: int, right: int, fill: int) -> Rollout:
    """More padding on both sides, and another id in all of it."""

    def wider(name: str, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.dim() < 2:
            return x
        many = left if name.startswith("prompt_") else right
        zeros = torch.zeros(x.shape[0], many, dtype=x.dtype)
        return torch.cat([zeros, x] if name.startswith("prompt_") else [x, zeros], 1)

    made = Rollout(**{name: wider(name, value) for name, value in vars(rollout).items()})
    return dataclasses.replace(
        made,
        prompt_ids=torch.where(made.prompt_mask, made.prompt_ids, fill),
        completion_ids=torch.where(made.completion_mask, made.completion_ids, fill),
    )


@pytest.mark.parametrize(
    "algorithm", [RLOO(kl_coef=0.0), PPO(kl_coef=0.0), GRPO(kl_coef=0.0)], ids=["rloo", "ppo", "grpo"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_depends_on_layout(kind, algorithm):
    learner, rollout = setting(kind, algorithm)
    plain = gradient(learner, algorithm, rollout)
    assert plain.norm() > 0
    close = CLOSE[rollout.old_logprobs.dtype]
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    changed = {
        "pad id 0, which is EOS": padded(rollout, 0, 0, 0),
        "another pad id": padded(rollout, 0, 0, 9),
        "more padding on both sides": padded(rollout, 5, 3, 17),
        "another order of rows": rollout.take(order),
    }
    for name, rows in changed.items():
        assert float((gradient(learner, algorithm, rows) - plain).norm() / plain.norm()) < close, name
    for tokens in (16, 40, 100):
        learner.args.max_tokens_per_micro_batch = tokens
        assert float((gradient(learner, algorithm, rollout) - plain).norm() / plain.norm()) < close, tokens


@pytest.mark.parametrize("kind", ["gpt2", "lstm", "gemma2"])
def test_an_empty_completion_counts_for_nothing_and_breaks_nothing(kind):
    """A prompt that fills the context leaves no room: L = 0."""
    algorithm = PPO(kl_coef=0.0)
    learner, rollout = setting(kind, algorithm)
    mask = rollout.completion_mask.clone()
    mask[3] = False
    empty = dataclasses.replace(rollout, completion_mask=mask)
    found = gradient(learner, algorithm, empty)
    without = torch.tensor([i for i in range(12) if i != 3])
    assert found.isfinite().all()
    expected = gradient(learner, algorithm, rollout.take(without))
    assert float((found - expected).norm() / expected.norm()) < CLOSE[rollout.old_logprobs.dtype]


def test_when_every_completion_is_cut_masking_leaves_nothing_to_train(tmp_path):
    trainer = build.trainer(
        tmp_path, algorithm=PPO(truncation="mask", kl_coef=0.0), max_completion_length=1, stop_token_ids=[63]
    )
    before = [p.detach().clone() for p in trainer.learner.actor.parameters()]
    metrics = trainer.train()
    assert metrics["skipped_steps"] == 1 and metrics["optimizer_steps"] == 0 and metrics["finished"] == 0
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.learner.actor.parameters(), strict=True))
