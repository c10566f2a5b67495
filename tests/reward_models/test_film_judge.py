"""film_judge.py: pairs from ratings, whose texts nobody else has learnt."""

import random

import torch
from embedded_data import Sentence
from film_judge import about, main, pair, shorten, span, write_backbone, write_pairs
from train import Script, load_backbone

from hfpg import embedded
from hfpg.rewards import ClassifierReward


def sentences(part, count=40, source="movie"):
    return [
        Sentence(source, str(i), part, f"{part} {i} is a text of words", (i % 9) - 4.0 + 0.01 * i)
        for i in range(count)
    ]


def test_the_higher_rating_is_chosen_near_ones_tie_and_those_between_are_left_out():
    rated = {s.text: s.rating for s in sentences("judge_a")}
    rows = pair(sentences("judge_a"), 20, "test")
    gaps = [(rated[r["chosen"]] - rated[r["rejected"]], r["tie"]) for r in rows]
    assert all(gap >= 1 for gap, tie in gaps if not tie)
    assert all(0 <= gap < 0.5 for gap, tie in gaps if tie)
    assert {tie for _, tie in gaps} == {True, False}


def test_one_round_uses_each_sentence_once():
    rows = pair(sentences("prompts"), 1, "test")
    used = [r[side] for r in rows for side in ("chosen", "rejected")]
    assert len(used) == len(set(used))


def test_spans_are_words_in_a_row_and_every_fourth_pair_is_whole():
    words = "one two three four five six"
    found = {span(words, random.Random(i)) for i in range(200)}
    assert all(piece in words and len(piece.split()) >= 3 for piece in found)
    assert span("one two", random.Random(0)) == "one two"
    rows = pair(sentences("judge_a"), 4, "test")
    assert [r for i, r in enumerate(shorten(rows, 0)) if i % 4 == 0] == rows[::4]


def test_training_and_held_out_pairs_come_from_different_parts(tmp_path):
    parts = [s for part in ("judge_a", "judge_b", "prompts", "lm") for s in sentences(part)]
    training, held_out = (path.read_text() for path in write_pairs(parts, tmp_path))
    assert "judge_b" not in training and "prompts" not in training
    assert "judge_a" not in held_out and "prompts" in held_out and "judge_b" in held_out
    assert " lm " not in training + held_out


def test_the_backbone_is_judge_a_without_what_it_knows(tmp_path):
    folder = str(write_backbone(tmp_path / "fresh"))
    fresh, known = (ClassifierReward(name).model.state_dict() for name in (folder, embedded.JUDGE_A))
    assert {name: w.shape for name, w in fresh.items()} == {name: w.shape for name, w in known.items()}
    embeddings = "model.embeddings.tok_embeddings.weight"
    r = torch.corrcoef(torch.stack([fresh[embeddings].flatten(), known[embeddings].flatten()]))[0, 1]
    assert abs(r) < 0.02
    model, _ = load_backbone(Script(model=folder, dataset="x"))
    assert torch.equal(model.classifier.weight, fresh["classifier.weight"])  # drawn once, by write_backbone


def test_the_card_says_whose_ratings_they_are_and_whom_to_cite():
    parts = [s for part in ("judge_a", "judge_b", "prompts", "lm") for s in sentences(part)]
    told = about([*parts, *sentences("judge_a", 7, "tweet")])
    for words in (
        "made from ratings: nobody chose",
        "Trained on 40 film-review sentences, 0\nproduct reviews and 7 tweets",
        "held out: 80 film-review\nsentences",
        "source distribution of `vaderSentiment==3.3.2` (MIT licence,",
        "Please cite C.J. Hutto and E.E. Gilbert, *VADER: A Parsimonious Rule-based Model",
        "ICWSM-14",
        "@inproceedings{hutto2014vader,",
        "year      = {2014}",
        "B. Pang and L. Lee",
    ):
        assert words in told, words
    assert "$" not in told


def test_the_command_makes_a_judge_whose_card_has_that_paragraph(tmp_path, monkeypatch):
    """With made-up ratings in the place of the fetched ones, for three steps."""
    parts = [s for part in ("judge_a", "judge_b", "prompts") for s in sentences(part)]
    monkeypatch.setattr("film_judge.load", lambda work: parts)
    monkeypatch.setattr("film_judge.WORK", tmp_path)
    facts = main(["--output_dir", str(tmp_path / "judge"), "--max_steps", "3", "--disable_tqdm", "True"])
    assert facts["steps"] == 3 and facts["prompts"]["n"] == 40
    card = (tmp_path / "judge" / "README.md").read_text(encoding="utf-8")
    assert f"## Data\n\n{about(parts).strip()}\n\n## How it was made" in card
    assert card.startswith("---\nlibrary_name: transformers") and "license: mit" in card
    others = ["--dataset", str(tmp_path / "held_out.jsonl"), "--output_dir", str(tmp_path / "other")]
    main([*others, "--max_steps", "1", "--disable_tqdm", "True"])
    card = (tmp_path / "other" / "README.md").read_text(encoding="utf-8")
    assert "Hutto" not in card, "other data have other authors"
