"""Log-probability and entropy of chosen tokens. [B, C, V] is never whole in memory: tokens go through in chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hfpg.ops.kl import full


CHUNK_ELEMENTS = 1 << 22  # logits alive at a time: 16 MB in fp32, below glibc's largest reused block (32 MB)
GPU_CHUNK_ELEMENTS = 1 << 27


def chunk_elements(device: torch.device) -> int:
    """How many logits may be alive at a time: on a GPU more, or it waits for the next chunk to be launched."""
    return CHUNK_ELEMENTS if device.type == "cpu" else GPU_CHUNK_ELEMENTS


def pack_bits(kept: Bool[Tensor, "*shape V"]) -> UInt8[Tensor, "*shape bytes"]:
    """V booleans as ⌈V/8⌉ bytes, lowest bit first."""
    padded = torch.nn.functional.pad(kept, (0, -kept.shape[-1] % 8))
    bits = padded.view(*kept.shape[:-1], padded.shape[-1] // 8, 8).to(torch.uint8)
    powers = _powers(kept.device)
    return (bits * powers).sum(-1, dtype=torch.uint8)


def _powers(device: torch.device) -> UInt8[Tensor, " 8"]:
    """1, 2, … 128, made on the device: a copy from the host cannot stand in a CUDA graph."""
    return torch.ones(8, dtype=torch.uint8, device=device) << torch.arange(8, dtype=torch.uint8, device=device)


def unpack_bits(packed: UInt8[Tensor, "*shape bytes"], vocabulary: int) -> Bool[Tensor, "*shape V"]:
    """The inverse of `pack_bits`."""
    return ((packed[..., None] & _powers(packed.device)) != 0).flatten(-2)[..., :vocabulary]


def sampling_logits(
    logits: Float[Tensor, "N V"], temperature: float, kept: UInt8[Tensor, "N bytes"] | None = None
) -> Float[Tensor, "N V"]:
    """The logits of the distribution that is sampled from: at least fp32, divided by τ, −inf outside the kept set."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if kept is not None:
        logits = logits.masked_fill(~unpack_bits(kept, logits.shape[-1]), -torch.inf)
    return logits


def chosen_logprobs(logits: Float[Tensor, "N V"], tokens: Int[Tensor, " N"]) -> Float[Tensor, " N"]:
    """log softmax(logits)[token]."""
    return logits.gather(1, tokens[:, None])[:, 0] - logits.logsumexp(1)


def entropy(logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """H = −Σ_v p_v log p_v = logsumexp(z) − Σ_v p_v z_v, in nats. Tokens of probability 0 add 0."""
    p = logits.softmax(1)
    return logits.logsumexp(1) - (p * logits.masked_fill(logits == -torch.inf, 0)).sum(1)


def score_in_chunks(
    head: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "N H"],
    tokens: Int[Tensor, " N"],
    vocabulary: int,
    temperature: float,
    kept: UInt8[Tensor, "N bytes"] | None = None,
    with_entropy: bool = False,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"] | None]:
    """log π(token) and, if asked, the entropy, for N positions given by their hidden states.

    `head` maps hidden states [n, H] to logits [n, V]. With more than one chunk the logits are computed again in the
    backward pass instead of being kept, so peak memory is one chunk of logits however many tokens there are.
    """
    size = max(1, chunk_elements(hidden.device) // vocabulary)

    def score(h: Tensor, y: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor | None]:
        logits = sampling_logits(head(h), temperature, keep)
        return chosen_logprobs(logits, y), entropy(logits) if with_entropy else None

    parts = in_chunks(score, size, hidden, tokens, kept)
    logprobs = torch.cat([part[0] for part in parts])
    return logprobs, torch.cat([part[1] for part in parts]) if with_entropy else None  # type: ignore[misc]


def kl_in_chunks(
    head: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "N H"],
    other_head: Callable[[Tensor], Tensor],
    other_hidden: Float[Tensor, "N G"],
    vocabulary: int,
    temperature: float,
    kept: UInt8[Tensor, "N bytes"] | None = None,
    reverse: bool = False,
) -> Float[Tensor, " N"]:
    """KL(π ‖ other) at N positions, exact over the vocabulary; with `reverse` KL(other ‖ π).

    Like `score_in_chunks`; nothing is differentiated through the other policy.
    """

    def score(h: Tensor, g: Tensor, keep: Tensor | None) -> Tensor:
        with torch.no_grad():
            theirs = sampling_logits(other_head(g), temperature, keep)
        ours = sampling_logits(head(h), temperature, keep)
        return full(theirs, ours) if reverse else full(ours, theirs)

    size = max(1, chunk_elements(hidden.device) // (2 * vocabulary))
    return torch.cat(in_chunks(score, size, hidden, other_hidden, kept))


def in_chunks(score: Callable[..., Any], size: int, *columns: Tensor | None) -> list[Any]:
    """`score` of at most `size` positions at a time; with more than one chunk its inside is made again in backward."""
    count = next(len(column) for column in columns if column is not None)
    recompute = torch.is_grad_enabled() and count > size
    parts = []
    for start in range(0, max(count, 1), size):
        chunk = [None if column is None else column[start : start + size] for column in columns]
        parts.append(checkpoint(score, *chunk, use_reentrant=False) if recompute else score(*chunk))
    return parts
