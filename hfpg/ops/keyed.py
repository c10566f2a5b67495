"""Random numbers as pure functions of (seed, purpose, counters): no generator, no state to save.

A key is a 64-bit integer mixed from the seed, the name of the purpose and any counters; every draw hashes key and
position (the finalizer of SplitMix64, Steele et al. 2014). The same key gives the same numbers in every process, on
every device, in every batch layout.
"""

from __future__ import annotations

import hashlib
import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # as signed 64-bit: torch multiplies int64 modulo 2^64
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)

CPU_CHUNK = 1 << 20  # logits that a `GumbelMax` works on at a time: 4 MB in fp32, which stays in cache
GPU_CHUNK = 1 << 23  # 32 MB in fp32: few kernels
NEVER = -1e30  # in place of −∞, whose product with a probability of 0 is NaN


def _shift_right(x: Tensor, n: int) -> Tensor:
    """Logical shift: torch's >> on int64 copies the sign bit."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def mix(x: Int[Tensor, "*shape"]) -> Int[Tensor, "*shape"]:
    """The SplitMix64 finalizer: a bijection of 64-bit integers whose output bits look independent."""
    x = x + _GOLDEN
    x = (x ^ _shift_right(x, 30)) * _MIX1
    x = (x ^ _shift_right(x, 27)) * _MIX2
    return x ^ _shift_right(x, 31)


def key(seed: int, purpose: str, *counters: int) -> int:
    """A signed 64-bit key for one use of random numbers, e.g. `key(seed, "minibatch", step, epoch)`."""
    text = "/".join([str(seed), purpose, *map(str, counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def row_keys(seed: int, purpose: str, counters: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """One key per row from one counter per row (a sample id)."""
    return mix(mix(counters.to(torch.int64)) ^ key(seed, purpose))


def uniforms(keys: Int[Tensor, " B"], n: int) -> Float[Tensor, "B n"]:
    """n numbers in the open interval (0, 1) for each key, float64."""
    bits = mix(keys[:, None] ^ mix(torch.arange(n, device=keys.device) + 1))
    return (_shift_right(bits, 12).double() + 0.5) / (1 << 52)


def permutation(n: int, seed: int, purpose: str, *counters: int) -> Int[Tensor, " n"]:
    """A permutation of 0 … n−1 (on the CPU), a pure function of its arguments."""
    bits = mix(torch.arange(n) ^ key(seed, purpose, *counters))
    return torch.argsort(mix(bits ^ key(seed, f"{purpose}, second pass", *counters)), stable=True)


def gumbel(u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """−log(−log u): standard Gumbel noise from uniforms."""
    return -torch.log(-torch.log(u))


def gumbel_max(logits: Float[Tensor, "B V"], keys: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """One token per row, drawn exactly from softmax(logits), keyed by row.

    argmax_v (logit_v + Gumbel_v) has law softmax(logits) (Gumbel 1954). It is applied twice, to √V blocks by their
    logsumexp and then inside the block that won, so that a row needs 2√V random numbers in place of V. Unlike an
    inverse CDF, a rounding difference in the logits moves no boundary: a token changes only when two noisy logits
    tie to that precision. −inf logits are never drawn.
    """
    rows, vocabulary = logits.shape
    width = math.isqrt(vocabulary - 1) + 1
    padded = torch.nn.functional.pad(logits, (0, width * width - vocabulary), value=-torch.inf)
    blocks = padded.view(rows, width, width)
    noise = gumbel(uniforms(keys, 2 * width)).to(torch.promote_types(logits.dtype, torch.float32))
    block = (blocks.logsumexp(2) + noise[:, :width]).argmax(1)
    inside = blocks[torch.arange(rows, device=logits.device), block]
    return block * width + (inside + noise[:, width:]).argmax(1)


class Draw(NamedTuple):
    """One token per row, and what the distribution that it was drawn from says."""

    tokens: Int[Tensor, " B"]
    logprobs: Float[Tensor, " B"]  # of the tokens drawn
    entropy: Float[Tensor, " B"]  # nats


class GumbelMax:
    """`gumbel_max` of logits / τ, time and again: in one pass the same tokens, their log-probabilities and entropy.

    With the deficits d_v = (logit_v − max) / τ, exp(d_v) is taken once. Its sums over blocks are what the first argmax
    needs, their sum Z is the normaliser, and H = log Z − Σ_v exp(d_v) d_v / Z. The two buffers that this takes hold
    one chunk of rows and are kept between calls.

    Args:
        like: logits [B, V] of the largest batch to come.
    """

    def __init__(self, like: Float[Tensor, "B V"]):
        self.vocabulary = like.shape[1]
        self.width = math.isqrt(self.vocabulary - 1) + 1
        self.dtype = torch.promote_types(like.dtype, torch.float32)
        square = self.width * self.width
        self.rows = max(1, min(len(like), (CPU_CHUNK if like.device.type == "cpu" else GPU_CHUNK) // square))
        # past V nothing is written: the last block's filling has weight 0
        self.deficits = torch.full((self.rows, square), NEVER, dtype=self.dtype, device=like.device)
        self.weights = torch.empty_like(self.deficits)
        self.columns = torch.arange(self.width, device=like.device)

    def __call__(
        self, logits: Float[Tensor, "B V"], keys: Int[Tensor, " B"], temperature: float = 1.0, greedy: bool = False
    ) -> Draw:
        """One token per row; with `greedy` the likeliest."""
        noise = None if greedy else gumbel(uniforms(keys, 2 * self.width)).to(self.dtype)
        parts = []
        for start in range(0, len(logits), self.rows):
            rows = slice(start, start + self.rows)
            parts.append(self._draw(logits[rows].to(self.dtype), None if noise is None else noise[rows], temperature))
        return parts[0] if len(parts) == 1 else Draw(*map(torch.cat, zip(*parts, strict=True)))

    def _draw(self, logits: Tensor, noise: Tensor | None, temperature: float) -> Draw:
        """One chunk of rows."""
        deficits, weights = self.deficits[: len(logits)], self.weights[: len(logits)]
        top = logits.amax(1, keepdim=True)
        inside = torch.sub(logits, top, out=deficits[:, : self.vocabulary])
        if temperature != 1:
            inside.div_(temperature)
        inside.clamp_(min=NEVER)
        torch.exp(deficits, out=weights)
        sums = weights.view(-1, self.width, self.width).sum(2)
        z = sums.sum(1)
        spread = z.log() - torch.mul(weights, deficits, out=weights).sum(1) / z
        tokens = logits.argmax(1) if noise is None else self._two_levels(logits, sums, noise, temperature)
        chosen = (logits.gather(1, tokens[:, None]) - top)[:, 0] / temperature
        return Draw(tokens, chosen - z.log(), spread)

    def _two_levels(self, logits: Tensor, sums: Tensor, noise: Tensor, temperature: float) -> Tensor:
        """The block by the logarithm of its sum, then a token inside it: in the last step the bits of `gumbel_max`."""
        first = (sums.log() + noise[:, : self.width]).argmax(1) * self.width
        columns = first[:, None] + self.columns
        inside = logits.gather(1, columns.clamp(max=self.vocabulary - 1)) / temperature
        inside = inside.masked_fill(columns >= self.vocabulary, -torch.inf)
        return first + (inside + noise[:, self.width :]).argmax(1)
