"""Judge B, which only watches: ridge regression of human ratings on hashed character n-grams, in numpy.

rating(text) = w · x / |x| + b,    x_j = (1 + log count_j) · idf_j

where j runs over the hashes of all runs of 3 to 5 characters within a word, its borders counting as spaces. It
shares neither features nor training sentences with judge A, which makes it a check on tricks that please A alone.
"""

import json
from functools import cache, lru_cache
from pathlib import Path
from zlib import crc32

import numpy as np
from safetensors.numpy import load_file


FOLDER = Path(__file__).resolve().parent / "judge-b"
SIZES = (3, 4, 5)
BUCKETS = 2**17


@lru_cache(maxsize=65536)
def word_buckets(word: str) -> tuple[int, ...]:
    """The hash buckets of a word's character n-grams."""
    padded = f" {word} "
    grams = (padded[i : i + n] for n in SIZES for i in range(len(padded) - n + 1))
    return tuple(crc32(gram.encode()) % BUCKETS for gram in grams)


def counts(text: str) -> tuple[np.ndarray, np.ndarray]:
    """The buckets that a text fills, and 1 + log of how often it fills each."""
    filled = [bucket for word in text.lower().split() for bucket in word_buckets(word)]
    buckets, number = np.unique(np.array(filled, dtype=np.int64), return_counts=True)
    return buckets, 1 + np.log(number)


@cache
def load_weights(folder: Path = FOLDER) -> tuple[np.ndarray, np.ndarray, float]:
    """idf and w of each bucket, and b."""
    arrays = load_file(folder / "weights.safetensors")
    bias = json.loads((folder / "judge.json").read_text(encoding="utf-8"))["intercept"]
    return arrays["idf"].astype(np.float64), arrays["weight"].astype(np.float64), bias


def rate(text: str, folder: Path = FOLDER) -> float:
    """The rating of one text, about -4 to 4; a text without a word gets the mean rating b."""
    idf, weight, bias = load_weights(folder)
    buckets, x = counts(text)
    x = x * idf[buckets]
    norm = np.sqrt(x @ x)
    return float(bias + weight[buckets] @ x / norm) if norm > 0 else bias


def judge_b(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    """A reward function: the rating of each prompt + completion, -4 to 4. Other columns are ignored."""
    return [rate(prompt + completion) for prompt, completion in zip(prompts, completions, strict=True)]
