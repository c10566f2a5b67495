"""Likelihood judges: whatever the batch, each says of a text what a plain loop over its tokens says."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertForMaskedLM, BertModel, GPT2Model, PreTrainedTokenizerFast, T5Config, T5Model

from hfpg.config import ConfigError
from hfpg.rewards import CausalFluency, Judge, MaskedFluency, Relevance
from hfpg.rewards.likelihood import in_batches
from tests import tiny


LENGTHS = [1, 6, 3, 11, 2, 8, 5, 4]
PROMPTS = [" ".join(tiny.WORDS[3 + i : 3 + i + 1 + i * 3 % 7]) + " " for i in range(8)]
COMPLETIONS = [" ".join(tiny.WORDS[20 + i : 20 + i + n]) for i, n in enumerate(LENGTHS)]
CLS, SEP, MASK, PAD = 2, 3, 4, 1


def masked_tokenizer(**kwargs: Any) -> PreTrainedTokenizerFast:
    """As BERT's: [CLS] text [SEP], and a mask. (Words of the tiny vocabulary serve.)"""
    special = dict(cls_token="aa", sep_token="ba", mask_token="ca", pad_token="<unk>")
    made = tiny.tokenizer(**special, **kwargs)
    ids = [("aa", CLS), ("ba", SEP)]
    made.backend_tokenizer.post_processor = TemplateProcessing(single="aa $A ba", special_tokens=ids)
    return made


def bert(kind: Any = BertForMaskedLM, positions: int = 40) -> Any:
    torch.manual_seed(3)
    sizes = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    made = kind(BertConfig(vocab_size=64, max_position_embeddings=positions, pad_token_id=PAD, **sizes))
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(8)
    return made.eval()


@torch.no_grad()
def causal_loop(model: Any, before: list[int], ids: list[int]) -> float:
    """Σ_t log p(y_t | x, y_<t), one forward pass per token."""
    total = 0.0
    for t, token in enumerate(ids):
        logits = model(input_ids=torch.tensor([before + ids[:t]])).logits[0, -1]
        total += logits.log_softmax(0)[token].item()
    return total


@torch.no_grad()
def masked_loop(model: Any, before: list[int], ids: list[int], after: list[int]) -> float:
    """Σ_t log p(y_t | x, y_≠t), one forward pass per token."""
    total = 0.0
    for t, token in enumerate(ids):
        row = before + ids[:t] + [MASK] + ids[t + 1 :] + after
        total += model(input_ids=torch.tensor([row])).logits[0, len(before) + t].log_softmax(0)[token].item()
    return total


def ids_of(text: str) -> list[int]:
    return [tiny.WORDS.index(word) for word in text.split()]


# ── batches


def test_batches_hold_each_row_once_and_no_more_than_allowed():
    lengths = [5, 1, 9, 3, 3, 2, 30]
    batches = list(in_batches(lengths, 12))
    assert sorted(i for b in batches for i in b) == list(range(7)) and batches[-1] == [6]
    assert all(max(lengths[i] for i in b) * len(b) <= 12 for b in batches[:-1])
    assert list(in_batches([], 12)) == []


# ── a causal model


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt", "gemma2", "lstm"])
def test_fluency_is_the_plain_loop(kind: str):
    model = tiny.model(kind)
    loops = [causal_loop(model, ids_of(p), ids_of(c)) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    for tokens in (1, 40, 4096):
        summed = CausalFluency(model, tiny.tokenizer(), reduce="sum", max_tokens=tokens)
        assert summed(PROMPTS, COMPLETIONS) == pytest.approx(loops, rel=1e-5)
    means = [total / n for total, n in zip(loops, LENGTHS, strict=True)]
    assert CausalFluency(model, tiny.tokenizer())(prompts=PROMPTS, completions=COMPLETIONS, extra=[1]) == (
        pytest.approx(means, rel=1e-5)
    )


def test_without_a_prompt_the_text_follows_its_beginning():
    model, tokenizer = tiny.model(), tiny.tokenizer()
    loops = [causal_loop(model, [0], ids_of(c)) for c in COMPLETIONS]  # <eos>, for want of a <bos>
    assert CausalFluency(model, tokenizer, reduce="sum")([""] * 8, COMPLETIONS) == pytest.approx(loops, rel=1e-5)
    alone = CausalFluency(model, tokenizer, reduce="sum", given_prompt=False)
    assert alone(PROMPTS, COMPLETIONS) == pytest.approx(loops, rel=1e-5)
    assert alone([[{"role": "user", "content": "x"}]] * 8, COMPLETIONS) == pytest.approx(loops, rel=1e-5)
    tokenizer.eos_token = None
    without_first = CausalFluency(model, tokenizer, reduce="sum")([""], COMPLETIONS[1:2])
    assert without_first == pytest.approx([causal_loop(model, ids_of(COMPLETIONS[1])[:1], ids_of(COMPLETIONS[1])[1:])])


def test_a_token_across_the_border_is_the_completions():
    model = tiny.model()
    judge = CausalFluency(model, tiny.tokenizer(), reduce="sum")
    x, (first, second) = tiny.WORDS[8], tiny.WORDS[9]
    whole = causal_loop(model, ids_of(x), ids_of(first + second))
    assert judge([f"{x} {first}"], [second]) == pytest.approx([whole], rel=1e-5)


def test_bytes_of_one_letter_are_all_scored():
    model, tokenizer = tiny.model(vocabulary=257), tiny.byte_tokenizer()
    prompt, completion = "né ", "über 好"
    ids = tokenizer(prompt + completion).input_ids
    cut = len(prompt.encode())
    assert len(ids) - cut == len(completion.encode())
    loop = causal_loop(model, ids[:cut], ids[cut:])
    assert CausalFluency(model, tokenizer, reduce="sum")([prompt], [completion]) == pytest.approx([loop], rel=1e-5)


def test_a_conversation_goes_through_the_judges_own_template():
    model = tiny.model()
    template = "{% for m in messages %}{{ m['content'] }} ab {% endfor %}{% if add_generation_prompt %}bb {% endif %}"
    prompt, answer = [{"role": "user", "content": PROMPTS[3]}], [{"role": "assistant", "content": COMPLETIONS[3]}]
    judge = CausalFluency(model, tiny.tokenizer(chat_template=template), reduce="sum")
    loop = causal_loop(model, ids_of(PROMPTS[3] + " ab bb"), ids_of(COMPLETIONS[3]))
    assert judge([prompt], [answer]) == pytest.approx([loop], rel=1e-5)
    with pytest.raises(ConfigError, match=r"'fluency' has no chat template, and the .* set given_prompt=False"):
        CausalFluency(model, tiny.tokenizer())([prompt], [answer])


def test_what_is_empty_or_too_long_is_not_judged_and_a_long_prompt_loses_its_beginning():
    model = tiny.model(n_positions=12)
    judge = CausalFluency(model, tiny.tokenizer(), reduce="sum")
    words = " ".join(tiny.WORDS[5:35])
    long, longest = " ".join(words.split()[:11]), " ".join(words.split()[:12])
    found = judge([PROMPTS[0], PROMPTS[0], words + " ", words + " ", words + " "], ["", "  ", "bb", long, longest])
    assert found[:2] == [None, None] and found[4] is None
    assert found[2] == pytest.approx(causal_loop(model, ids_of(words)[-11:], ids_of("bb")), rel=1e-5)
    assert found[3] == pytest.approx(causal_loop(model, ids_of(words)[-1:], ids_of(long)), rel=1e-5)
    assert judge([], []) == []


# ── a masked model


def test_masked_fluency_is_the_plain_loop():
    model = bert()
    loops = [
        masked_loop(model, [CLS, *ids_of(p)], ids_of(c), [SEP]) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    for tokens in (1, 60, 4096):
        summed = MaskedFluency(model, masked_tokenizer(), reduce="sum", max_tokens=tokens)
        assert summed(PROMPTS, COMPLETIONS) == pytest.approx(loops, rel=1e-5)
    means = [total / n for total, n in zip(loops, LENGTHS, strict=True)]
    assert MaskedFluency(model, masked_tokenizer())(PROMPTS, COMPLETIONS) == pytest.approx(means, rel=1e-5)
    alone = MaskedFluency(model, masked_tokenizer(), reduce="sum", given_prompt=False)(PROMPTS[:1], COMPLETIONS[1:2])
    assert alone == pytest.approx([masked_loop(model, [CLS], ids_of(COMPLETIONS[1]), [SEP])], rel=1e-5)


def test_a_long_prompt_keeps_the_special_tokens():
    model = bert(positions=10)
    judge = MaskedFluency(model, masked_tokenizer(), reduce="sum")
    words = " ".join(tiny.WORDS[5:25])
    found = judge([words + " "] * 3, ["bb cb", " ".join(tiny.WORDS[30:38]), " ".join(tiny.WORDS[30:39])])
    assert found[0] == pytest.approx(masked_loop(model, [CLS, *ids_of(words)[-6:]], ids_of("bb cb"), [SEP]), rel=1e-5)
    assert found[1] == pytest.approx(masked_loop(model, [CLS], list(range(30, 38)), [SEP]), rel=1e-5)
    assert found[2] is None


# ── embeddings


def embedding(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).last_hidden_state[0]


def test_relevance_is_the_cosine_of_the_means():
    model, other = bert(BertModel), GPT2Model(tiny.model().config).eval()
    for reader, tokenizer, wrap in (
        (model, masked_tokenizer(), lambda ids: [CLS, *ids, SEP]),
        (other, tiny.tokenizer(), lambda ids: ids),
    ):
        vectors = [
            [embedding(reader, wrap(ids_of(t))) for t in pair] for pair in zip(PROMPTS, COMPLETIONS, strict=True)
        ]
        means = [torch.cosine_similarity(x.mean(0), y.mean(0), dim=0).item() for x, y in vectors]
        firsts = [torch.cosine_similarity(x[0], y[0], dim=0).item() for x, y in vectors]
        for tokens in (1, 30, 4096):
            judge = Relevance(reader, tokenizer, max_tokens=tokens)
            assert judge(PROMPTS, COMPLETIONS) == pytest.approx(means, abs=1e-5)
        assert Relevance(reader, tokenizer, pooling="cls")(PROMPTS, COMPLETIONS) == pytest.approx(firsts, abs=1e-5)
    assert max(means) - min(means) > 0.01


def test_a_text_that_is_too_long_for_relevance_loses_its_end():
    reader, text = bert(BertModel), " ".join(tiny.WORDS[5 + i % 20] for i in range(200))
    found = []
    for side in ("left", "right"):
        tokenizer = masked_tokenizer()
        tokenizer.truncation_side = side
        found.append(Relevance(reader, tokenizer)([PROMPTS[0]], [text]))
        assert tokenizer.truncation_side == side
    assert found[0] == found[1]


def test_relevance_reads_the_last_message_and_abstains_from_nothing_said():
    judge = Relevance(bert(BertModel), masked_tokenizer())
    turns = [{"role": "user", "content": "db"}, {"role": "user", "content": "bb cb"}]
    said = [{"role": "assistant", "content": "eb"}]
    found = judge([turns, "bb cb", " ", "bb", "bb", []], [said, "eb", "eb", "", "bb", said])
    assert found[0] == found[1] is not None and found[2:4] == [None, None] and found[5] is None
    assert found[4] == pytest.approx(1)
    assert judge([], []) == []


class Encoder:
    """What is used of a SentenceTransformer."""

    def encode(self, texts: list[str], **settings: Any) -> torch.Tensor:
        assert settings == dict(convert_to_tensor=True, show_progress_bar=False)
        return torch.tensor([[float(len(t)), 1.0] for t in texts], dtype=torch.bfloat16)


def test_relevance_uses_a_sentence_transformer():
    assert Relevance(Encoder(), pooling="own")(["a", "b"], ["c", ""]) == [pytest.approx(1, abs=1e-6), None]
    with pytest.raises(ConfigError, match="needs a SentenceTransformer, not a BertModel"):
        Relevance(bert(BertModel), pooling="own")


def test_without_sentence_transformers_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r'needs sentence-transformers: pip install "hfpg\[embedding\]"'):
        Relevance("anything", pooling="own")


# ── loading, devices, dtypes, refusals


def test_judges_load_by_name_in_a_dtype_and_run_in_hfpgs_judge(tmp_path: Path):
    for folder, model, tokenizer in (
        ("causal", tiny.model(), tiny.tokenizer()),
        ("masked", bert(), masked_tokenizer()),
    ):
        model.save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    causal, masked = str(tmp_path / "causal"), str(tmp_path / "masked")
    loaded = [CausalFluency(causal), MaskedFluency(masked, device="cpu"), Relevance(Path(masked))]
    direct = [CausalFluency(tiny.model(), tiny.tokenizer()), MaskedFluency(bert(), masked_tokenizer())]
    judge = Judge(loaded)
    assert judge.names == ["fluency", "masked_fluency", "relevance"]
    table = judge(PROMPTS, COMPLETIONS, [[1]] * 8, {}).by_function
    assert table["fluency"] == pytest.approx(direct[0](PROMPTS, COMPLETIONS), rel=1e-5)
    assert table["masked_fluency"] == pytest.approx(direct[1](PROMPTS, COMPLETIONS), rel=1e-5)
    half = CausalFluency(causal, dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    assert half(PROMPTS, COMPLETIONS) == pytest.approx(table["fluency"], rel=0.1)
    wide = CausalFluency(causal, dtype=torch.float64)
    assert wide(PROMPTS, COMPLETIONS) == pytest.approx(table["fluency"], rel=1e-5)
    assert half.to("cpu") is half


def test_a_given_model_stays_as_it_was():
    model = tiny.model().train()
    CausalFluency(model, tiny.tokenizer())(PROMPTS, COMPLETIONS)
    assert model.training and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: CausalFluency("/no/such/model"), "cannot load /no/such/model for the judge 'fluency': "),
        (lambda: CausalFluency(tiny.model()), "'fluency' needs its model's tokenizer; give tokenizer="),
        (lambda: CausalFluency(tiny.model(), tiny.tokenizer(), reduce="max"), "reduce='max'; use 'mean' or 'sum'"),
        (lambda: CausalFluency(tiny.model(), tiny.tokenizer(), max_tokens=0), "max_tokens=0 must be at least 1"),
        (lambda: MaskedFluency(bert(), tiny.tokenizer()), "'masked_fluency' has no mask token; give a masked"),
        (lambda: Relevance(bert(BertModel), masked_tokenizer(), pooling="max"), "pooling='max'; use 'mean', "),
    ],
)
def test_what_cannot_be_is_refused(make: Any, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        make()


def test_a_head_that_would_be_random_and_a_tokenizer_of_another_model_are_refused(tmp_path: Path):
    bert(BertModel).save_pretrained(tmp_path)
    masked_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot load .* 'masked_fluency': its checkpoint has no cls.predictions"):
        MaskedFluency(tmp_path)
    assert Relevance(tmp_path)(["aa ba"], ["ca"])[0] is not None, "embeddings need no head"
    with pytest.raises(ConfigError, match="'fluency' has 64 embeddings, and its tokenizer's ids go up to 256"):
        CausalFluency(tiny.model(), tiny.byte_tokenizer())


def test_slow_tokenizers_and_encoder_decoders_are_refused():
    class Slow:
        is_fast, model_max_length, mask_token_id = False, 8, 1

    with pytest.raises(ConfigError, match="'fluency' needs a fast tokenizer, .*; Slow is none"):
        CausalFluency(tiny.model(), Slow())
    t5 = T5Model(T5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    with pytest.raises(ConfigError, match="'relevance' got the encoder-decoder T5Model; give an encoder or a causal"):
        Relevance(t5, tiny.tokenizer())
