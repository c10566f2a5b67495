"""How the build deals out sentences: by a hash that never changes, and no text twice."""

import hashlib
import importlib
import io
import tarfile
from pathlib import Path

import pytest

from hfpg import ConfigError


REWARD_MODELS = Path(__file__).resolve().parents[2] / "reward_models"
ROWS = {
    "movieReviewSnippets_GroundTruth.txt": ["1\t2.5\tA ''great''  film.", "2\t-1\tA bad film.", "3\t1.0\tA Bad film!"],
    "amazonReviewSnippets_GroundTruth.txt": ["1_1\t0.5\ta great film", "1_2\t-0.25\tit broke."],
    "nytEditorialSnippets_GroundTruth.txt": ["1_1\t0.1\tCongress met."],
    "tweets_GroundTruth.txt": ["1\t3\tfun &amp; games"],
}


@pytest.fixture
def data(monkeypatch):
    monkeypatch.syspath_prepend(REWARD_MODELS)
    return importlib.import_module("embedded_data")


def tar_gz(files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture
def cache(data, monkeypatch, tmp_path):
    """A folder with a sdist of the right shape and a handful of sentences, whose hash the build is told to expect."""
    texts = {f"hutto_ICWSM_2014/{name}": "\r\n".join([*rows, ""]).encode() for name, rows in ROWS.items()}
    sdist = tar_gz({data.RATINGS: tar_gz(texts)})
    (tmp_path / data.SDIST).write_bytes(sdist)
    monkeypatch.setattr(data, "SDIST_SHA256", hashlib.sha256(sdist).hexdigest())
    return tmp_path


def test_shares_add_up_to_one_hundred(data):
    assert {source: sum(shares.values()) for source, shares in data.SHARES.items()} == dict.fromkeys(data.SOURCES, 100)


def test_parts_are_those_that_the_shipped_models_were_built_with(data):
    ids = [str(number) for number in range(1, 4001)]
    parts = [data.part_of("movie", sentence_id) for sentence_id in ids]
    assert hashlib.sha256(" ".join(parts).encode()).hexdigest()[:16] == "afee4ba0d7eee181"
    assert [round(100 * parts.count(part) / len(parts)) for part in data.SHARES["movie"]] == pytest.approx(
        [60, 20, 15, 5], abs=2
    )


def test_a_text_met_twice_is_kept_once_and_in_the_first_source(data, cache):
    found = [(s.source, s.id, s.text, s.rating) for s in data.load(cache)]
    assert found == [
        ("movie", "1", 'A "great" film.', 2.5),
        ("movie", "2", "A bad film.", -1.0),
        ("amazon", "1_2", "it broke.", -0.25),
        ("nyt", "1_1", "Congress met.", 0.1),
        ("tweet", "1", "fun & games", 3.0),
    ]


def test_another_archive_is_refused(data, cache, monkeypatch):
    monkeypatch.setattr(data, "SDIST_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="expected 0000.*delete it and run again"):
        data.load(cache)


def test_an_archive_that_cannot_be_fetched_is_one_sentence(data, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ConfigError, match="vaderSentiment==3.3.2 cannot be fetched: see what pip says above"):
        data.fetch(tmp_path / "new")
