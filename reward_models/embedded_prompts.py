"""Prompts: the first two to four words of film sentences that no model and no judge was trained on."""

import json
import random
from pathlib import Path

from embedded_data import Sentence, bucket, select


EVAL = 256
WORDS = (2, 3, 4)


def prefixes(text: str) -> list[str]:
    """The prefixes of two, three and four words that leave something to be written."""
    words = text.split()
    return [" ".join(words[:n]) for n in WORDS if n < len(words)]


def build(sentences: list[Sentence], path: Path) -> dict:
    """One eval prompt each from the first sentences in a random order, all prefixes of the others to train on."""
    own = [s for s in select(sentences, "prompts") if prefixes(s.text)]
    shuffle = random.Random(0)
    order = shuffle.sample(own, len(own))
    eval_prompts: list[str] = []
    while len(eval_prompts) < EVAL:
        sentence = order.pop()
        options = prefixes(sentence.text)
        prompt = options[bucket("prompt-length", sentence.id) % len(options)]
        if prompt not in eval_prompts:
            eval_prompts.append(prompt)
    train = sorted({p for s in order for p in prefixes(s.text)} - set(eval_prompts))
    # Shuffled, so that the first few of either list are a fair sample.
    lists = {"train": shuffle.sample(train, len(train)), "eval": eval_prompts}
    path.write_text(json.dumps(lists, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return {"train": len(train), "eval": len(eval_prompts), "train_sentences": len(order)}
