"""The cards, notice and hashes of `hfpg/embedded`: templates in `cards/`, filled with what the stages measured."""

import hashlib
import json
from pathlib import Path

import embedded_judge_a
import embedded_judge_b
import numpy as np
from card import fill
from embedded_data import PACKAGE, SDIST_SHA256, SHARES, Sentence, fetch, member, select
from embedded_metrics import agreement, vader_lexicon, vader_scores

from hfpg.embedded.judge_b import BUCKETS, rate


LICENSE = "vaderSentiment-3.3.2/LICENSE.txt"


def sha256(path: Path) -> str:
    """The hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def common(sentences: list[Sentence]) -> dict[str, str]:
    """The paragraphs that stand on every card: the source and the split."""
    parts = list(SHARES["movie"])
    lines = ["| source | " + " | ".join(parts) + " |", "|---|" + "---|" * len(parts)]
    for source in SHARES:
        counts = [f"{len(select(sentences, part, source)):,}" for part in parts]
        lines.append(f"| {source} | " + " | ".join(counts) + " |")
    return {
        "source": fill("source.md", package=PACKAGE, sdist_sha256=SDIST_SHA256).strip(),
        "split": fill("split.md", table="\n".join(lines)).strip(),
    }


def file_facts(path: Path) -> dict[str, str]:
    """Size and hash of a weights file."""
    return {"megabytes": f"{path.stat().st_size / 1e6:.2f}", "sha256": sha256(path)}


def agreement_table(judges: dict[str, dict[str, dict]]) -> str:
    """Judge -> part -> agreement, as a table with its legend."""
    rows = [
        f"| {judge} | {part} | {f['n']:,} | {f['r']:.3f} | {f['sign_accuracy']:.3f} | {f['pair_accuracy']:.3f} "
        f"| {f['slope']:.2f} |"
        for judge, parts in judges.items()
        for part, f in parts.items()
    ]
    return fill("agreement.md", rows="\n".join(rows)).strip()


def vader_facts(sentences: list[Sentence], work: Path, *parts: str) -> dict[str, dict]:
    """The word list's agreement on the film sentences of each part."""
    lexicon, facts = vader_lexicon(work), {}
    for part in parts:
        films = select(sentences, part, "movie")
        facts[part] = agreement(vader_scores([s.text for s in films], lexicon), [s.rating for s in films])
    return facts


def judges_correlation(sentences: list[Sentence], out: Path) -> float:
    """Pearson r between judge A and judge B on the prompts' sentences, which neither has seen."""
    texts = [s.text for s in select(sentences, "prompts")]
    a = embedded_judge_a.scores(out / "judge-a", texts)
    return float(np.corrcoef(a, [rate(text, out / "judge-b") for text in texts])[0, 1])


def lm_card(facts: dict, sweep: list[dict], sentences: list[Sentence], weights: Path) -> str:
    """The card of the language model."""
    rows = [
        f"| {r['batch']} | {r['steps']:,} | {r['tokens']:,} | {r['seconds']} | {r['bits_per_char']:.3f} |"
        for r in sweep
    ]
    counts = ("parameters", "film_sentences", "editorial_sentences", "validation_sentences", "tokens", "steps")
    return fill(
        "lm.md",
        **facts["recipe"],
        **file_facts(weights),
        **common(sentences),
        **{name: f"{facts[name]:,}" for name in counts},
        best_epoch=facts["best_epoch"],
        minutes=f"{facts['seconds'] / 60:.1f}",
        curve=", ".join(f"{value:.3f}" for value in facts["curve"]),
        sweep="\n".join(rows),
        prompts_sentences=len(select(sentences, "prompts")),
        validation_bits=f"{facts['bits_per_char']['validation']:.3f}",
        prompts_bits=f"{facts['bits_per_char']['prompts']:.3f}",
    )


def judge_a_card(facts: dict, vader: dict, correlation: float, sentences: list[Sentence], weights: Path) -> str:
    """The card of judge A."""
    judges = {"judge A": facts["judge"], "its TF-IDF teacher": facts["teacher"], "VADER word list": vader}
    return fill(
        "judge_a.md",
        **file_facts(weights),
        **common(sentences),
        parameters=f"{facts['parameters']:,}",
        vocabulary=f"{facts['vocabulary']:,}",
        agreement=agreement_table(judges),
        correlation=f"{correlation:.3f}",
        seed=facts["seed"],
        seconds=facts["seconds"],
        slope=f"{facts['slope']:.2f}",
        spans=f"{embedded_judge_a.SPANS:,}",
        film_weight=embedded_judge_a.FILM_WEIGHT,
        other_weight=embedded_judge_a.OTHER_WEIGHT,
    )


def judge_b_card(facts: dict, vader: dict, correlation: float, sentences: list[Sentence], weights: Path) -> str:
    """The card of judge B."""
    return fill(
        "judge_b.md",
        **file_facts(weights),
        **common(sentences),
        buckets=f"{BUCKETS:,}",
        agreement=agreement_table({"judge B": facts["judge"], "VADER word list": vader}),
        correlation=f"{correlation:.3f}",
        seconds=facts["seconds"],
        alpha=facts["alpha"],
        errors=", ".join(f"{alpha}: {error:.3f}" for alpha, error in facts["errors"].items()),
        film_weight=embedded_judge_b.FILM_WEIGHT,
        other_weight=embedded_judge_b.OTHER_WEIGHT,
    )


def hashes(out: Path) -> dict[str, str]:
    """The hash of every file that a model, a judge or a run is made from."""
    names = ("*/*.safetensors", "*/tokenizer.json", "*/config.json", "*/judge.json", "prompts.json")
    files = sorted(path for name in names for path in out.glob(name))
    return {path.relative_to(out).as_posix(): sha256(path) for path in files}


def write(out: Path, work: Path, sentences: list[Sentence]) -> None:
    """Write NOTICE, the cards of what the work folder has measurements of, and hashes.json."""
    license_text = member(fetch(work).read_bytes(), LICENSE).decode("utf-8").strip()
    (out / "NOTICE").write_text(fill("notice.txt", package=PACKAGE, license=license_text), encoding="utf-8")
    facts = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in work.glob("*.json")}
    if "lm" in facts:
        weights = out / "tiny-gpt2-reviews" / "model.safetensors"
        card = lm_card(facts["lm"], facts["sweep"], sentences, weights)
        weights.with_name("README.md").write_text(card, encoding="utf-8")
    if "judge_a" in facts and "judge_b" in facts:
        r = judges_correlation(sentences, out)
        weights = out / "judge-a" / "model.safetensors"
        vader = vader_facts(sentences, work, "prompts", "judge_b")
        card = judge_a_card(facts["judge_a"], vader, r, sentences, weights)
        weights.with_name("README.md").write_text(card, encoding="utf-8")
        weights = out / "judge-b" / "weights.safetensors"
        vader = vader_facts(sentences, work, "prompts", "judge_a")
        card = judge_b_card(facts["judge_b"], vader, r, sentences, weights)
        weights.with_name("README.md").write_text(card, encoding="utf-8")
    (out / "hashes.json").write_text(json.dumps(hashes(out), indent=1) + "\n", encoding="utf-8")
