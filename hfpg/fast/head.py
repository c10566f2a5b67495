"""Log-probabilities of tokens from what a linear LM head reads, with the gradient written by hand.

What autograd does with `hidden @ weight.T → log_softmax → gather` keeps several [N, V] tensors and walks over each of
them. Here logits are made in chunks, vocabulary first (which of the two is faster differs by sizes: docs/log.md), are
turned into probabilities and then into their own gradient in place. The chunks that were made last stay
for the backward pass; the others are made again. Where the loss says what it makes of each token's scores
(`slopes`) and not all chunks could stay, the gradient is made in the forward pass and nothing is made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.autograd.function import once_differentiable

from hfpg.fast.direct import gradient_of, is_direct
from hfpg.fast.product import add_product, inner_product, product, tf32
from hfpg.ops.keyed import NEVER
from hfpg.ops.logprobs import unpack_bits


CHUNK_BYTES = 8 << 20  # of logits made at a time, all chunks of one size: blocks of many sizes fragment the heap
FEWEST_TOKENS = 128  # in a chunk, or its products are slow …
LARGEST_BYTES = 30 << 20  # … but no larger than this: by default glibc gives back what is above 32 MB
KEPT_BYTES = 32 << 20  # of chunks that stay for the backward pass
GPU_BYTES = 512 << 20  # of a chunk, and of those that stay, on a GPU: it takes many numbers to keep one busy …
GPU_MULTIPLE = 128  # … in products of even sizes: for 883 tokens cuBLAS falls to a kernel of an older card
GRAIN = 32  # tokens: of larger batches the number is made up to a multiple

SlopesOf = Callable[[slice, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]
"""(tokens of a chunk, log-probs, entropy) → the derivatives of the loss by these."""


def head_scores(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    tokens: Int[Tensor, " N"],
    temperature: float,
    kept: UInt8[Tensor, "N bytes"] | None = None,
    with_entropy: bool = False,
    slopes: SlopesOf | None = None,
    coarse: bool = False,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"] | None]:
    """log π(token) and, if asked, the entropy of the distribution that tokens are sampled from.

    The same numbers and gradients as `score_in_chunks` with this head; one derivative only. Everything is computed in
    the dtype of `hidden` and `weight`, which is to be at least single precision. With `slopes` the gradient is made in
    the forward pass; the backward pass raises ValueError when it is asked for another one. With `coarse`, for
    hidden states that come out of half precision, a GPU may round them to TF32.
    """
    n = len(hidden)
    spare = -n % GRAIN if n > GRAIN else 0
    if spare:  # positions of which nobody hears: products of few shapes
        pad = torch.nn.functional.pad
        hidden, tokens = pad(hidden, (0, 0, 0, spare)), pad(tokens, (0, spare))
        kept = None if kept is None else pad(kept, (0, 0, 0, spare), value=255)
        slopes = None if slopes is None else _with_spare(slopes, n)
    scores = _HeadScores.apply(hidden, weight, bias, tokens, temperature, kept, with_entropy, slopes, coarse)
    return scores[0][:n], scores[1][:n] if with_entropy else None


def _with_spare(slopes: SlopesOf, n: int) -> SlopesOf:
    """Slopes of 0 at the positions from n on."""

    def padded(chunk: slice, logprobs: Tensor, entropy: Tensor | None) -> tuple[Tensor, Tensor | None]:
        count = max(0, min(chunk.stop, n) - chunk.start)
        a, b = torch.zeros_like(logprobs), None if entropy is None else torch.zeros_like(entropy)
        if count:
            heard = slice(chunk.start, chunk.start + count)
            a[:count], of_entropy = slopes(heard, logprobs[:count], None if entropy is None else entropy[:count])
            if b is not None and of_entropy is not None:
                b[:count] = of_entropy
        return a, b

    return padded


def chunk_size(column: int, on_cpu: bool) -> int:
    """Tokens of a chunk, of which each has `column` bytes of logits."""
    if on_cpu:
        return max(1, min(max(CHUNK_BYTES // column, FEWEST_TOKENS), LARGEST_BYTES // column))
    return max(1, GPU_BYTES // column // GPU_MULTIPLE) * GPU_MULTIPLE


class _Logits:
    """Chunks of logits [V, n] ÷ τ, −inf outside the kept sets."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        temperature: float,
        kept: Tensor | None,
        coarse: bool = False,
    ):
        self.hidden, self.weight, self.bias, self.temperature, self.kept = hidden, weight, bias, temperature, kept
        self.coarse = coarse
        self.column = len(weight) * hidden.element_size()
        self.on_cpu = hidden.device.type == "cpu"
        self.size = chunk_size(self.column, self.on_cpu)
        self.kept_bytes = KEPT_BYTES if self.on_cpu else GPU_BYTES

    def stay(self) -> bool:
        """True where all chunks fit in what may be kept: nothing would be made again."""
        return len(self.hidden) * self.column <= self.kept_bytes

    def stays(self, chunk: slice) -> bool:
        """True for the chunks at the end that fit in what may be kept, and for the last one."""
        return (len(self.hidden) - chunk.start) * self.column <= self.kept_bytes or chunk.stop == len(self.hidden)

    def chunks(self) -> Iterator[slice]:
        """Parts of the N positions, in order: of `size`, and the rest, on a CPU in powers of 2.

        Few sizes, because oneDNN keeps half a megabyte for every shape that it has seen.
        """
        start, size = 0, self.size
        while (left := len(self.hidden) - start) > 0:
            if left < size:
                size = 1 << (left.bit_length() - 1) if self.on_cpu else left
            yield slice(start, start + size)
            start += size

    def make(self, chunk: slice) -> Float[Tensor, "V n"]:
        """The logits of a chunk."""
        with tf32(self.coarse):
            out = product(self.weight, self.hidden[chunk])
        if self.bias is not None:
            out += self.bias[:, None]
        if self.temperature != 1:
            out /= self.temperature
        if self.kept is not None:
            out.masked_fill_(~unpack_bits(self.kept[chunk], len(self.weight)).T, -torch.inf)
        return out


class _Gradient:
    """The gradient of what the head reads and of its parameters, chunk by chunk."""

    def __init__(self, needs: Sequence[bool], hidden: Tensor, weight: Tensor, bias: Tensor | None, direct: bool):
        self.direct = direct
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.weight = None
        if needs[1]:
            self.weight = gradient_of(weight) if direct else torch.zeros_like(weight)
        self.bias = torch.zeros_like(bias) if bias is not None and needs[2] else None

    def add(
        self,
        logits: _Logits,
        chunk: slice,
        tokens: Tensor,
        probabilities: Tensor,
        of_logprobs: Tensor,
        of_entropy: tuple[Tensor, Tensor] | None,
        total: Tensor | None = None,
    ) -> None:
        """A chunk's part; its probabilities [V, n] are used up. of_entropy: the derivative, and the entropy.

        total: [n], what the probabilities are still to be divided by.
        """
        if total is not None and of_entropy is not None:
            probabilities, total = probabilities.div_(total), None
        g = _to_logits(probabilities, tokens[chunk], of_logprobs, of_entropy, total)
        if logits.temperature != 1:
            g /= logits.temperature
        with tf32(logits.coarse):
            if self.hidden is not None:
                self.hidden[chunk] = inner_product(g, logits.weight)
            if self.weight is not None:
                add_product(self.weight, g, logits.hidden[chunk].T)
        if self.bias is not None:
            self.bias += g.sum(1)

    def parts(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """For autograd, which is not to see what was added in place."""
        return self.hidden, None if self.direct else self.weight, self.bias


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
        slopes: SlopesOf | None,
        coarse: bool,
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropy [N]; the latter empty where it is not asked for."""
        logits = _Logits(hidden, weight, bias, temperature, kept, coarse)
        logprobs, normalizer = hidden.new_empty(len(hidden)), hidden.new_empty(len(hidden))
        entropy = hidden.new_empty(len(hidden) if with_entropy else 0)
        stays: dict[int, Tensor] = {}
        ctx.made, ctx.slopes = None, []
        if slopes is not None and any(ctx.needs_input_grad) and not logits.stay():
            ctx.made = _Gradient(ctx.needs_input_grad, hidden, weight, bias, is_direct(weight))
        for chunk in logits.chunks():
            z = logits.make(chunk)
            chosen = z[_places(tokens[chunk])]
            top = z.amax(0)
            z -= top
            shifted = z.clamp(min=NEVER) if with_entropy else z
            total = z.exp_().sum(0)
            normalizer[chunk] = top + total.log()
            logprobs[chunk] = chosen - normalizer[chunk]
            if with_entropy:
                entropy[chunk] = total.log() - shifted.mul_(z).sum(0) / total
            if ctx.made is not None and slopes is not None:
                here = entropy[chunk] if with_entropy else None
                a, b = slopes(chunk, logprobs[chunk], here)
                ctx.made.add(logits, chunk, tokens, z, a, None if here is None else (b, here), total)
                ctx.slopes.append((a, b))
            elif any(ctx.needs_input_grad) and logits.stays(chunk):
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
        if ctx.made is not None:
            _same_slopes(ctx.slopes, of_logprobs, of_entropy)
            return *ctx.made.parts(), *[None] * 6
        hidden, weight, bias, tokens, _, normalizer, entropy = ctx.saved_tensors
        logits: _Logits = ctx.logits
        direct = ctx.direct is not None
        made = _Gradient(ctx.needs_input_grad, hidden, ctx.direct if direct else weight, bias, direct)
        for chunk in reversed(list(logits.chunks())):
            probabilities = ctx.stays.pop(chunk.start, None)
            if probabilities is None:
                probabilities = logits.make(chunk).sub_(normalizer[chunk]).exp_()
            of_entropy_here = (of_entropy[chunk], entropy[chunk]) if ctx.with_entropy else None
            made.add(logits, chunk, tokens, probabilities, of_logprobs[chunk], of_entropy_here)
        return *made.parts(), *[None] * 6


def _same_slopes(made: list[tuple[Tensor, Tensor | None]], of_logprobs: Tensor, of_entropy: Tensor) -> None:
    """ValueError where the backward pass brings other derivatives than those that the gradient was made with."""
    for asked, used in ((of_logprobs, [a for a, _ in made]), (of_entropy, [b for _, b in made])):
        if asked.numel() and used[0] is not None:
            was = torch.cat(used)  # type: ignore[arg-type]
            largest, gap = float(was.abs().max()), float((asked - was).abs().max())
            if gap > 1e-3 * largest:
                raise ValueError(
                    "the loss is not token_local: at a token its derivative depends on the scores of other tokens "
                    f"(difference {gap:.3g}, largest derivative {largest:.3g}); its `schedule` should say "
                    "token_local=False"
                )


def _to_logits(
    p: Tensor,
    tokens: Tensor,
    of_logprobs: Tensor,
    of_entropy: tuple[Tensor, Tensor] | None,
    total: Tensor | None = None,
) -> Float[Tensor, "V n"]:
    """The gradient of the logits, in place of the probabilities: a (1_y − p) − b p (ln p + H).

    Without of_entropy p may still have to be divided by `total`: one walk over it less.
    """
    if of_entropy is None:
        p.mul_(-of_logprobs if total is None else -of_logprobs / total)
    else:
        b, entropy = of_entropy
        logs = p.log().clamp_(min=NEVER).add_(entropy).mul_(b).add_(of_logprobs)
        p.mul_(logs.neg_())
    return p.index_put_(_places(tokens), of_logprobs, accumulate=True)


def _places(tokens: Int[Tensor, " n"]) -> tuple[Tensor, Tensor]:
    """Where [V, n] holds the chosen tokens."""
    return tokens, torch.arange(len(tokens), device=tokens.device)
