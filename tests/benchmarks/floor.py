"""What the matrix products of a step alone would cost, at the speed at which this machine does them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from tests.benchmarks.measure import Seconds, now
from tests.benchmarks.work import Work


@dataclass(frozen=True)
class Weights:
    """Weights of the trunk's matrices, embeddings apart, and of the LM head: a token costs two operations for each."""

    trunk: int
    head: int


def matrix_weights(config: Any) -> Weights:
    """Of the causal LM that a config describes; no memory is filled."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in model.base_model.parameters() if p.dim() == 2 and id(p) not in tables]
    return Weights(sum(p.numel() for p in matrices), model.get_output_embeddings().weight.numel())


@dataclass(frozen=True)
class Rates:
    """10⁹ operations a second in matrix products: of a large one, and of a decode step."""

    large: float
    skinny: float


def measured_rates(work: Work, width: int, weights: Weights) -> tuple[Rates, Rates]:
    """Rates per second on the clock, and per CPU second of all threads, with the threads of the work.

    The fastest of some tries, because a floor is what cannot be beaten. A decode step has one row per sample, and goes
    through as many weights as the model has (512 MB at most), so that they come from where the model's do.
    """
    torch.set_num_threads(work.threads)
    kind: Any = dict(device=work.device, dtype=torch.bfloat16 if work.bf16 else torch.float32)
    rows, inner, outer = (1024, 768, 3072) if work.device == "cpu" else (8192, 4096, 8192)
    large = product_rate(torch.randn(rows, inner, **kind), torch.randn(1, inner, outer, **kind))
    copies = min(weights.trunk + weights.head, 1 << 27) // (4 * width**2)
    weights_of = torch.randn(max(1, copies), width, 4 * width, **kind)
    skinny = product_rate(torch.randn(work.samples, width, **kind), weights_of)
    return Rates(large[0], skinny[0]), Rates(large[1], skinny[1])


def fastest(first: tuple[Rates, Rates], second: tuple[Rates, Rates]) -> tuple[Rates, Rates]:
    """The larger of two measurements, by each clock: a busy neighbour only makes rates smaller."""

    def larger(a: Rates, b: Rates) -> Rates:
        return Rates(max(a.large, b.large), max(a.skinny, b.skinny))

    return larger(first[0], second[0]), larger(first[1], second[1])


def product_rate(x: Tensor, weights: Tensor, tries: int = 20, clocks: Callable[[], Seconds] = now) -> Seconds:
    """The largest rate of X [rows, k] · W [k, n] over several tries, by the clock and by CPU time.

    The faster of torch's own product and oneDNN's: MKL leaves the widest units of some processors unused. A try goes
    through all W once, or as often as makes some ms, because clocks are coarse.
    """
    operations = 2e-9 * x.shape[0] * weights.numel()
    repeats = max(1, round((0.5 if x.device.type == "cpu" else 500) / operations))
    best = (0.0, 0.0)
    for multiply in products() if x.device.type == "cpu" else [torch.mm]:
        for number in range(tries + 3):
            start = clocks()
            for _ in range(repeats):
                for w in weights:
                    multiply(x, w)
            end = clocks()
            if number >= 3:  # the first ones warm up
                wall, cpu = (repeats * operations / (e - s) for s, e in zip(start, end, strict=True))
                best = (max(best[0], wall), max(best[1], cpu))
    return best


def products() -> list[Callable[[Tensor, Tensor], Tensor]]:
    """The ways to multiply two matrices in single precision that this torch has."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return [torch.mm]
    return [torch.mm, lambda x, w: torch.ops.mkldnn._linear_pointwise(x, w.T, None, "none", [], "")]


def floor(
    work: Work, weights: Weights, prompt_tokens: float, completion_tokens: float, rates: Rates
) -> dict[str, float]:
    """Seconds of the products of one step, by part and in `total`.

    A forward pass is 2 operations per weight and position, a training pass 6. Positions are real tokens, a prompt
    counted once for all of its completions; the head works at completion tokens only; old log-probs and, with a shared
    trunk, values cost nothing. Attention, norms, activations, softmax and sampling are left out.
    """
    trunk, head, positions = weights.trunk, weights.head, prompt_tokens + completion_tokens
    once = 2e-9 * (positions * trunk + completion_tokens * head)
    critic = 2e-9 * positions * trunk if work.algorithm == "ppo" and work.value == "separate" else 0.0
    decode = 2e-9 * completion_tokens * (trunk + head)
    parts = {
        "generate": 2e-9 * prompt_tokens * trunk / rates.large + decode / rates.skinny,
        "score": (critic + (once if work.kl_coef else 0.0)) / rates.large,
        "train": 3 * work.epochs * (once + critic) / rates.large,
    }
    return parts | {"total": sum(parts.values())}
