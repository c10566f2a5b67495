"""Gradients that are added in place are those that autograd would have made."""

from __future__ import annotations

import copy

import pytest
import torch

from hfpg.algorithms import PPO
from hfpg.models import ActorCritic
from hfpg.ops.direct import adding_to, is_direct, look_up
from hfpg.ops.head import head_scores
from tests import build, tiny


def uses(matrix: torch.Tensor) -> torch.Tensor:
    """A tied matrix, looked up and multiplied with."""
    ids, tokens = torch.tensor([[1, 2, 2], [0, 1, 1]]), torch.tensor([3, 0, 1, 2, 2, 0])
    hidden = look_up(matrix, ids).tanh().flatten(0, 1)
    return (head_scores(hidden, matrix, None, tokens, 0.7)[0] * torch.arange(6)).sum()


def test_both_uses_of_a_tied_matrix_add_up():
    matrix = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (wanted,) = torch.autograd.grad(uses(matrix), matrix)
    for times in (1, 2):  # into a fresh gradient, and on top of one
        with adding_to(matrix):
            loss = uses(matrix)
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


@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2", "opt", "gemma2", "lstm"])
def test_the_learners_gradient_is_the_same(kind, monkeypatch):
    start, found = ActorCritic(tiny.model(kind), "shared"), []
    for direct in (True, False):
        by = build.learner(copy.deepcopy(start), max_tokens_per_micro_batch=60)
        if not direct:
            monkeypatch.setattr(by.actor, "large_matrices", lambda: [])
        elif kind in ("gpt2", "llama", "qwen2"):
            assert by.actor.takes_embeddings and by.actor.large_matrices()
        rollout, credit = build.rollout_of(build.draw(by.actor), by)
        by.gradient(rollout, credit, PPO().loss, "token_mean")
        found.append({n: p.grad for n, p in by.actor.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6)
