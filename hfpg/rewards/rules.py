"""Rule judges: thin functions over well-kept libraries."""

from __future__ import annotations

import functools
from typing import Any

from hfpg.config import ConfigError


@functools.cache
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise ConfigError('the sentiment lexicon needs vaderSentiment: pip install "hfpg[lexicon]"') from None
    return SentimentIntensityAnalyzer()


def sentiment_lexicon(completions: list, **columns: Any) -> list[float]:
    """Sentiment of each completion in [−1, 1] by the VADER lexicon (Hutto & Gilbert 2014)."""
    texts = [c if isinstance(c, str) else " ".join(str(m.get("content", "")) for m in c) for c in completions]
    return [float(_analyzer().polarity_scores(text)["compound"]) for text in texts]
