"""Judge A, the demo's reward: a one-layer ModernBERT that rates how favourable a (perhaps unfinished) sentence is."""

import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from embedded_data import Sentence, make_readable, select
from embedded_metrics import agreement
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import Pipeline
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.functional import mse_loss
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ModernBertConfig,
    ModernBertForSequenceClassification,
    PreTrainedTokenizerFast,
)


FILM_WEIGHT, OTHER_WEIGHT = 1.0, 0.25
MAX_TOKENS = 128
SPANS, EPOCHS, BATCH, LEARNING_RATE, WORD_DROPOUT = 40_000, 4, 64, 3e-3, 0.2


def make_tokenizer(texts: list[str], vocab: int = 6000) -> PreTrainedTokenizerFast:
    """A lower-case BPE of words apart from punctuation: another vocabulary and segmentation than the policy's."""
    # Not WordPiece: its trainer numbers the "##" pieces in an order that changes from run to run.
    core = Tokenizer(models.BPE(unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    core.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["[PAD]", "[UNK]", "[CLS]"], limit_alphabet=100, show_progress=False
    )
    core.train_from_iterator(texts, trainer)
    # Without a first token of its own an empty text would have no token to take the mean of: its rating would be nan.
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        padding_side="right",
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(vocab: int, width: int = 64, heads: int = 4) -> ModernBertForSequenceClassification:
    """One layer of attention over the whole text, then the mean over its tokens, then a linear rating."""
    config = ModernBertConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=heads,
        max_position_embeddings=MAX_TOKENS,
        classifier_pooling="mean",
        embedding_dropout=0.1,
        mlp_dropout=0.1,
        attention_dropout=0.0,
        classifier_dropout=0.1,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        cls_token_id=2,
        sep_token_id=None,
        num_labels=1,
        problem_type="regression",
        id2label={0: "rating"},
        label2id={"rating": 0},
        attn_implementation="sdpa",
    )
    return ModernBertForSequenceClassification(config)


def fit_teacher(sentences: list[Sentence]) -> tuple[Pipeline, float]:
    """Ridge regression of the mean rating on TF-IDF of words and word pairs; and the slope that undoes its shrinkage.

    Ridge predictions are too timid: regressed on held-out predictions, film ratings have a slope above 1. It is
    estimated by 5-fold cross-validation within the judge's own sentences.
    """
    teacher = Pipeline(
        [("features", TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)), ("ridge", Ridge(alpha=0.5))]
    )
    texts, ratings = [s.text for s in sentences], np.array([s.rating for s in sentences])
    film = np.array([s.source == "movie" for s in sentences])
    weights = {"ridge__sample_weight": np.where(film, FILM_WEIGHT, OTHER_WEIGHT)}
    folds = KFold(5, shuffle=True, random_state=0)
    held_out = cross_val_predict(teacher, texts, ratings, cv=folds, params=weights)
    return teacher.fit(texts, ratings, **weights), float(np.polyfit(held_out[film], ratings[film], 1)[0])


def unfinished(sentences: list[Sentence], count: int, order: random.Random) -> list[str]:
    """Spans of 1 to 25 words, half of them two spans of different sentences in a row, as a policy's text would be."""
    texts = []
    for number in range(count):
        words = []
        for _ in range(1 + number % 2):
            source = order.choice(sentences).text.split()
            start = order.randrange(len(source))
            words += source[start : start + order.randint(1, 25 if number % 2 == 0 else 12)]
        texts.append(" ".join(words))
    return texts


def batches(rows: list[list[int]], order: random.Random) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Batches of similar lengths in random order: the rows' numbers, and their right-padded ids and attention mask."""
    shuffled = sorted(order.sample(range(len(rows)), len(rows)), key=lambda i: len(rows[i]))
    starts = order.sample(range(0, len(rows), BATCH), math.ceil(len(rows) / BATCH))
    for start in starts:
        numbers = shuffled[start : start + BATCH]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(rows[i]) for i in numbers], batch_first=True)
        yield numbers, {"input_ids": ids, "attention_mask": (ids != 0).long()}


def distil(
    model: ModernBertForSequenceClassification, rows: list[list[int]], targets: torch.Tensor, seed: int
) -> ModernBertForSequenceClassification:
    """Regress the teacher's ratings of the rows, some tokens being hidden so that no word carries a rating alone."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    order, steps, step = random.Random(seed), EPOCHS * math.ceil(len(rows) / BATCH), 0
    model.train()
    for epoch in range(1, EPOCHS + 1):
        for numbers, batch in batches(rows, order):
            hidden = (torch.rand(batch["input_ids"].shape) < WORD_DROPOUT) & (batch["attention_mask"] == 1)
            batch["input_ids"] = batch["input_ids"].masked_fill(hidden, 1)
            warm, cosine = min(1.0, (step + 1) / 50), 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * warm * (0.02 + 0.98 * cosine)
            loss = mse_loss(model(**batch).logits[:, 0], targets[numbers])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
        print(f"judge A epoch {epoch}/{EPOCHS} loss {loss.item():.3f}", flush=True)
    return model.eval()


@torch.no_grad()
def scores(folder: Path, texts: list[str]) -> list[float]:
    """The judge's ratings, by the same path that any classifier of the Hub takes."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    for start in range(0, len(texts), 64):
        batch = tokenizer(texts[start : start + 64], padding=True, truncation=True, return_tensors="pt")
        found += model(**batch).logits[:, 0].tolist()
    return found


def build(sentences: list[Sentence], folder: Path, seed: int) -> dict:
    """Fit the teacher, distil it into the model, save in half precision, and measure the files on disk."""
    torch.manual_seed(seed)
    own, start = select(sentences, "judge_a"), time.perf_counter()
    teacher, slope = fit_teacher(own)
    tokenizer = make_tokenizer([s.text for s in own])
    model = make_model(len(tokenizer))
    films = [s for s in own if s.source == "movie"]
    texts = unfinished(own + 2 * films, SPANS, random.Random(seed)) + [s.text for s in own] + [""] * (SPANS // 200)
    targets = torch.tensor(slope * teacher.predict(texts), dtype=torch.float32)
    distil(model, tokenizer(texts, truncation=True).input_ids, targets, seed)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    make_readable(folder)
    seconds = round(time.perf_counter() - start)
    held_out = {part: select(sentences, part, "movie") for part in ("prompts", "judge_b")}
    return {
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "seed": seed,
        "seconds": seconds,
        "slope": round(slope, 3),
        "teacher": {
            p: agreement(teacher.predict([s.text for s in x]), [s.rating for s in x]) for p, x in held_out.items()
        },
        "judge": {
            p: agreement(scores(folder, [s.text for s in x]), [s.rating for s in x]) for p, x in held_out.items()
        },
    }
