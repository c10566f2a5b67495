"""Log-probabilities of tokens from what a linear LM head reads, with the gradient written by hand.

What autograd does with `hidden @ weight.T → log_softmax → gather` keeps several [N, V] tensors and walks over each of
them. Here logits are made in chunks, vocabulary first (a matrix product of that shape is 1.2 to 1.4 times as fast on
CPUs), are turned into probabilities and then into their own gradient in place. The chunks that were made last stay
for the backward pass; the others are made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.autograd.function import once_differentiable

from hfpg.ops.direct import gradient_of, is_direct
from hfpg.ops.logprobs import unpack_bits
from hfpg.ops.product import add_product, product


CHUNK_BYTES = 8 << 20  # of logits made at a time, all chunks of one size: blocks of many sizes fragment the heap
FEWEST_TOKENS = 128  # in a chunk, or its products are slow …
LARGEST_BYTES = 30 << 20  # … but no larger than this: glibc gives blocks above 32 MB back, and fresh pages are slow
KEPT_BYTES = 32 << 20  # of chunks that stay for the backward pass


def head_scores(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    tokens: Int[Tensor, " N"],
    temperature: float,
    kept: UInt8[Tensor, "N bytes"] | None = None,
    with_entropy: bool = False,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"] | None]:
    """log π(token) and, if asked, the entropy of the distribution that tokens are sampled from.

    The same numbers and gradients as `score_in_chunks` with this head; one derivative only. Everything is computed in
    the dtype of `hidden` and `weight`, which is to be at least single precision.
    """
    logprobs, entropy = _HeadScores.apply(hidden, weight, bias, tokens, temperature, kept, with_entropy)
    return logprobs, entropy if with_entropy else None


class _Logits:
    """Chunks of logits [V, n] ÷ τ, −inf outside the kept sets."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, kept: Tensor | None):
        self.hidden, self.weight, self.bias, self.temperature, self.kept = hidden, weight, bias, temperature, kept
        self.column = len(weight) * hidden.element_size()
        self.size = max(1, min(max(CHUNK_BYTES // self.column, FEWEST_TOKENS), LARGEST_BYTES // self.column))

    def stays(self, chunk: slice) -> bool:
        """True for the chunks at the end that fit in KEPT_BYTES, and for the last one."""
        return (len(self.hidden) - chunk.start) * self.column <= KEPT_BYTES or chunk.stop == len(self.hidden)

    def chunks(self) -> Iterator[slice]:
        """Parts of the N positions, in order: of `size`, and the rest in powers of 2.

        Few sizes, because oneDNN keeps half a megabyte for every shape that it has seen.
        """
        start, size = 0, self.size
        while (left := len(self.hidden) - start) > 0:
            if left < size:
                size = 1 << (left.bit_length() - 1)
            yield slice(start, start + size)
            start += size

    def make(self, chunk: slice) -> Float[Tensor, "V n"]:
        """The logits of a chunk."""
        out = product(self.weight, self.hidden[chunk])
        if self.bias is not None:
            out += self.bias[:, None]
        if self.temperature != 1:
            out /= self.temperature
        if self.kept is not None:
            out.masked_fill_(~unpack_bits(self.kept[chunk], len(self.weight)).T, -torch.inf)
        return out


class _HeadScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        temperature: float,
        kept: Tensor | None,
        with_entropy: bool,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropy [N]; the latter empty where it is not asked for."""
        logits = _Logits(hidden, weight, bias, temperature, kept)
        logprobs, normalizer = hidden.new_empty(len(hidden)), hidden.new_empty(len(hidden))
        entropy = hidden.new_empty(len(hidden) if with_entropy else 0)
        stays: dict[int, Tensor] = {}
        for chunk in logits.chunks():
            z = logits.make(chunk)
            chosen = z[_places(tokens[chunk])]
            top = z.amax(0)
            z -= top
            shifted = z.clone() if with_entropy else z
            total = z.exp_().sum(0)
            normalizer[chunk] = top + total.log()
            logprobs[chunk] = chosen - normalizer[chunk]
            if with_entropy:
                entropy[chunk] = total.log() - shifted.masked_fill_(z == 0, 0).mul_(z).sum(0) / total
            if any(ctx.needs_input_grad) and logits.stays(chunk):
                stays[chunk.start] = z.div_(total)
        ctx.save_for_backward(hidden, weight, bias, tokens, kept, normalizer, entropy)
        ctx.logits = logits if any(ctx.needs_input_grad) else None
        ctx.direct = weight if is_direct(weight) else None
        ctx.stays = stays
        ctx.with_entropy = with_entropy
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logprobs: Tensor, of_entropy: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of hidden states, weight and bias, chunk by chunk."""
        hidden, weight, bias, tokens, kept, normalizer, entropy = ctx.saved_tensors
        needs = ctx.needs_input_grad
        logits: _Logits = ctx.logits
        to_hidden = torch.empty_like(hidden) if needs[0] else None
        to_weight = None
        if needs[1]:
            to_weight = torch.zeros_like(weight) if ctx.direct is None else gradient_of(ctx.direct)
        to_bias = torch.zeros_like(bias) if bias is not None and needs[2] else None
        for chunk in reversed(list(logits.chunks())):
            probabilities = ctx.stays.pop(chunk.start, None)
            if probabilities is None:
                probabilities = logits.make(chunk).sub_(normalizer[chunk]).exp_()
            of_entropy_here = (of_entropy[chunk], entropy[chunk]) if ctx.with_entropy else None
            g = _to_logits(probabilities, tokens[chunk], of_logprobs[chunk], of_entropy_here)
            g /= logits.temperature
            if to_hidden is not None:
                to_hidden[chunk] = product(g.T, weight.T)
            if to_weight is not None:
                add_product(to_weight, g, hidden[chunk].T)
            if to_bias is not None:
                to_bias += g.sum(1)
        return to_hidden, to_weight if ctx.direct is None else None, to_bias, None, None, None, None


def _to_logits(
    p: Tensor, tokens: Tensor, of_logprobs: Tensor, of_entropy: tuple[Tensor, Tensor] | None
) -> Float[Tensor, "V n"]:
    """The gradient of the logits, in place of the probabilities: a (1_y − p) − b p (ln p + H)."""
    if of_entropy is None:
        p.mul_(-of_logprobs)
    else:
        b, entropy = of_entropy
        logs = p.log().masked_fill_(p == 0, 0).add_(entropy).mul_(b).add_(of_logprobs)
        p.mul_(logs.neg_())
    return p.index_put_(_places(tokens), of_logprobs, accumulate=True)


def _places(tokens: Int[Tensor, " n"]) -> tuple[Tensor, Tensor]:
    """Where [V, n] holds the chosen tokens."""
    return tokens, torch.arange(len(tokens), device=tokens.device)
