"""Learned judges: whatever the batch, a classifier says of each text what `pipeline` says of it alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
    pipeline,
)

from hfpg import embedded
from hfpg.config import ConfigError
from hfpg.data import decode_completions
from hfpg.rewards import ClassifierReward, Judge
from tests import build, tiny


PROMPTS = [f"{tiny.WORDS[5 + i]} " for i in range(9)]
COMPLETIONS = [" ".join(tiny.WORDS[10 + i : 10 + i + 1 + i * 5 % 11]) for i in range(9)]  # of very different lengths
POSITIONS = 24


def larger(model: Any, by: float = 12) -> Any:
    """Weights large enough that texts get different scores."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(by)
    return model.eval()


def bert(labels: tuple[str, ...] = ("LABEL_0",)) -> Any:
    torch.manual_seed(1)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    named = dict(id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)})
    limits = dict(vocab_size=tiny.VOCABULARY, max_position_embeddings=POSITIONS, pad_token_id=1)
    return larger(BertForSequenceClassification(BertConfig(**sizes, **named, **limits)))


def gpt2(pad_token_id: int | None) -> Any:
    torch.manual_seed(2)
    sizes = dict(n_embd=16, n_layer=1, n_head=2, n_positions=POSITIONS, vocab_size=tiny.VOCABULARY, num_labels=1)
    ids = dict(bos_token_id=0, eos_token_id=0, pad_token_id=pad_token_id)
    return larger(GPT2ForSequenceClassification(GPT2Config(**sizes, **ids)))


def test_an_end_token_that_the_policy_writes_as_text_does_not_break_a_batch():
    torch.manual_seed(3)
    sizes = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    limits = dict(vocab_size=tiny.VOCABULARY, max_position_embeddings=POSITIONS, num_labels=1, encoder_ffn_dim=16)
    end = tiny.tokenizer().convert_tokens_to_ids(tiny.WORDS[8])
    ids = dict(pad_token_id=1, eos_token_id=end, bos_token_id=0, decoder_start_token_id=end, forced_eos_token_id=None)
    model = BartForSequenceClassification(BartConfig(**sizes, **limits, **ids, decoder_ffn_dim=16))
    judge = ClassifierReward(larger(model, 2), tiny.tokenizer(padding_side="right"))
    word, other = tiny.WORDS[8], tiny.WORDS[12]
    texts = [f"{other} {word}", f"{word} {other} {other} {word}", f"{word} {other}", f"{word} {word} {word}"]
    alone = [judge([""], [text])[0] for text in texts]
    assert judge([""] * 4, texts) == pytest.approx(alone, abs=1e-5) and len(set(alone)) > 1


def test_a_label_stands_behind_the_last_mark(tmp_path):
    folder = saved(tmp_path / "run#1" / "judge", bert(("NEG", "POS")), own_tokenizer())
    assert ClassifierReward(f"{folder}#POS").column == 1
    assert ClassifierReward(f"{folder}#NEG").column == 0


def own_tokenizer(**kwargs: Any) -> PreTrainedTokenizerFast:
    """A classifier's tokenizer that begins every text with <eos>, as BERT's begins with [CLS]."""
    made = tiny.tokenizer(**kwargs)
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    return made


def saved(folder: Path, model: Any, tokenizer: Any) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def one_by_one(model: Any, tokenizer: Any, column: int = 0) -> list[float]:
    """The direct call: one text, no padding, no mask."""
    texts = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    rows = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    scores = [model(input_ids=row).logits[0, column].item() for row in rows]
    assert max(scores) - min(scores) > 0.1, "all texts score alike: nothing is tested"
    return scores


@pytest.mark.parametrize("max_tokens", [1, 17, 16384])
def test_batching_padding_and_sorting_change_no_score(tmp_path: Path, max_tokens: int):
    model, tokenizer = bert(), own_tokenizer(pad_token="<unk>")
    reward = ClassifierReward(saved(tmp_path, model, tokenizer), max_tokens=max_tokens)
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(one_by_one(model, tokenizer), abs=1e-5)
    back = reward(PROMPTS[::-1], COMPLETIONS[::-1])[::-1]
    assert back == pytest.approx(reward(PROMPTS, COMPLETIONS), abs=1e-5)


def test_batches_stay_within_the_token_budget(monkeypatch: pytest.MonkeyPatch):
    model = bert()
    reward, sizes, forward = (
        ClassifierReward(model, own_tokenizer(pad_token="<unk>"), max_tokens=30),
        [],
        model.forward,
    )
    monkeypatch.setattr(model, "forward", lambda **given: sizes.append(given["input_ids"].shape) or forward(**given))
    reward(PROMPTS, COMPLETIONS)
    sizes.clear()  # the first call has tried whether padding matters
    reward(PROMPTS, COMPLETIONS)
    assert sum(rows for rows, _ in sizes) == 9
    assert all(rows * width <= 30 for rows, width in sizes) and len(sizes) < 9
    assert [width for _, width in sizes] == sorted(width for _, width in sizes)


def test_a_decoder_that_looks_for_its_last_token(tmp_path: Path):
    """GPT-2 reads its score at the last token that is not padding."""
    model, tokenizer = gpt2(pad_token_id=1), tiny.tokenizer(pad_token="<unk>")
    reward = ClassifierReward(saved(tmp_path, model, tokenizer))
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(one_by_one(model, tokenizer), abs=1e-5)


@pytest.mark.parametrize(("model_pad", "tokenizer_pad"), [(None, None), (None, "<unk>"), (1, None)])
def test_without_a_pad_token_the_scores_are_still_right(model_pad: int | None, tokenizer_pad: str | None):
    model = gpt2(model_pad)
    tokenizer = tiny.tokenizer(**({"pad_token": tokenizer_pad} if tokenizer_pad else {}))
    found = ClassifierReward(model, tokenizer)([*PROMPTS, PROMPTS[3]], [*COMPLETIONS, COMPLETIONS[3]])
    expected = one_by_one(model, tokenizer)
    assert found == pytest.approx([*expected, expected[3]], abs=1e-5)


def test_a_tokenizer_whose_pad_token_is_not_the_models():
    """The model finds the last token by *its* pad id; filled with another one, it would read a score from padding."""
    model, tokenizer = gpt2(pad_token_id=1), tiny.tokenizer(pad_token=tiny.WORDS[63])
    reward = ClassifierReward(model, tokenizer)
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(one_by_one(model, tokenizer), abs=1e-5)
    assert reward.padding, "filled with its own id, the model takes texts of different lengths together"


def test_a_text_longer_than_the_context_still_has_a_score():
    reward = ClassifierReward(bert(), own_tokenizer(pad_token="<unk>"))
    long = " ".join(["aa"] * 200)
    scores = reward(["ba ", "ba "], [long, "ca"])
    assert torch.isfinite(torch.tensor(scores)).all()
    assert scores[1] == pytest.approx(reward(["ba "], ["ca"])[0], abs=1e-5)


def test_a_prompt_longer_than_the_context_does_not_push_the_completion_out():
    """The end of the text is what is judged: two completions of one long prompt must not score alike."""
    reward = ClassifierReward(bert(), own_tokenizer(pad_token="<unk>"))
    prompt = " ".join(["aa"] * 60) + " "
    first, second = reward([prompt, prompt], ["ba ca da", "zb yb xb"])
    assert abs(first - second) > 1e-4


def test_no_completion_is_no_score():
    assert ClassifierReward(bert(), own_tokenizer(pad_token="<unk>"))([], []) == []


def test_a_label_is_chosen_by_name(tmp_path: Path):
    model, tokenizer = bert(("bad", "so-so", "good")), own_tokenizer(pad_token="<unk>")
    source = saved(tmp_path / "judge", model, tokenizer)
    for column, label in enumerate(("bad", "so-so", "good")):
        found = ClassifierReward(f"{source}#{label}")(PROMPTS, COMPLETIONS)
        assert found == pytest.approx(one_by_one(model, tokenizer, column), abs=1e-5)
    with pytest.raises(ConfigError) as caught:
        ClassifierReward(source)
    assert str(caught.value) == (
        "the reward model judge has the labels ['bad', 'so-so', 'good']; name the one to reward, as in 'judge#good'"
    )
    with pytest.raises(ConfigError) as caught:
        ClassifierReward(f"{source}#Good")
    assert str(caught.value) == (
        "the reward model judge has no label 'Good'; it has ['bad', 'so-so', 'good']; did you mean 'good'?"
    )


def test_a_classifier_in_memory_has_its_label_named_by_argument():
    model, tokenizer = bert(("bad", "good")), own_tokenizer(pad_token="<unk>")
    found = ClassifierReward(model, tokenizer, label="good")(PROMPTS, COMPLETIONS)
    assert found == pytest.approx(one_by_one(model, tokenizer, 1), abs=1e-5)
    with pytest.raises(ConfigError, match=r"has the labels \['bad', 'good'\]; name the .* as in label='good'"):
        ClassifierReward(model, tokenizer)


def test_a_folder_may_have_a_hash_in_its_name(tmp_path: Path):
    model, tokenizer = bert(), own_tokenizer(pad_token="<unk>")
    reward = ClassifierReward(saved(tmp_path / "judge#2", model, tokenizer))
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(one_by_one(model, tokenizer), abs=1e-5)
    assert reward.name == "judge#2"


def test_a_folder_may_be_a_path(tmp_path: Path):
    folder = saved(tmp_path / "judge", bert(), own_tokenizer(pad_token="<unk>"))
    by_path, by_name = Judge(Path(folder)), Judge(folder)
    found = [judge(PROMPTS, COMPLETIONS, [[1]] * len(PROMPTS), {}).scores for judge in (by_path, by_name)]
    assert torch.equal(*found) and by_path.names == by_name.names == ["judge"]


def test_the_text_is_read_with_the_judges_own_vocabulary(tmp_path: Path):
    """The judge gets the policy's token ids too, and another vocabulary: it must look at neither."""
    model, tokenizer = bert(), own_tokenizer(pad_token="<unk>")
    judge = Judge(saved(tmp_path / "judge", model, tokenizer))
    ids = [[10_000 + i] for i in range(9)]
    scores = judge(PROMPTS, COMPLETIONS, ids, {"column": list(range(9))})
    assert scores.scores.tolist() == pytest.approx(one_by_one(model, tokenizer), abs=1e-5)
    assert judge.names == ["judge"]


def test_a_loaded_classifier_is_used_in_evaluation_mode_and_stays_as_it_was():
    model, tokenizer = bert(), own_tokenizer(pad_token="<unk>")
    model.train()
    reward = ClassifierReward(model, tokenizer)
    assert reward(PROMPTS, COMPLETIONS) == reward(PROMPTS, COMPLETIONS)  # no dropout
    assert model.training and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ConfigError, match="the reward model .* needs its tokenizer; give it in reward_processing_cla"):
        ClassifierReward(model)
    with pytest.raises(ConfigError, match="needs its tokenizer"):
        Judge([model])
    assert Judge([model], tokenizers=[tokenizer]).names


def test_a_classifier_that_is_loaded_by_name_has_no_gradient(tmp_path: Path):
    reward = ClassifierReward(saved(tmp_path, bert(), own_tokenizer(pad_token="<unk>")))
    assert not reward.model.training and not any(p.requires_grad for p in reward.model.parameters())


def test_a_path_that_is_not_there(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        ClassifierReward(str(tmp_path / "nothing"))
    message = str(caught.value)
    assert message.startswith(f"cannot load the reward model '{tmp_path / 'nothing'}': ")
    assert message.endswith("(a function is named 'file.py:name')") and "\n" not in message


def test_a_conversation_needs_the_judges_chat_template():
    model, tokenizer = bert(), own_tokenizer(pad_token="<unk>")
    reward = ClassifierReward(model, tokenizer)
    prompts = [[{"role": "user", "content": "aa ba"}]]
    completions = [[{"role": "assistant", "content": "ca"}]]
    with pytest.raises(ConfigError, match="has no chat template, and the prompts are conversations"):
        reward(prompts, completions)
    tokenizer.chat_template = "<eos> {% for m in messages %}{{ m.role[0] }}a {{ m.content }} {% endfor %}"
    # the template has written the first token: it must not stand there twice
    ids = tokenizer("<eos> ua aa ba aa ca", add_special_tokens=False, return_tensors="pt").input_ids
    assert reward(prompts, completions) == pytest.approx([model(input_ids=ids).logits.item()], abs=1e-5)


@pytest.mark.parametrize("given", ["answer", "question"])
def test_beside_a_conversation_a_text_is_its_question_or_its_answer(given: str):
    reward = ClassifierReward(bert(), own_tokenizer(pad_token="<unk>"))
    reward.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}"
    asked, told = [{"role": "user", "content": "aa"}], [{"role": "assistant", "content": "ba"}]
    assert reward.text("aa" if given == "question" else asked, "ba" if given == "answer" else told) == (
        "user: aa|assistant: ba|"
    )
    assert reward.text("", told) == "assistant: ba|"


def test_texts_and_conversations_may_stand_in_one_batch():
    """A template writes its special tokens itself; a text gets them from the tokenizer."""
    reward = ClassifierReward(bert(), own_tokenizer(pad_token="<unk>"))
    reward.tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    talk = [{"role": "user", "content": "aa"}], [{"role": "assistant", "content": "ba ca"}]
    mixed = reward(["da ", talk[0]], ["ea", talk[1]])
    assert mixed == pytest.approx([*reward(["da "], ["ea"]), *reward([talk[0]], [talk[1]])], abs=1e-6)


# ── the value of a pipeline, whatever the architecture


SIZES: dict[str, Any] = dict(vocab_size=tiny.VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
SIZES |= dict(id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1}, pad_token_id=1, eos_token_id=0)
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "roberta": (RobertaForSequenceClassification, RobertaConfig, dict(max_position_embeddings=POSITIONS)),
    "modernbert": (ModernBertForSequenceClassification, ModernBertConfig, dict(intermediate_size=16)),
    "llama": (LlamaForSequenceClassification, LlamaConfig, dict(intermediate_size=16)),
    "t5": (T5ForSequenceClassification, T5Config, dict(d_kv=8, d_ff=16, decoder_start_token_id=1)),
    "xlnet": (XLNetForSequenceClassification, XLNetConfig, dict(d_inner=16, d_head=8)),
}
ENDED = ("llama", "t5", "xlnet")  # <eos> stands at the end; XLNet's is of a segment of its own


def classifier(kind: str) -> tuple[Any, PreTrainedTokenizerFast]:
    torch.manual_seed(3)
    names = ["input_ids", "attention_mask"] + (["token_type_ids"] if kind == "xlnet" else [])
    tokenizer = tiny.tokenizer(pad_token="<unk>", model_input_names=names)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A <eos>:{2 * (kind == 'xlnet')}" if kind in ENDED else "<eos> $A", special_tokens=[("<eos>", 0)]
    )
    model, config, more = KINDS[kind]
    return larger(model(config(**SIZES, **more)), by=4 if kind == "t5" else 12), tokenizer  # T5 scales no attention


def piped(folder: str, label: str = "good", **settings: Any) -> list[float]:
    """A direct call of `pipeline`, one text at a time."""
    pipe = pipeline("text-classification", model=folder, function_to_apply="none", top_k=None, **settings)
    told = [pipe([p + c])[0] for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    values = [row["score"] for rows in told for row in rows if row["label"] == label]
    assert max(values) - min(values) > 0.1, "all texts score alike: nothing is tested"
    return values


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_value_is_that_of_a_pipeline(tmp_path: Path, kind: str):
    folder = saved(tmp_path, *classifier(kind))
    for label in ("bad", "good"):
        expected = piped(folder, label, dtype="float32")
        assert ClassifierReward(f"{folder}#{label}")(PROMPTS, COMPLETIONS) == pytest.approx(expected, rel=1e-4)


def test_the_embedded_judge_is_that_of_a_pipeline():
    texts = [f"{p} is a moving portrait" for p in embedded.prompts("eval")[:6]]
    pipe = pipeline("text-classification", model=embedded.JUDGE_A, function_to_apply="none", dtype="float32")
    found = ClassifierReward(embedded.JUDGE_A)([""] * 6, texts)
    assert found == pytest.approx([row["score"] for row in pipe(texts)], abs=1e-5)


def test_a_model_whose_score_depends_on_padding_gets_texts_of_one_length(tmp_path: Path, monkeypatch: Any):
    """XLNet reads its score at the last column, padding or not."""
    model, tokenizer = classifier("xlnet")
    reward, widths = ClassifierReward(model, tokenizer, label="good"), []
    reward(PROMPTS, COMPLETIONS)
    assert reward.padding is False
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **given: widths.append(given["attention_mask"]) or forward(**given))
    twice = reward([*PROMPTS, *PROMPTS], [*COMPLETIONS, *COMPLETIONS])
    assert all(mask.all() for mask in widths) and len(widths) < len(twice)


def test_token_types_mean_nothing_to_a_model_that_knows_none():
    """A tokenizer may write them for every model."""
    model, _ = classifier("llama")
    names = ["input_ids", "attention_mask", "token_type_ids"]
    tokenizer = tiny.tokenizer(pad_token="<unk>", model_input_names=names)
    assert "token_type_ids" in tokenizer("aa")
    found = ClassifierReward(model, tokenizer, label="good")(PROMPTS, COMPLETIONS)
    assert found == pytest.approx(one_by_one(model, tokenizer, 1), rel=1e-4)


@pytest.mark.parametrize("kind", ["roberta", "xlnet"])
def test_a_long_text_fits_where_positions_are_counted_otherwise(kind: str):
    """RoBERTa begins to count behind its padding id, XLNet says −1; neither tokenizer knows a limit here."""
    model, tokenizer = classifier(kind)
    reward = ClassifierReward(model, tokenizer, label="good")
    assert reward.limit == {"roberta": POSITIONS - 2, "xlnet": 1 << 30}[kind]
    (score,) = reward(["ba "], [" ".join(["ca"] * 100)])
    assert torch.isfinite(torch.tensor(score))


# ── another vocabulary than the policy's


def test_a_run_scores_its_texts_with_the_judges_own_tokens(tmp_path: Path):
    """The policy writes 64 words, the judge reads 257 bytes: the ids of one are other texts to the other."""
    torch.manual_seed(4)
    config = BertConfig(vocab_size=257, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1)
    judge = larger(BertForSequenceClassification(config))
    folder = saved(tmp_path / "bytes", judge, tiny.byte_tokenizer(pad_token="<eos>"))
    trainer = build.trainer(tmp_path / "run", reward=folder)
    samples, scores = trainer.collect()
    prompts = tiny.tokenizer().batch_decode(
        [ids[mask] for ids, mask in zip(samples.prompt_ids, samples.prompt_mask, strict=True)]
    )
    written = decode_completions(tiny.tokenizer(), samples, prompts)
    pipe = pipeline("text-classification", model=folder, function_to_apply="none", dtype="float32")
    expected = [pipe(p + c)[0]["score"] for p, c in zip(prompts, written, strict=True)]
    assert max(expected) - min(expected) > 0.01
    assert scores.scores.tolist() == pytest.approx(expected, abs=1e-4)
    assert "scores/bytes" in trainer.train()


def test_a_tokenizer_of_another_model_is_refused():
    """Its ids would be read as other words, or lie outside of the embedding."""
    with pytest.raises(ConfigError) as caught:
        ClassifierReward(bert(), tiny.byte_tokenizer(pad_token="<eos>"))
    assert str(caught.value) == (
        "the reward model BertForSequenceClassification has 64 embeddings, and its tokenizer's ids go up to 256: that "
        "is the tokenizer of another model; give the model's own"
    )


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path):
    """transformers makes an empty tokenizer then, and every text would be no text."""
    gpt2(pad_token_id=1).save_pretrained(tmp_path / "judge")
    with pytest.raises(ConfigError, match="judge has a tokenizer without a single word: its files are missing"):
        ClassifierReward(str(tmp_path / "judge"))


def test_a_text_without_a_token_is_not_judged():
    reward = ClassifierReward(gpt2(pad_token_id=1), tiny.tokenizer(pad_token="<unk>"))
    empty, full = reward(["", "aa "], ["", "ba"])
    assert empty is None and full == pytest.approx(reward(["aa "], ["ba"])[0], abs=1e-6)


# ── what can be loaded


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", torch.float64])
def test_any_dtype(tmp_path: Path, dtype: Any):
    folder = saved(tmp_path, *classifier("llama"))
    wide = ClassifierReward(f"{folder}#good")(PROMPTS, COMPLETIONS)
    reward = ClassifierReward(f"{folder}#good", dtype=dtype, max_tokens=1)
    assert {p.dtype for p in reward.model.parameters()} == {getattr(torch, str(dtype).removeprefix("torch."))}
    found = reward(PROMPTS, COMPLETIONS)
    assert found == pytest.approx(piped(folder, dtype=dtype), rel=1e-6)
    assert found == pytest.approx(wide, abs=0.1 if dtype == "bfloat16" else 0.02)
    half = ClassifierReward(f"{folder}#good", dtype=dtype)  # in batches, up to rounding
    assert half(PROMPTS, COMPLETIONS) == pytest.approx(found, abs=0.1 if dtype == "bfloat16" else 0.02)


def test_auto_keeps_the_type_of_the_stored_weights(tmp_path: Path):
    model, tokenizer = classifier("llama")
    folder = saved(tmp_path, model.to(torch.bfloat16), tokenizer)
    assert ClassifierReward(f"{folder}#good", dtype="auto").model.dtype == torch.bfloat16
    assert ClassifierReward(f"{folder}#good").model.dtype == torch.float32
    with pytest.raises(ConfigError, match="dtype='half a float' is unknown to torch; use 'float32'"):
        ClassifierReward(f"{folder}#good", dtype="half a float")


def test_it_goes_to_the_runs_device_or_stays_where_the_user_put_it():
    """The device "meta" has shapes and no numbers: enough to see where everything is."""
    away, stays = (ClassifierReward(bert(), own_tokenizer(pad_token="<unk>"), device=d) for d in (None, "cpu"))
    judge = Judge([away, stays], device="meta")
    assert [f.call.model.device.type for f in judge.functions] == ["meta", "cpu"]
    assert {given.device.type for given in away._padded([[2, 3], [4]]).values()} == {"meta"}
    assert ClassifierReward(bert(), own_tokenizer(pad_token="<unk>"), device="meta").model.device.type == "meta"


def test_a_language_model_has_no_trained_head(tmp_path: Path):
    """transformers would draw one at random, and the policy would learn noise."""
    folder = saved(tmp_path / "lm", tiny.model(), tiny.tokenizer())
    with pytest.raises(ConfigError, match=r"lm': its checkpoint has no score.weight: these weights would be random"):
        ClassifierReward(folder)


def test_an_adapter_is_loaded_with_its_base_and_its_head(tmp_path: Path):
    from peft import LoraConfig, TaskType, get_peft_model

    torch.manual_seed(5)
    base = saved(tmp_path / "base", tiny.model(), tiny.tokenizer())
    model = GPT2ForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=1)
    adapted = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=2, init_lora_weights=False))
    tokenizer = tiny.tokenizer(pad_token="<unk>")
    folder = saved(tmp_path / "adapter", adapted, tokenizer)
    found = ClassifierReward(folder)(PROMPTS, COMPLETIONS)
    assert found == pytest.approx(one_by_one(adapted.eval(), tokenizer), rel=1e-4)
    assert ClassifierReward(adapted, tokenizer)(PROMPTS, COMPLETIONS) == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize(
    ("file", "text"),
    [("model.safetensors", "x"), ("config.json", "{"), ("tokenizer.json", "{"), ("config.json", "{}")],
)
def test_a_broken_folder_is_one_sentence(tmp_path: Path, file: str, text: str):
    folder = saved(tmp_path / "judge", bert(), own_tokenizer(pad_token="<unk>"))
    (tmp_path / "judge" / file).write_text(text)
    with pytest.raises(ConfigError, match="^cannot load the reward model '.*judge': .+") as caught:
        ClassifierReward(folder)
    assert "\n" not in str(caught.value)


def test_every_part_of_a_model_in_memory_keeps_its_mode():
    model = bert().eval()
    model.bert.encoder.train()
    before = [module.training for module in model.modules()]
    ClassifierReward(model, tiny.tokenizer(pad_token="<unk>"))(["aa "], ["ba"])
    assert [module.training for module in model.modules()] == before
