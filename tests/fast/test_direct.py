"""Gradients that are added in place are those that autograd would have made."""

from __future__ import annotations

import copy

import pytest
import torch

from hfpg.algorithms import PPO
from hfpg.fast.direct import adding_to, is_direct, keeping_blocks, look_up
from hfpg.fast.head import head_scores
from hfpg.models import ActorCritic
from tests import build, tiny


def uses(matrix: torch.Tensor, padding_idx: int | None = None) -> torch.Tensor:
    """A tied matrix, looked up and multiplied with."""
    ids, tokens = torch.tensor([[1, 2, 2], [0, 1, 1]]), torch.tensor([3, 0, 1, 2, 2, 0])
    hidden = look_up(matrix, ids, padding_idx).tanh().flatten(0, 1)
    return (head_scores(hidden, matrix, None, tokens, 0.7)[0] * torch.arange(6)).sum()


@pytest.mark.parametrize("padding_idx", [None, 2])
def test_both_uses_of_a_tied_matrix_add_up(padding_idx):
    matrix = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (wanted,) = torch.autograd.grad(uses(matrix, padding_idx), matrix)
    for times in (1, 2):  # into a fresh gradient, and on top of one
        with adding_to(matrix):
            loss = uses(matrix, padding_idx)
        loss.backward()
        torch.testing.assert_close(matrix.grad, times * wanted)


def test_outside_and_for_others_nothing_changes():
    matrix, other = (torch.randn(5, 4).requires_grad_() for _ in range(2))
    with adding_to(other):
        assert is_direct(other) and not is_direct(matrix)
        loss = uses(matrix)
    assert not is_direct(other)
    assert torch.autograd.grad(loss, matrix)[0].abs().sum() > 0 and matrix.grad is None
    matrix.register_hook(lambda g: g)
    with adding_to(matrix):
        assert not is_direct(matrix), "a hook has to see the gradient"


def test_a_dropped_gradient_leaves_its_block_as_zeros():
    matrix, hooked, fresh = (torch.randn(5, 4).requires_grad_() for _ in range(3))
    hooked.register_hook(lambda g: g)
    (uses(matrix) + uses(hooked)).backward()
    block = matrix.grad
    with keeping_blocks(matrix, hooked, fresh):
        for leaf in (matrix, hooked, fresh):
            leaf.grad = None
    assert matrix.grad is block and not block.any()
    assert hooked.grad is None and fresh.grad is None


@pytest.mark.parametrize("value", ["shared", "separate"])
def test_the_learner_keeps_the_blocks_of_large_matrices_from_step_to_step(value):
    by = build.learner(ActorCritic(tiny.model("llama"), value))
    rollout, credit = build.rollout_of(build.draw(by.actor), by)
    blocks, large = [], by.actor.large_matrices()
    assert len(large) == (2 if value == "shared" else 3)  # embeddings, head, the critic's embeddings
    for _ in range(2):
        by.optimize(rollout, credit, PPO().loss, aggregation="token_mean")
        blocks.append([m.grad.data_ptr() for m in large])
        assert not any(m.grad.any() for m in large)
        others = [p for p in by.actor.parameters() if all(p is not m for m in large)]
        assert all(p.grad is None for p in others)
    assert blocks[0] == blocks[1]


@pytest.mark.parametrize("value", ["shared", "separate"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "opt", "gemma2", "lstm"])
def test_the_learners_gradient_is_the_same(kind, value, monkeypatch):
    start, found = ActorCritic(tiny.model(kind), value), []
    for direct in (True, False):
        by = build.learner(copy.deepcopy(start), max_tokens_per_micro_batch=60)
        if not direct:
            monkeypatch.setattr(by.actor, "large_matrices", lambda: [])
        elif kind in ("gpt2", "llama", "qwen2", "opt"):  # OPT's embedding has a padding_idx
            assert by.actor.takes_embeddings and by.actor.large_matrices()
        rollout, credit = build.rollout_of(build.draw(by.actor), by)
        by.gradient(rollout, credit, PPO().loss, "token_mean")
        found.append({n: p.grad for n, p in by.actor.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6)
