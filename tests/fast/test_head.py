"""The head with a hand-written gradient against the plain one, and against finite differences."""

from __future__ import annotations

import pytest
import torch

from hfpg.fast import head as module
from hfpg.fast.head import head_scores
from hfpg.ops.logprobs import pack_bits, score_in_chunks


VOCABULARY = 11


def inputs(n: int = 7, dtype: torch.dtype = torch.float64, sets: bool = False):
    """Hidden states, weight, bias, tokens and, if asked, the bits of sets that hold the tokens."""
    made = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, 5, generator=made, dtype=dtype)
    weight, bias = (torch.randn(*s, generator=made, dtype=dtype) for s in ((VOCABULARY, 5), (VOCABULARY,)))
    tokens = torch.randint(VOCABULARY, (n,), generator=made)
    kept = torch.rand(n, VOCABULARY, generator=made) < 0.5
    kept[torch.arange(n), tokens] = True
    return hidden, weight, bias, tokens, pack_bits(kept) if sets else None


@pytest.fixture(params=[7, 2, 0], ids=["one chunk", "several chunks, two kept", "several chunks, one kept"])
def chunked(request, monkeypatch):
    """Chunks of 7 tokens, or of 2 of which the last 4 tokens, or 1, are kept."""
    cut(monkeypatch, tokens=request.param or 2, kept=4 if request.param else 0)


def cut(monkeypatch, tokens: int, kept: int) -> None:
    monkeypatch.setattr(module, "CHUNK_BYTES", tokens * VOCABULARY * 8)
    monkeypatch.setattr(module, "FEWEST_TOKENS", 1)
    monkeypatch.setattr(module, "KEPT_BYTES", kept * VOCABULARY * 8)


@pytest.mark.parametrize("sets", [False, True])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_are_those_of_the_plain_head(chunked, sets, with_entropy, with_bias):
    hidden, weight, bias, tokens, kept = inputs(sets=sets)
    bias = bias if with_bias else None
    leaves = [x.requires_grad_() for x in (hidden, weight, bias) if x is not None]
    found = head_scores(hidden, weight, bias, tokens, 0.7, kept, with_entropy)
    wanted = score_in_chunks(
        lambda h: torch.nn.functional.linear(h, weight, bias), hidden, tokens, VOCABULARY, 0.7, kept, with_entropy
    )
    gradients = []
    for logprobs, entropy in (found, wanted):
        total = (logprobs * torch.linspace(-1, 2, len(tokens), dtype=torch.float64)).sum()
        if with_entropy:
            total = total + (entropy * torch.linspace(2, -1, len(tokens), dtype=torch.float64)).sum()
        else:
            assert entropy is None
        gradients.append(torch.autograd.grad(total, leaves))
    for a, b in zip((*found, *gradients[0]), (*wanted, *gradients[1]), strict=True):
        if b is not None:
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("n", [7, 90])
def test_one_pass_makes_the_gradient_of_two(chunked, with_entropy, n, monkeypatch):
    """The slopes are asked for chunk by chunk, without the positions that fill the last one up."""
    monkeypatch.setattr(module, "GRAIN", 4)
    hidden, weight, bias, tokens, kept = inputs(n, sets=True)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    of_logprobs, of_entropy = torch.linspace(-1, 2, n).double(), torch.linspace(2, -1, n).double()
    asked: list[int] = []

    def slopes(chunk, logprobs, entropy):
        assert len(logprobs) == chunk.stop - chunk.start and (entropy is None) != with_entropy
        asked.extend(range(chunk.start, chunk.stop))
        return of_logprobs[chunk], of_entropy[chunk] if with_entropy else None

    def gradient(how, scale=1.0):
        scores = head_scores(hidden, weight, bias, tokens, 0.7, kept, with_entropy, how)
        total = (scores[0] * of_logprobs * scale).sum()
        return torch.autograd.grad(total + ((scores[1] * of_entropy).sum() if with_entropy else 0), leaves)

    for a, b in zip(gradient(slopes), gradient(None), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    if asked:  # not where all chunks stay: nothing is to be won
        assert asked == list(range(n))
        with pytest.raises(ValueError, match="not token_local.*token_local=False"):
            gradient(slopes, scale=1.1)


def test_one_pass_takes_part_only_where_not_all_chunks_stay(monkeypatch):
    hidden, weight, _, tokens, _ = inputs()
    hidden.requires_grad_()
    cut(monkeypatch, tokens=2, kept=4)
    asked: list[slice] = []
    slopes = lambda chunk, a, b: (asked.append(chunk), a)[1:] + (None,)  # noqa: E731
    head_scores(hidden[:4], weight, None, tokens[:4], 1.0, slopes=slopes)
    assert not asked
    head_scores(hidden, weight, None, tokens, 1.0, slopes=slopes)
    assert len(asked) > 2


def test_finite_differences(chunked):
    hidden, weight, bias, tokens, kept = inputs(sets=True)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    # a second backward pass makes the last chunk again, in another order of roundings
    scores = lambda h, w, b: head_scores(h, w, b, tokens, 1.3, kept, True)  # noqa: E731
    assert torch.autograd.gradcheck(scores, leaves, nondet_tol=1e-12)


def test_a_frozen_head_and_no_token_at_all():
    hidden, weight, bias, tokens, _ = inputs()
    logprobs, _ = head_scores(hidden.requires_grad_(), weight, bias, tokens, 1.0)
    (gradient,) = torch.autograd.grad(logprobs.sum(), hidden)
    assert gradient.abs().sum() > 0 and weight.grad is None
    nothing, entropy = head_scores(hidden[:0], weight, None, tokens[:0], 1.0, None, True)
    assert nothing.shape == entropy.shape == (0,)
    nothing.sum().backward()


def test_memory_is_one_chunk_of_logits(monkeypatch):
    """No tensor larger than a chunk is made but the weight's gradient, however many tokens there are."""
    cut(monkeypatch, tokens=4, kept=4)
    hidden, weight, bias, tokens, _ = inputs(n=400)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, f, types, args=(), kwargs=None):
            out = f(*args, **(kwargs or {}))
            largest.extend(x.numel() for x in [out] if isinstance(x, torch.Tensor))
            return out

    with Watch():
        head_scores(hidden.requires_grad_(), weight.requires_grad_(), None, tokens, 1.0)[0].sum().backward()
    assert max(largest) == 416 * 5 < 400 * VOCABULARY, "the hidden states, made up to a multiple of 32"


def test_chunks_on_a_gpu_are_large_and_of_a_size_that_its_products_like():
    for vocabulary in (100, 50257, 128256, 151936, 10**7):
        size = module.chunk_size(4 * vocabulary, on_cpu=False)
        assert size % module.GPU_MULTIPLE == 0
        assert size == module.GPU_MULTIPLE or 4 * vocabulary * size <= module.GPU_BYTES
    assert 4 * 151936 * module.chunk_size(4 * 151936, on_cpu=True) <= module.LARGEST_BYTES
