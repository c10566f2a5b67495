"""Likelihood training: what is learnt, what only stands before it, and that a saved folder is whole."""

import json
import math
from pathlib import Path

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from hfpg.config import ConfigError
from hfpg.sft import chosen_texts, collate, fine_tune, nll, tokenized, written_by
from tests import tiny


TEXTS = [f"{tiny.WORDS[2 + i % 5]} {tiny.WORDS[7 + i % 3]}" + " ca" * (i % 4) for i in range(48)]
HOW = dict(learning_rate=1e-2, num_train_epochs=10, per_device_train_batch_size=16, use_cpu=True)


@torch.no_grad()
def one_by_one(model, rows):
    """−log π of every learnt token, one text at a time and one token at a time."""
    total, count = 0.0, 0
    for row in rows:
        for t in range(1, len(row["input_ids"])):
            if row["labels"][t] != -100:
                logits = model(input_ids=torch.tensor([row["input_ids"][:t]])).logits[0, -1]
                total -= logits.log_softmax(0)[row["labels"][t]].item()
                count += 1
    return total / count


@pytest.mark.parametrize("kind", ["gpt2", "llama", "lstm"])
def test_the_nll_is_that_of_a_plain_loop(kind):
    model = tiny.model(kind).train()
    for prompts in (None, ["aa ba", "ca"] * 24):
        rows = tokenized(tiny.tokenizer(), TEXTS, prompts)
        assert nll(model, rows[:7], batch=3) == pytest.approx(one_by_one(model.eval(), rows[:7]), rel=1e-5)
    assert math.isnan(nll(model, []))


def test_measuring_leaves_the_model_in_its_mode():
    model = tiny.model().train()
    nll(model, tokenized(tiny.tokenizer(), TEXTS[:2]))
    assert model.training


def test_the_end_of_text_is_learnt_and_the_prompt_is_not():
    (row,) = tokenized(tiny.tokenizer(), ["ba ca"], ["aa da"])
    assert row["input_ids"] == [2, 5, 3, 4, 0] and row["labels"] == [-100, -100, 3, 4, 0]
    (row,) = tokenized(tiny.tokenizer(), ["ba ca"])
    assert row["input_ids"] == row["labels"] == [3, 4, 0]


def test_a_tokenizer_that_frames_texts_itself_frames_each_once():
    """<eos> before and behind every text: one stands before the prompt, one behind the answer."""
    framed = tiny.tokenizer()
    framed.backend_tokenizer.post_processor = TemplateProcessing(
        single="<eos> $A <eos>", special_tokens=[("<eos>", 0)]
    )
    assert tokenized(framed, ["ba"], ["aa"])[0]["input_ids"] == [0, 2, 3, 0]
    assert tokenized(framed, ["ba"])[0]["input_ids"] == [0, 3, 0]


def test_a_text_that_is_cut_has_no_end():
    """Else the model would learn to end where its context does."""
    (row,) = tokenized(tiny.tokenizer(), ["aa ba ca da"], context=3)
    assert row["input_ids"] == row["labels"] == [2, 3, 4]


def test_padding_is_on_the_right_masked_and_not_learnt():
    batch = collate(tokenized(tiny.tokenizer(), ["ba ca da", "ba"]))
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[3, 4, 5, 0], [3, 0, -100, -100]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_training_lowers_the_nll_whatever_side_the_tokenizer_pads(side):
    model = tiny.model()
    before, after = fine_tune(model, tiny.tokenizer(padding_side=side), TEXTS, held_out=8, **HOW)
    held = tokenized(tiny.tokenizer(), TEXTS[:8])
    assert before == pytest.approx(one_by_one(tiny.model(), held), rel=1e-5)
    assert after == pytest.approx(one_by_one(model, held), rel=1e-5) and after < before / 2
    assert not model.training


def test_the_same_seed_learns_the_same(tmp_path):
    found = []
    for seed in (1, 1, 2):
        model = tiny.model()
        fine_tune(model, tiny.tokenizer(), TEXTS, seed=seed, **HOW | {"num_train_epochs": 1})
        found.append(model.lm_head.weight.detach().clone())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


def test_answers_are_learnt_given_their_questions():
    """Which word follows depends on the prompt alone: without it the best NLL of that word is log 2."""
    prompts = [tiny.WORDS[2 + i % 2] for i in range(64)]
    answers = [tiny.WORDS[10 + i % 2] for i in range(64)]
    _, after = fine_tune(tiny.model(), tiny.tokenizer(), answers, prompts, held_out=16, **HOW)
    assert after < 0.1 < math.log(2) / 2


def test_a_saved_folder_is_whole_and_loads(tmp_path):
    model = tiny.model()
    fine_tune(model, tiny.tokenizer(), TEXTS, output_dir=tmp_path / "sft", **HOW | {"num_train_epochs": 1})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "sft")
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "sft")("aa ba").input_ids == [2, 3]
    assert [path.name for path in tmp_path.iterdir()] == ["sft"]
    with pytest.raises(ConfigError, match="sft exists; name a folder that does not, or remove it"):
        fine_tune(model, tiny.tokenizer(), TEXTS, output_dir=tmp_path / "sft", **HOW)


def test_an_interrupted_training_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "train", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        fine_tune(tiny.model(), tiny.tokenizer(), TEXTS, output_dir=tmp_path / "sft", **HOW)
    assert not list(tmp_path.iterdir())


def test_what_a_model_writes_ends_by_itself():
    torch.manual_seed(0)
    model, tokenizer = tiny.model(), tiny.tokenizer(bos_token="<eos>")
    texts = written_by(model, tokenizer, 64, max_new_tokens=12, top_k=40)
    assert 0 < len(texts) < 64 and all(len(text.split()) < 12 and "<eos>" not in text for text in texts)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (dict(texts=[]), "0 texts are given and 0 of them held out, which leaves none"),
        (
            dict(texts=["aa", "ba"], held_out=2),
            "2 texts are given and 2 of them held out, which leaves none to learn; give more",
        ),
        (dict(texts=["aa", "ba"], prompts=["ca"]), "1 prompts stand before 2 texts; give one each"),
    ],
)
def test_what_cannot_be_learnt_is_refused(given, sentence):
    with pytest.raises(ConfigError, match=sentence):
        fine_tune(tiny.model(), tiny.tokenizer(), **given)


def test_a_tokenizer_without_an_end_of_text_is_refused():
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="has no end-of-text token; a text must learn to end"):
        fine_tune(tiny.model(), tokenizer, TEXTS)


def preferences(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_chosen_texts_stand_once_without_ties(tmp_path):
    rows = [dict(chosen=text, rejected="x", tie=text == "A tie.") for text in ("B.", "A tie.", "a span of", "B.")]
    path = preferences(tmp_path / "pairs.jsonl", *rows)
    assert chosen_texts(path) == ["B.", "a span of"]
    assert chosen_texts(path, sentences=True) == ["B."]
    assert chosen_texts(preferences(path, {"chosen": "spans only"}), sentences=True) == ["spans only"]
    path.write_text('{"chosen": "one\u2028text"}\r\n\n', encoding="utf-8")
    assert chosen_texts(path) == ["one\u2028text"]


def test_a_tie_is_read_as_a_reward_model_reads_it(tmp_path):
    rows = [
        dict(chosen=f"{i}.", rejected="x", **more)
        for i, more in enumerate(
            [
                {"tie": "no"},
                {"tie": "0"},
                {"tie": None},
                {"tie": "Yes"},
                {"tie": 1},
                {"score_chosen": 2, "score_rejected": 2},
            ]
        )
    ]
    rows.append(dict(chosen="same", rejected="same"))
    assert chosen_texts(preferences(tmp_path / "pairs.jsonl", *rows)) == ["0.", "1.", "2."]
    with pytest.raises(ConfigError, match="pairs.jsonl:1: tie='maybe' is neither true nor false"):
        chosen_texts(preferences(tmp_path / "pairs.jsonl", dict(chosen="a", tie="maybe")))
    (tmp_path / "pairs.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="cannot read the preferences .*utf-8"):
        chosen_texts(tmp_path / "pairs.jsonl")


def test_prompts_that_fill_the_context_are_said(caplog):
    model = tiny.model()
    long, short = "a b " * model.config.n_positions, "a b"
    with caplog.at_level("WARNING", logger="hfpg.sft"):
        fine_tune(model, tiny.tokenizer(), ["c"] * 3, [long, short, short], max_steps=1, use_cpu=True)
    assert "1 of 3 texts are not learnt" in caplog.text
    with pytest.raises(ConfigError, match="all 2 prompts fill the model's context of .* tokens"):
        fine_tune(model, tiny.tokenizer(), ["c"] * 2, [long, long], max_steps=1, use_cpu=True)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("{", "pairs.jsonl:2: no JSON: "),
        ('{"prompt": "x"}', "pairs.jsonl:2: expected a text in the column 'chosen', found '{"),
        ('{"chosen": [{"role": "user"}]}', "pairs.jsonl:2: expected a text in the column 'chosen'"),
        ("[1]", "pairs.jsonl:2: expected a text in the column 'chosen', found '\\[1\\]'"),
    ],
)
def test_a_row_that_is_no_preference_is_named(tmp_path, line, sentence):
    path = preferences(tmp_path / "pairs.jsonl", {"chosen": "fine"})
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(ConfigError, match=sentence):
        chosen_texts(path)
    with pytest.raises(ConfigError, match="cannot read the preferences .*gone.jsonl: No such file"):
        chosen_texts(tmp_path / "gone.jsonl")
