"""A Bradley–Terry world: every word has a weight, a text is worth their sum, and people choose by σ(difference)."""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests import tiny


WORDS = tiny.WORDS[2:18]
PROMPTS = tiny.WORDS[40:44]


@dataclass(frozen=True)
class World:
    """Weights of the words; `prompt_weight` is what a prompt adds to all its answers, and no choice depends on it."""

    weights: dict[str, float]
    prompt_weight: float = 0.0

    @staticmethod
    def make(seed: int, prompt_weight: float = 0.0) -> World:
        """Weights drawn from N(0, 1)."""
        draw = random.Random(seed)
        return World({word: draw.gauss(0, 1) for word in WORDS}, prompt_weight)

    def reward(self, prompt: str, text: str) -> float:
        """The true r: Σ w over the words, plus the prompt's own term."""
        return sum(self.weights[w] for w in text.split()) + self.prompt_weight * PROMPTS.index(prompt.strip())

    def pairs(self, count: int, seed: int) -> list[dict[str, Any]]:
        """Pairs of texts of 1 to 5 words, whose better one is chosen with probability σ(Δr)."""
        draw, rows = random.Random(seed), []
        for _ in range(count):
            prompt = draw.choice(PROMPTS) + " "
            one, other = (" ".join(draw.choices(WORDS, k=draw.randint(1, 5))) for _ in range(2))
            difference = self.reward(prompt, one) - self.reward(prompt, other)
            if draw.random() >= 1 / (1 + math.exp(-difference)):
                one, other = other, one
            rows.append({"prompt": prompt, "chosen": one, "rejected": other})
        return rows


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def backbone(folder: Path, *, layers: int = 1, width: int = 32, **ids: Any) -> str:
    """A tiny GPT-2 language model whose padding is EOS and whose tokenizer pads on the left, as many have."""
    torch.manual_seed(0)
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0} | ids
    config = GPT2Config(vocab_size=tiny.VOCABULARY, n_embd=width, n_layer=layers, n_head=2, n_positions=24, **ids)
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer = tiny.tokenizer(pad_token="<eos>", padding_side="left", model_max_length=24)
    tokenizer.save_pretrained(folder)
    return str(folder)
