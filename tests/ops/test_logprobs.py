"""Log-probabilities in chunks against the whole, with their gradients."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hfpg.ops import logprobs
from hfpg.ops.logprobs import (
    chosen_logprobs,
    entropy,
    kl_in_chunks,
    pack_bits,
    sampling_logits,
    score_in_chunks,
    unpack_bits,
)


TOKENS, HIDDEN, VOCABULARY = 11, 4, 19


def case(dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Linear, Tensor, Tensor, Tensor]:
    """A head, hidden states, chosen tokens, and a kept set that always holds the chosen token."""
    g = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(HIDDEN, VOCABULARY, dtype=dtype)
    hidden = torch.randn(TOKENS, HIDDEN, generator=g, dtype=dtype).requires_grad_()
    chosen = torch.randint(VOCABULARY, (TOKENS,), generator=g)
    kept = torch.rand(TOKENS, VOCABULARY, generator=g) < 0.4
    kept[torch.arange(TOKENS), chosen] = True
    return head, hidden, chosen, kept


def whole(logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The definition: log_softmax, and −Σ p log p (excluded logits are −1e30 here: p = 0 and p log p = 0 exactly)."""
    logp = logits.log_softmax(-1)
    return logp[torch.arange(len(chosen)), chosen], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("elements", [1, 2 * VOCABULARY, 4 * VOCABULARY, 1 << 22])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.9])
@pytest.mark.parametrize("with_kept", [False, True])
def test_chunks_equal_the_whole_in_value_and_gradient(monkeypatch, elements: int, temperature: float, with_kept: bool):
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", elements)
    head, hidden, chosen, kept = case()
    packed = pack_bits(kept) if with_kept else None
    found = score_in_chunks(head, hidden, chosen, VOCABULARY, temperature, packed, with_entropy=True)
    logits = head(hidden) / temperature
    expected = whole(logits.masked_fill(~kept, -1e30) if with_kept else logits, chosen)
    g = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, TOKENS, generator=g)  # a different slope at every token: no sum hides a swap
    inputs = (hidden, *head.parameters())
    gradients = [torch.autograd.grad((a * lp + b * h).sum(), inputs) for lp, h in (found, expected)]
    for one, other in zip(found + gradients[0], expected + gradients[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_chunks_pass_gradcheck_in_float64(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 3 * VOCABULARY)
    head, hidden, chosen, kept = case(torch.float64)

    def both(h: Tensor) -> tuple[Tensor, ...]:
        return score_in_chunks(head, h, chosen, VOCABULARY, 0.8, pack_bits(kept), with_entropy=True)

    assert torch.autograd.gradcheck(both, (hidden,), fast_mode=True)


def test_no_more_than_one_chunk_of_logits_is_made_at_a_time(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 4 * VOCABULARY)
    head, hidden, chosen, _ = case()
    sizes: list[int] = []

    def watched(h: Tensor) -> Tensor:
        sizes.append(len(h))
        return head(h)

    score_in_chunks(watched, hidden, chosen, VOCABULARY, 1.0)[0].sum().backward()
    assert max(sizes) == 4
    assert sum(sizes) == 2 * TOKENS  # once forward, once again in the backward pass


def test_entropy_is_absent_unless_asked_for_and_no_token_is_no_result():
    head, hidden, chosen, _ = case()
    assert score_in_chunks(head, hidden, chosen, VOCABULARY, 1.0)[1] is None
    nothing, entropies = score_in_chunks(head, hidden[:0], chosen[:0], VOCABULARY, 1.0, with_entropy=True)
    assert nothing.shape == entropies.shape == (0,)


def test_low_precision_logits_are_raised_and_double_stays_double():
    logits = torch.randn(2, 5)
    assert sampling_logits(logits.bfloat16(), 1.0).dtype == torch.float32
    assert sampling_logits(logits.double(), 1.0).dtype == torch.float64


def test_entropy_limits():
    uniform, certain = torch.zeros(1, 8), torch.tensor([[0.0, -math.inf, -math.inf]])
    assert entropy(uniform).item() == pytest.approx(math.log(8))
    assert entropy(certain).item() == 0
    assert entropy(torch.tensor([[1e4, -1e4, 0.0]])).item() == 0


def test_excluded_tokens_leave_no_nan_in_the_gradient():
    head, hidden, chosen, kept = case()
    kept[0] = False
    kept[0, chosen[0]] = True  # one possible token: log-probability 0, entropy 0, and nothing to learn
    lp, h = score_in_chunks(head, hidden, chosen, VOCABULARY, 0.5, pack_bits(kept), with_entropy=True)
    (gradient,) = torch.autograd.grad((lp + h).sum(), hidden)
    assert torch.isfinite(lp).all() and torch.isfinite(h).all() and torch.isfinite(gradient).all()
    assert lp[0] == 0 and h[0] == 0 and not gradient[0].any()


def test_a_token_outside_the_kept_set_is_impossible_and_still_no_nan():
    logits = torch.zeros(1, 4, requires_grad=True)
    kept = torch.tensor([[True, True, False, False]])
    lp = chosen_logprobs(sampling_logits(logits, 1.0, pack_bits(kept)), torch.tensor([3]))
    (gradient,) = torch.autograd.grad(lp.sum(), logits)
    assert lp.item() == -math.inf and torch.isfinite(gradient).all()


# ── the exact KL to another policy


def other_case(dtype: torch.dtype = torch.float64) -> tuple[torch.nn.Linear, Tensor]:
    """Another head on hidden states of another width."""
    torch.manual_seed(2)
    return torch.nn.Linear(HIDDEN + 1, VOCABULARY, dtype=dtype), torch.randn(TOKENS, HIDDEN + 1, dtype=dtype)


@pytest.mark.parametrize("elements", [1, 4 * VOCABULARY, 1 << 22])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("with_kept", [False, True])
def test_the_kl_is_the_sum_over_the_vocabulary_in_value_and_gradient(
    monkeypatch, elements: int, reverse: bool, with_kept: bool
):
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", elements)
    (head, hidden, _, kept), (other, theirs) = case(torch.float64), other_case()
    packed = pack_bits(kept) if with_kept else None
    found = kl_in_chunks(head, hidden, other, theirs, VOCABULARY, 0.7, packed, reverse)
    p, q = (
        (x / 0.7).masked_fill(~kept & with_kept, -1e30).softmax(-1) for x in (head(hidden), other(theirs).detach())
    )
    if reverse:
        p, q = q, p
    expected = (p * ((p + 1e-300).log() - (q + 1e-300).log())).sum(-1)
    slope = torch.randn(TOKENS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    inputs = (hidden, *head.parameters())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    for a, b in zip(*(torch.autograd.grad((slope * x).sum(), inputs) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reverse", [False, True])
def test_the_kl_can_be_differentiated_twice_through_recomputed_chunks(monkeypatch, reverse: bool):
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 8 * VOCABULARY)
    (head, hidden, _, kept), (other, theirs) = case(torch.float64), other_case()

    def kl(h: Tensor, weight: Tensor) -> Tensor:
        return kl_in_chunks(lambda x: x @ weight.T, h, other, theirs, VOCABULARY, 0.8, pack_bits(kept), reverse)

    inputs = (hidden, head.weight.detach().clone().requires_grad_())
    assert torch.autograd.gradcheck(kl, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(kl, inputs, fast_mode=True)


def test_nothing_is_differentiated_through_the_other_policy_and_two_chunks_of_logits_are_alive(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 8 * VOCABULARY)
    (head, hidden, _, _), (other, theirs) = case(torch.float64), other_case()
    sizes: list[int] = []

    def watched(h: Tensor) -> Tensor:
        sizes.append(len(h))
        return other(h)

    kl_in_chunks(head, hidden, watched, theirs.requires_grad_(), VOCABULARY, 1.0).sum().backward()
    assert theirs.grad is None and other.weight.grad is None and head.weight.grad is not None
    assert max(sizes) == 4 and sum(sizes) == 2 * TOKENS
    assert kl_in_chunks(head, hidden[:0], other, theirs[:0], VOCABULARY, 1.0).shape == (0,)


@settings(max_examples=20, deadline=None)
@given(vocabulary=st.integers(1, 40), rows=st.integers(1, 4), seed=st.integers(0, 1000))
def test_pack_and_unpack_are_inverse(vocabulary: int, rows: int, seed: int):
    g = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, 3, vocabulary, generator=g) < 0.5
    packed = pack_bits(kept)
    assert packed.dtype == torch.uint8 and packed.shape == (rows, 3, -(-vocabulary // 8))
    assert torch.equal(unpack_bits(packed, vocabulary), kept)


def test_packing_takes_a_view_with_any_strides():
    kept = (torch.rand(16, 3) < 0.5).T
    assert torch.equal(unpack_bits(pack_bits(kept), 16), kept)


def test_packing_no_rows_is_no_rows():
    assert pack_bits(torch.zeros(0, 3, 20, dtype=torch.bool)).shape == (0, 3, 3)
    assert unpack_bits(torch.zeros(0, 3, 3, dtype=torch.uint8), 20).shape == (0, 3, 20)
