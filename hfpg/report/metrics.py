"""Numbers that describe a rollout. One word per thing: see docs/glossary.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hfpg.ops.masked import correlation, masked_mean, row_mean, row_std
from hfpg.types import Estimates, Rollout


def describe(rollout: Rollout, by_function: dict[str, list[float | None]]) -> dict[str, float]:
    """Scores, lengths, entropy and KL of a rollout, as plain floats; means over rows use the row weights.

    score, score_std        of the weighted score per completion; scores/NAME for each reward function
    kl_to_ref               nats per completion, mean of Σ_t (log π_old − log π_ref), scored or not
    entropy                 nats per token
    length, finished        tokens per completion; share that ended by a stop token
    sampler_gap             largest |log μ − log π_old|: rounding only, or sampling and scoring disagree; absent where
                            the one is taken for the other
    unscored                share of completions without a score: all abstained, or a failure dropped it
    baseline_score          mean score of the greedy completions, or of the prompts, where the baseline is that
    baseline_correlation    of that score with the completions' scores: near 0 it saves no variance
    """
    w, mask = rollout.weights, rollout.completion_mask
    found = {
        "score": float(row_mean(rollout.scores, w)) if w.any() else float("nan"),
        "score_std": float(row_std(rollout.scores, w)) if w.any() else float("nan"),
        "entropy": float(masked_mean(rollout.entropy, mask, torch.ones_like(w))),
        "length": float(mask.sum(1).float().mean()),
        "finished": float(rollout.finished.float().mean()),
        "unscored": float((w == 0).float().mean()),
    }
    for name, values in by_function.items():
        judged = [v for v in values if v is not None]
        found[f"scores/{name}"] = sum(judged) / len(judged) if judged else float("nan")
    if rollout.baseline_scores is not None:
        known = torch.where(rollout.baseline_scores.isnan(), 0, w)
        found["baseline_score"] = float(row_mean(rollout.baseline_scores, known))
        found["baseline_correlation"] = float(correlation(rollout.baseline_scores, rollout.scores, known))
    if rollout.ref_logprobs is not None:
        log_ratio = torch.where(mask, rollout.old_logprobs - rollout.ref_logprobs, 0)
        found["kl_to_ref"] = float(row_mean(log_ratio.sum(1), torch.ones_like(w)))
    if rollout.sampler_logprobs is not None and not torch.equal(rollout.sampler_logprobs, rollout.old_logprobs):
        found["sampler_gap"] = float((rollout.sampler_logprobs - rollout.old_logprobs).abs().max())
    return found


def explained_variance(rollout: Rollout, estimates: Estimates) -> float:
    """1 − Var(R − V) / Var(R) over chosen tokens: 1 a perfect critic, 0 one that knows nothing; 0 for constant R."""
    if rollout.values is None or estimates.returns is None:
        return 0.0
    residual = _variance(estimates.returns - rollout.values, rollout)
    total = _variance(estimates.returns, rollout)
    return float(1 - residual / total) if total > 0 else 0.0


def _variance(x: Float[Tensor, "B C"], rollout: Rollout) -> Tensor:
    mean = masked_mean(x, rollout.completion_mask, rollout.weights)
    return masked_mean((x - mean) ** 2, rollout.completion_mask, rollout.weights)


def distinct_2(rows: Sequence[Sequence[int]]) -> float:
    """Different token bigrams ÷ all token bigrams, over all completions: falls when texts grow alike."""
    pairs = [pair for row in rows for pair in zip(row, row[1:], strict=False)]
    return len(set(pairs)) / len(pairs) if pairs else 0.0


def top_bigram_share(texts: Sequence[str]) -> tuple[str, float]:
    """The word bigram that stands in most texts, and the share of texts that have it."""
    counts: Counter[tuple[str, str]] = Counter()
    for text in texts:
        words = text.lower().split()
        counts.update(set(zip(words, words[1:], strict=False)))
    if not counts:
        return "", 0.0
    pair, count = min(counts.items(), key=lambda item: (-item[1], item[0]))  # ties: the first by alphabet
    return " ".join(pair), count / len(texts)
