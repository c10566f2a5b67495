"""Rule judges."""

import sys

import pytest

from hfpg.config import ConfigError
from hfpg.rewards import rules
from hfpg.rewards.rules import sentiment_lexicon


def test_the_lexicon_tells_good_from_bad():
    pytest.importorskip("vaderSentiment", reason="the lexicon is an optional dependency: hfpg[lexicon]")
    good, bad, flat, empty, negated = sentiment_lexicon(
        ["A wonderful, moving film!", "A terrible, boring mess.", "It has two hours.", "", "It is not good."]
    )
    assert good > 0.5 and bad < -0.5 and flat == empty == 0 and negated < 0
    assert all(-1 <= s <= 1 for s in (good, bad, flat, empty, negated))


def test_the_lexicon_reads_conversations():
    pytest.importorskip("vaderSentiment", reason="the lexicon is an optional dependency: hfpg[lexicon]")
    message = [{"role": "assistant", "content": "I love it"}]
    assert sentiment_lexicon([message], prompts=["ignored"]) == sentiment_lexicon(["I love it"])


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    rules._analyzer.cache_clear()
    with pytest.raises(ConfigError, match=r'needs vaderSentiment: pip install "hfpg\[lexicon\]"'):
        sentiment_lexicon(["good"])
    rules._analyzer.cache_clear()
