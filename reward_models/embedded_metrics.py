"""How well a judge agrees with people: correlation, sign and pairs. And the yardstick: the VADER word list."""

import re
from pathlib import Path

import numpy as np
from embedded_data import LEXICON, fetch, member


def agreement(scores: list[float], ratings: list[float]) -> dict[str, float]:
    """Pearson r; right signs where |rating| > 0.5; right orders among pairs rated more than 1 apart; slope."""
    x, y = np.asarray(scores, dtype=np.float64), np.asarray(ratings, dtype=np.float64)
    clear = np.abs(y) > 0.5
    apart = y[:, None] - y[None] > 1
    facts = {
        "r": np.corrcoef(x, y)[0, 1],
        "sign_accuracy": np.mean((x[clear] > 0) == (y[clear] > 0)),
        "pair_accuracy": np.mean((x[:, None] - x[None])[apart] > 0),
        "slope": np.polyfit(x, y, 1)[0],
    }
    return {"n": len(y)} | {name: round(float(value), 3) for name, value in facts.items()}


def vader_lexicon(cache: Path) -> dict[str, float]:
    """Word -> valence of the VADER word list, -4 to 4."""
    lines = member(fetch(cache).read_bytes(), LEXICON).decode("utf-8").splitlines()
    return {word: float(valence) for word, valence, *_ in (line.split("\t") for line in lines if line.strip())}


def vader_scores(texts: list[str], lexicon: dict[str, float]) -> list[float]:
    """VADER's compound score without its grammar rules: s / sqrt(s^2 + 15), s being the sum of the word valences."""
    sums = np.array([sum(lexicon.get(word, 0.0) for word in re.findall(r"[\w'-]+", text.lower())) for text in texts])
    return (sums / np.sqrt(sums**2 + 15)).tolist()
