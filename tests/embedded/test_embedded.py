"""The embedded default: the files are those of the cards, and they behave as the demo needs."""

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hfpg import embedded


ROOT = Path(embedded.__file__).parent
WEIGHTS = ["tiny-gpt2-reviews/model.safetensors", "judge-a/model.safetensors", "judge-b/weights.safetensors"]
PRAISE = [
    "A warm and funny film with wonderful performances.",
    "An intelligent, beautiful and deeply moving story.",
    "The best comedy of the year, and a delight from start to finish.",
    "A thrilling and original adventure.",
    "Excellent acting makes this a powerful drama.",
]
BLAME = [
    "A dull and stupid film without a single laugh.",
    "The script is bad and the acting is worse.",
    "A boring, pointless mess that never ends.",
    "It fails as a comedy and it fails as a thriller.",
    "Lifeless, predictable and far too long.",
]
TEXTS = [
    "The film is",
    'He said "no," didn\'t he? -- yes: 3.5 stars!',
    "Amélie, naïve café; 映画 🎬",
    " two  spaces and a tab\tand a line\nbreak ",
    "",
]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small models are faster on one thread than on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(embedded.MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(embedded.MODEL)


@pytest.fixture(scope="module")
def judge_a():
    """Judge A as a function of texts, loaded and called like any classifier of the Hub."""
    classifier = AutoModelForSequenceClassification.from_pretrained(embedded.JUDGE_A, dtype=torch.float32).eval()
    encode = AutoTokenizer.from_pretrained(embedded.JUDGE_A)

    @torch.no_grad()
    def rate(texts):
        return classifier(**encode(texts, padding=True, truncation=True, return_tensors="pt")).logits[:, 0]

    return rate


def rate_b(texts):
    return torch.tensor(embedded.judge_b([""] * len(texts), texts))


@torch.no_grad()
def bits_per_char(model, tokenizer, text):
    """Bits per character of `<bos> text <eos>`, in plain tensors."""
    ids = torch.tensor([*tokenizer(text).input_ids, tokenizer.eos_token_id])
    logprobs = model(ids[None, :-1], attention_mask=torch.ones(1, len(ids) - 1)).logits[0].log_softmax(-1)
    return -logprobs.gather(1, ids[1:, None]).sum().item() / math.log(2) / len(text)


# --- files ---


def test_every_hashed_file_is_the_one_that_was_built():
    hashes = json.loads((ROOT / "hashes.json").read_text(encoding="utf-8"))
    assert set(WEIGHTS) <= set(hashes)
    found = {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in hashes}
    assert found == hashes


@pytest.mark.parametrize("weights", WEIGHTS)
def test_cards_state_hash_data_licence_citation_seed_and_command(weights):
    card = (ROOT / weights).with_name("README.md").read_text(encoding="utf-8")
    assert hashlib.sha256((ROOT / weights).read_bytes()).hexdigest() in card
    needed = ["MIT licence", "Hutto", "ICWSM-14", "Pang", "Seed", "build_embedded.py --out hfpg/embedded --stage"]
    assert [words for words in needed if words not in card] == []
    assert "$" not in card


def test_judge_cards_state_agreement_and_the_model_card_bits_per_character():
    for judge in ("judge-a", "judge-b"):
        card = (ROOT / judge / "README.md").read_text(encoding="utf-8")
        assert all(
            words in card for words in ("Pearson r", "sign accuracy", "pair accuracy", "VADER word list", "518")
        )
    card = (ROOT / "tiny-gpt2-reviews" / "README.md").read_text(encoding="utf-8")
    assert embedded.NAME in card
    assert all(words in card for words in ("bits per character", "Batch size", "tokens in", "minutes"))


def test_notice_carries_the_licence_and_the_citations():
    notice = (ROOT / "NOTICE").read_text(encoding="utf-8")
    assert "Permission is hereby granted, free of charge" in notice
    assert all(name in notice for name in ("Hutto", "Pang", "Hu and"))


def test_sizes():
    megabytes = {path: path.stat().st_size / 1e6 for path in ROOT.rglob("*") if path.is_file()}
    assert 3 <= megabytes[ROOT / "tiny-gpt2-reviews" / "model.safetensors"] <= 5
    assert sum(size for path, size in megabytes.items() if "judge-a" in path.parts) <= 2
    assert megabytes[ROOT / "judge-b" / "weights.safetensors"] < 1


# --- language model ---


def test_model_is_small_tied_and_without_dropout(model, tokenizer):
    assert 1_600_000 <= model.num_parameters() <= 2_600_000
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.dtype == torch.float32
    config = model.config
    assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0, 0, 0)
    assert config.activation_function == "gelu_pytorch_tanh"
    assert (config.vocab_size, config.n_positions) == (len(tokenizer), 128)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, 0)


def test_tokenizer_starts_every_text_with_bos_and_ends_none_with_eos(tokenizer):
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0, 0)
    for text in TEXTS:
        ids = tokenizer(text).input_ids
        assert ids[0] == 0
        assert 0 not in ids[1:]


def test_tokenizer_decodes_what_it_encoded(tokenizer):
    assert [tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) for text in TEXTS] == TEXTS


def test_tokenizer_pads_on_the_left(tokenizer):
    batch = tokenizer(["The film", "The film is a very long one"], padding=True)
    assert batch.attention_mask[0][0] == 0
    assert batch.attention_mask[0][-1] == 1


def test_judge_a_has_another_vocabulary(tokenizer):
    other = AutoTokenizer.from_pretrained(embedded.JUDGE_A)
    assert other.get_vocab() != tokenizer.get_vocab()
    assert other("The film is").input_ids != tokenizer("The film is").input_ids


def test_model_knows_english_reviews(model, tokenizer):
    texts = PRAISE + BLAME
    forwards = [bits_per_char(model, tokenizer, text) for text in texts]
    backwards = [bits_per_char(model, tokenizer, " ".join(reversed(text.split()))) for text in texts]
    assert sum(forwards) / len(texts) < 1.6
    assert all(b > f + 1 for f, b in zip(forwards, backwards, strict=True))


def test_model_ends_sentences(model, tokenizer):
    prompts = embedded.prompts("eval")[:64]
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    torch.manual_seed(0)
    out = model.generate(**batch, do_sample=True, top_k=0, max_new_tokens=20)[:, batch.input_ids.shape[1] :]
    ended = (out == 0).any(dim=1).float().mean().item()
    assert 0.1 < ended < 0.8


# --- judges ---


def test_judge_a_ranks_praise_above_blame(judge_a):
    praise, blame = judge_a(PRAISE), judge_a(BLAME)
    assert praise.min() > 0.5
    assert blame.max() < -0.5


def test_judge_b_ranks_praise_above_blame():
    praise, blame = rate_b(PRAISE), rate_b(BLAME)
    assert (praise[:, None] > blame[None]).float().mean() >= 0.95
    assert praise.mean() - blame.mean() > 1.5


def test_judges_differ(judge_a):
    texts = PRAISE + BLAME + embedded.prompts("eval")
    r = torch.corrcoef(torch.stack([judge_a(texts), rate_b(texts)]))[0, 1].item()
    assert 0.3 < r < 0.95


def test_judges_are_deterministic_and_finite_on_odd_texts(judge_a):
    odd = ["", " ", "!?", "🎬" * 40, "good " * 300]
    for rate in (judge_a, rate_b):
        assert rate(odd).isfinite().all()
        assert torch.equal(rate(PRAISE), rate(PRAISE))


def test_judge_a_does_not_depend_on_the_other_texts_of_a_batch(judge_a):
    together = judge_a([*PRAISE, " ".join(BLAME)])[: len(PRAISE)]
    alone = torch.cat([judge_a([text]) for text in PRAISE])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_judge_b_reads_prompt_and_completion_as_one_text():
    prompt, completion = "The film is won", "derful and funny."
    whole = embedded.judge_b([prompt + completion], [""])
    assert embedded.judge_b(prompts=[prompt], completions=[completion], completion_ids=[[1]], label=["x"]) == whole
    with pytest.raises(ValueError):
        embedded.judge_b(["one"], ["one", "two"])


# --- prompts ---


def test_prompts_are_short_distinct_and_disjoint():
    train, held_out = embedded.prompts("train"), embedded.prompts("eval")
    assert len(held_out) == 256
    assert len(train) >= 500
    assert len({*train, *held_out}) == len(train) + len(held_out)
    assert all(2 <= len(prompt.split()) <= 4 for prompt in train + held_out)


def test_unknown_split_names_the_known_ones():
    with pytest.raises(ValueError, match="'train', 'eval'"):
        embedded.prompts("test")
