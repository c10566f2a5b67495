"""Learned judges: whatever the batch, a classifier says what it says of each text alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedTokenizerFast,
)

from hfpg.config import ConfigError
from hfpg.rewards import ClassifierReward, Judge
from tests import tiny


PROMPTS = [f"{tiny.WORDS[5 + i]} " for i in range(9)]
COMPLETIONS = [" ".join(tiny.WORDS[10 + i : 10 + i + 1 + i * 5 % 11]) for i in range(9)]  # of very different lengths
POSITIONS = 24


def larger(model: Any) -> Any:
    """Weights large enough that texts get different scores."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(12)
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


def own_tokenizer(**kwargs: Any) -> PreTrainedTokenizerFast:
    """A classifier's tokenizer that begins every text with <eos>, as BERT's begins with [CLS]."""
    from tokenizers.processors import TemplateProcessing

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
    reward = ClassifierReward(bert(), own_tokenizer(pad_token="<unk>"), max_tokens=30)
    sizes, logits = [], reward._logits
    monkeypatch.setattr(reward, "_logits", lambda ids: sizes.append((len(ids), max(map(len, ids)))) or logits(ids))
    reward(PROMPTS, COMPLETIONS)
    assert sum(rows for rows, _ in sizes) == 9
    assert all(rows * width <= 30 for rows, width in sizes) and len(sizes) < 9


def test_a_decoder_that_looks_for_its_last_token(tmp_path: Path):
    """GPT-2 reads its score at the last token that is not padding."""
    model, tokenizer = gpt2(pad_token_id=1), tiny.tokenizer(pad_token="<unk>")
    reward = ClassifierReward(saved(tmp_path, model, tokenizer))
    assert reward(PROMPTS, COMPLETIONS) == pytest.approx(one_by_one(model, tokenizer), abs=1e-5)


@pytest.mark.parametrize(("model_pad", "tokenizer_pad"), [(None, None), (None, "<unk>"), (1, None)])
def test_without_a_pad_token_the_scores_are_still_right(model_pad: int | None, tokenizer_pad: str | None):
    model = gpt2(model_pad)
    tokenizer = tiny.tokenizer(**({"pad_token": tokenizer_pad} if tokenizer_pad else {}))
    found = ClassifierReward(model, tokenizer)(PROMPTS, COMPLETIONS)
    assert found == pytest.approx(one_by_one(model, tokenizer), abs=1e-5)


def test_a_tokenizer_whose_pad_token_is_not_the_models():
    """The model finds the last token by *its* pad id; filled with another one, it would read a score from padding."""
    model, tokenizer = gpt2(pad_token_id=1), tiny.tokenizer(pad_token=tiny.WORDS[63])
    found = ClassifierReward(model, tokenizer)(PROMPTS, COMPLETIONS)
    assert found == pytest.approx(one_by_one(model, tokenizer), abs=1e-5)


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
    with pytest.raises(ConfigError, match=r"judge has no label 'fine'; it has \['bad', 'so-so', 'good'\]"):
        ClassifierReward(f"{source}#fine")


def test_the_text_is_read_with_the_judges_own_vocabulary(tmp_path: Path):
    """The judge gets the policy's token ids too, and another vocabulary: it must look at neither."""
    model, tokenizer = bert(), own_tokenizer(pad_token="<unk>")
    judge = Judge(saved(tmp_path / "judge", model, tokenizer))
    ids = [[10_000 + i] for i in range(9)]
    scores = judge(PROMPTS, COMPLETIONS, ids, {"column": list(range(9))})
    assert scores.scores.tolist() == pytest.approx(one_by_one(model, tokenizer), abs=1e-5)
    assert judge.names == ["judge"]


def test_a_loaded_classifier_with_its_tokenizer_is_frozen():
    model, tokenizer = bert(), own_tokenizer(pad_token="<unk>")
    model.train()
    reward = ClassifierReward(model, tokenizer)
    assert reward(PROMPTS, COMPLETIONS) == reward(PROMPTS, COMPLETIONS)  # no dropout
    assert not any(p.requires_grad for p in reward.model.parameters())
    with pytest.raises(ConfigError, match="the reward model .* needs its tokenizer; give it in reward_processing_cla"):
        ClassifierReward(model)
    with pytest.raises(ConfigError, match="needs its tokenizer"):
        Judge([model])
    assert Judge([model], tokenizers=[tokenizer]).names


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
