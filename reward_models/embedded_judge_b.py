"""Judge B, the held-out gold judge of the demo: fit the ridge regression that `hfpg/embedded/judge_b.py` evaluates."""

import json
import time
from pathlib import Path

import numpy as np
from embedded_data import Sentence, make_readable, select
from embedded_metrics import agreement
from safetensors.numpy import save_file
from scipy.sparse import csr_matrix
from sklearn.linear_model import Ridge
from sklearn.preprocessing import normalize

from hfpg.embedded.judge_b import BUCKETS, SIZES, counts, load_weights, rate


FILM_WEIGHT, OTHER_WEIGHT = 1.0, 0.25
# Chosen on judge B's own sentences (see `choose_alpha`), among these.
ALPHAS = (0.12, 0.25, 0.5, 1.0)


def count_matrix(texts: list[str]) -> csr_matrix:
    """One row of 1 + log counts per text."""
    rows = [counts(text) for text in texts]
    ends = np.cumsum([0] + [len(buckets) for buckets, _ in rows])
    values = np.concatenate([value for _, value in rows])
    return csr_matrix((values, np.concatenate([b for b, _ in rows]), ends), shape=(len(texts), BUCKETS))


def inverse_document_frequency(matrix: csr_matrix) -> np.ndarray:
    """log((1 + texts) / (1 + texts that fill the bucket)) + 1, rounded to the half precision that is shipped."""
    filled = np.bincount(matrix.indices, minlength=BUCKETS)
    return (np.log((1 + matrix.shape[0]) / (1 + filled)) + 1).astype(np.float16)


def choose_alpha(x: csr_matrix, ratings: np.ndarray, film: np.ndarray, weights: np.ndarray) -> dict[float, float]:
    """Mean squared error on a fifth of the film sentences, after fitting all the rest, for each ridge strength."""
    held = film & (np.arange(len(film)) % 5 == 0)
    errors = {}
    for alpha in ALPHAS:
        ridge = Ridge(alpha=alpha).fit(x[~held], ratings[~held], sample_weight=weights[~held])
        errors[alpha] = round(float(np.mean((ridge.predict(x[held]) - ratings[held]) ** 2)), 4)
    return errors


def build(sentences: list[Sentence], folder: Path) -> dict:
    """Fit, save in half precision, and measure the files on disk."""
    own, start = select(sentences, "judge_b"), time.perf_counter()
    matrix = count_matrix([s.text for s in own])
    idf = inverse_document_frequency(matrix)
    x = normalize(matrix.multiply(idf.astype(np.float64)).tocsr())
    ratings, film = np.array([s.rating for s in own]), np.array([s.source == "movie" for s in own])
    weights = np.where(film, FILM_WEIGHT, OTHER_WEIGHT)
    errors = choose_alpha(x, ratings, film, weights)
    alpha = min(errors, key=lambda strength: errors[strength])
    ridge = Ridge(alpha=alpha).fit(x, ratings, sample_weight=weights)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"idf": idf, "weight": ridge.coef_.astype(np.float16)}, folder / "weights.safetensors")
    facts = {"buckets": BUCKETS, "ngrams": list(SIZES), "alpha": alpha, "intercept": round(float(ridge.intercept_), 6)}
    (folder / "judge.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    make_readable(folder)
    load_weights.cache_clear()
    held_out = {part: select(sentences, part, "movie") for part in ("prompts", "judge_a")}
    measured = {
        part: agreement([rate(s.text, folder) for s in found], [s.rating for s in found])
        for part, found in held_out.items()
    }
    return {"seconds": round(time.perf_counter() - start), "alpha": alpha, "errors": errors, "judge": measured}
