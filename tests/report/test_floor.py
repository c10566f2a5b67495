"""What a step's matrix products cost, against torch's own count of them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hfpg.algorithms import PPO, Reinforce
from hfpg.frozen import freeze_below
from hfpg.models import ActorCritic
from hfpg.report.floor import products, sizes
from tests import build, tiny


MATRICES = 4 * 32 * 32 + 2 * 32 * 128  # of a layer of the tiny GPT-2: attention and the feed-forward pair


def test_the_matrices_of_a_model_are_counted_without_embeddings():
    actor = ActorCritic(tiny.model("gpt2"))
    found = sizes(actor)
    assert found == (0, 2 * MATRICES, 2 * MATRICES, 64 * 32, 64 * 32)
    freeze_below(actor.policy, 1)
    assert sizes(ActorCritic(actor.policy)) == (MATRICES, MATRICES, MATRICES, 64 * 32, 0)


def test_a_mixture_of_experts_is_not_guessed():
    model = tiny.model("llama")
    model.model.experts = torch.nn.Parameter(torch.zeros(4, 3, 2))
    assert sizes(ActorCritic(model)) is None


@pytest.mark.parametrize("layers", [None, 1], ids=["all", "top layer"])
@pytest.mark.parametrize("value", [None, "separate"])
def test_the_update_costs_what_torch_counts(value, layers):
    """Whole prompts of one completion each, all of one length: nothing is padded or shared."""
    model = tiny.model("gpt2")
    if layers is not None:
        freeze_below(model, layers)
    actor = ActorCritic(model, value)
    by = build.learner(actor)
    samples = build.draw(actor, count=8, stop_token_ids=[])
    samples = samples.take((samples.prompt_mask.sum(1) == samples.prompt_mask.sum(1)[0]).nonzero()[:, 0])
    old = by.score(samples)
    rollout, credit = build.rollout_of(samples, by)
    object.__setattr__(rollout, "prompt_states", old.prompt_states)
    object.__setattr__(rollout, "completion_states", old.completion_states)
    algorithm = Reinforce() if value is None else PPO()
    with FlopCounterMode(display=False) as counter:
        by.gradient(rollout, credit, algorithm.loss, "token_mean")
    counts = counter.get_flop_counts()["Global"]
    spent = sum(n for op, n in counts.items() if "attention" not in str(op))
    found = sizes(actor)
    once, twice = (products(rollout, found, epochs, False, value == "separate") for epochs in (1, 2))
    # beside the matrices of the layers there are the value head, and the gradient that the lowest layer need not give
    assert spent == pytest.approx(twice - once, rel=0.15)


def test_prompts_are_counted_once_for_all_their_completions(tmp_path):
    trainer = build.trainer(tmp_path, algorithm=PPO(num_generations=4, epochs=2), max_steps=1)
    rollout = trainer.rescore(*trainer.collect())
    one = torch.arange(0, len(rollout), 4)
    of = sizes(trainer.learner.actor)
    whole, firsts = (products(rows, of, 2, True, False) for rows in (rollout, rollout.take(one)))
    more = float(rollout.completion_mask.sum() - rollout.completion_mask[one].sum())
    per_token = (whole - firsts) / more
    assert per_token == pytest.approx(2 * (of.above + of.head) * (1 + 1 + 2 * 3))


def test_every_step_says_its_distance_from_the_floor(tmp_path):
    metrics = build.trainer(tmp_path, max_steps=1).train()
    assert metrics["seconds/floor"] > 0 and metrics["times_floor"] > 1
