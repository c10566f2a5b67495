"""Numbers that describe a rollout, on one small enough to count by hand."""

import dataclasses
import math

import pytest
import torch

from hfpg.report.completions import shown
from hfpg.report.metrics import describe, distinct_2, explained_variance, top_bigram_share
from hfpg.types import Estimates, Rollout
from tests import tiny


T, F = True, False


def rollout(**changes) -> Rollout:
    """Three rows of 3, 1 and 0 tokens; the second was judged by nobody."""
    made = Rollout(
        prompt_ids=torch.ones(3, 2, dtype=torch.long),
        prompt_mask=torch.ones(3, 2, dtype=torch.bool),
        completion_ids=torch.ones(3, 3, dtype=torch.long),
        completion_mask=torch.tensor([[T, T, T], [T, F, F], [F, F, F]]),
        finished=torch.tensor([True, False, False]),
        sample_ids=torch.arange(3),
        group_ids=torch.arange(3),
        scores=torch.tensor([4.0, 0.0, 2.0]),
        weights=torch.tensor([1.0, 0.0, 1.0]),
        old_logprobs=torch.tensor([[-1.0, -2.0, -3.0], [-4.0, 9.0, 9.0], [9.0, 9.0, 9.0]]),
        entropy=torch.tensor([[1.0, 2.0, 3.0], [2.0, 9.0, 9.0], [9.0, 9.0, 9.0]]),
    )
    return dataclasses.replace(made, **changes)


def test_describe_counts_right():
    found = describe(rollout(), {"a": [4.0, None, 2.0], "b": [None, None, None]})
    assert found["score"] == 3 and found["score_std"] == 1  # the row that nobody judged is no 0
    assert found["unscored"] == found["finished"] == pytest.approx(1 / 3)
    assert found["length"] == pytest.approx(4 / 3) and found["entropy"] == 2
    assert found["scores/a"] == 3 and math.isnan(found["scores/b"])
    assert "kl_to_ref" not in found and "sampler_gap" not in found
    assert all(type(value) is float for value in found.values())


def test_kl_is_per_completion_over_chosen_tokens():
    reference = torch.tensor([[-1.5, -2.0, -4.0], [-4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    found = describe(rollout(ref_logprobs=reference, weights=torch.ones(3)), {})
    assert found["kl_to_ref"] == pytest.approx((0.5 + 0 + 1.0) / 3)


def test_kl_counts_completions_that_nobody_scored():
    """The policy drew them too."""
    reference = torch.tensor([[-1.5, -2.0, -4.0], [-4.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    rows = rollout(ref_logprobs=reference, weights=torch.tensor([1.0, 0.0, 0.0]))
    assert describe(rows, {})["kl_to_ref"] == pytest.approx(0.5)


def test_the_sampler_gap_is_the_largest_difference():
    rows = rollout()
    gap = torch.zeros(3, 3)
    gap[0, 1] = -0.25
    assert describe(rollout(sampler_logprobs=rows.old_logprobs + gap), {})["sampler_gap"] == 0.25


def test_a_score_that_nobody_gave_is_no_number():
    found = describe(rollout(weights=torch.zeros(3)), {"a": [None] * 3})
    assert math.isnan(found["score"]) and math.isnan(found["score_std"]) and found["unscored"] == 1
    assert [score for *_, score in shown(rollout(), tiny.tokenizer())] == [4.0, None, 2.0]


def test_explained_variance_of_a_perfect_and_of_an_ignorant_critic():
    returns = torch.tensor([[1.0, -2.0, 5.0], [8.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    rows = rollout(weights=torch.ones(3))
    noise = torch.where(rows.completion_mask, 0.0, 100.0)  # padding does not matter
    estimates = Estimates(returns, returns)
    assert explained_variance(dataclasses.replace(rows, values=returns + noise), estimates) == 1
    assert explained_variance(dataclasses.replace(rows, values=returns + 7 + noise), estimates) == pytest.approx(1)
    assert explained_variance(dataclasses.replace(rows, values=torch.full((3, 3), 3.0)), estimates) == 0
    assert explained_variance(dataclasses.replace(rows, values=-returns), estimates) == pytest.approx(-3)
    half = explained_variance(dataclasses.replace(rows, values=returns / 2), estimates)
    assert half == pytest.approx(0.75)


def test_explained_variance_is_0_where_there_is_nothing_to_explain():
    rows, ones = rollout(values=torch.zeros(3, 3)), torch.ones(3, 3)
    assert explained_variance(rows, Estimates(ones, ones)) == 0
    assert explained_variance(rollout(), Estimates(ones, ones)) == 0
    assert explained_variance(rows, Estimates(ones)) == 0


def test_distinct_2():
    assert distinct_2([[1, 2, 3], [1, 2, 4]]) == 3 / 4
    assert distinct_2([[1, 1, 1, 1, 1]]) == 1 / 4
    assert distinct_2([[1, 2], [2, 1]]) == 1  # no bigram across the seam, and order matters
    assert distinct_2([[5], []]) == 0


def test_top_bigram_share_counts_texts():
    texts = ["So so good so so", "it was so so", "so bad", ""]
    assert top_bigram_share(texts) == ("so so", 0.5)
    assert top_bigram_share(["one", ""]) == ("", 0.0)
    assert top_bigram_share([]) == ("", 0.0)
