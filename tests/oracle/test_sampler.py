"""What `generate` draws is what is scored: 100,000 draws against the enumerated probabilities."""

import pytest
import torch

from hfpg.generation.hf import HFGenerator
from hfpg.types import Prompts
from tests.oracle.world import World


DRAWS = 50_000  # of each of two prompts, the shorter one left-padded


@pytest.mark.parametrize("kind", ["gpt2", "lstm"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_draws_have_the_probabilities_that_are_trained(kind, temperature):
    world = World(kind=kind, temperature=temperature)
    first = [int((world.samples.group_ids < p).sum()) for p in (0, 1)]
    rows = torch.tensor(first).repeat_interleave(DRAWS)
    prompts = Prompts(
        ids=world.samples.prompt_ids[rows],
        mask=world.samples.prompt_mask[rows],
        sample_ids=torch.arange(2 * DRAWS),
        group_ids=rows,
        texts=[""] * (2 * DRAWS),
        columns={},
    )
    generator = HFGenerator(
        None, seed=11, max_completion_length=world.longest, temperature=temperature, max_tokens=10**9
    )
    drawn = generator(world.actor.policy, prompts)

    def names(ids, mask):
        weights = torch.tensor([9**t for t in range(world.longest)])
        return ((ids + 1) * mask * weights).sum(1)

    p = world.probabilities().detach()
    for prompt in (0, 1):
        own = world.samples.group_ids == prompt
        known = names(world.samples.completion_ids, world.samples.completion_mask)[own]
        seen = names(drawn.completion_ids, drawn.completion_mask)[prompt * DRAWS : (prompt + 1) * DRAWS]
        counts = torch.stack([(seen == name).sum() for name in known])
        assert int(counts.sum()) == DRAWS  # nothing but the enumerated completions
        expected = p[own] * DRAWS
        statistic = ((counts - expected) ** 2 / expected).sum()
        freedom = torch.tensor((len(known) - 1) / 2, dtype=torch.float64)
        assert float(torch.special.gammaincc(freedom, statistic / 2)) > 1e-3  # the tail of χ²
