"""Learned judges: any `AutoModelForSequenceClassification`, with its own tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hfpg.config import ConfigError, no_progress_bar, require
from hfpg.types import Text


class ClassifierReward:
    """The logit that a sequence classifier gives to prompt + completion.

    The text is tokenised again with the classifier's own tokenizer (and chat template, for conversations), so the
    policy's vocabulary never matters.

    Args:
        model: Hub id, folder, or a loaded classifier. "id#LABEL" takes the logit of that label; without a label the
            classifier must have one output.
        tokenizer: default: the classifier's own.
        max_tokens: tokens of one forward pass, padding included.
    Raises:
        ConfigError: it cannot be loaded, or has several labels and none is named.
    """

    def __init__(self, model: Any, tokenizer: Any = None, *, max_tokens: int = 16384):
        label = ""
        if isinstance(model, str):
            source, _, label = model.partition("#")
            self.name = Path(source).name
            try:
                with no_progress_bar():
                    model = AutoModelForSequenceClassification.from_pretrained(source, dtype=torch.float32)
                tokenizer = tokenizer or AutoTokenizer.from_pretrained(source)
            except (OSError, ValueError) as error:
                first = str(error).strip().splitlines()[0]
                raise ConfigError(
                    f"cannot load the reward model {source!r}: {first} (a function is named 'file.py:name')"
                ) from error
        else:
            self.name = Path(getattr(model.config, "_name_or_path", "") or type(model).__name__).name
            require(
                tokenizer is not None,
                f"the reward model {self.name} needs its tokenizer; give it in reward_processing_classes",
            )
        self.model, self.tokenizer, self.max_tokens = model.eval().requires_grad_(False), tokenizer, max_tokens
        self.column = self._column(label)

    def _column(self, label: str) -> int:
        labels = self.model.config.id2label
        if not label:
            require(
                self.model.config.num_labels == 1,
                f"the reward model {self.name} has the labels {list(labels.values())}; name the one to reward, as in "
                f"'{self.name}#{list(labels.values())[-1]}'",
            )
            return 0
        found = [i for i, name in labels.items() if name == label]
        require(bool(found), f"the reward model {self.name} has no label {label!r}; it has {list(labels.values())}")
        return int(found[0])

    def to(self, device: torch.device | str) -> ClassifierReward:
        """Move the classifier."""
        self.model.to(device)
        return self

    def text(self, prompt: Text, completion: Text) -> str:
        """What the classifier reads."""
        if isinstance(prompt, str):
            return prompt + completion if isinstance(completion, str) else prompt
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError(f"the reward model {self.name} has no chat template, and the prompts are conversations")
        return self.tokenizer.apply_chat_template(list(prompt) + list(completion), tokenize=False)

    @torch.no_grad()
    def __call__(self, prompts: list[Text], completions: list[Text], **columns: Any) -> list[float]:
        """One logit per completion; batches are sorted by length, which changes no score beyond rounding."""
        if not prompts:
            return []
        texts = [self.text(p, c) for p, c in zip(prompts, completions, strict=True)]
        templated = bool(prompts) and not isinstance(prompts[0], str)
        limit = min(self.tokenizer.model_max_length, getattr(self.model.config, "max_position_embeddings", 1 << 30))
        encoded = self._encode(texts, limit, special=not templated)
        scores = [0.0] * len(texts)
        ordered = sorted(range(len(texts)), key=lambda i: len(encoded[i]))
        can_pad = self.model.config.pad_token_id is not None
        start = 0
        while start < len(ordered):
            stop = start + 1
            while (
                can_pad and stop < len(ordered) and len(encoded[ordered[stop]]) * (stop + 1 - start) <= self.max_tokens
            ):
                stop += 1
            rows = ordered[start:stop]
            logits = self._logits([encoded[i] for i in rows])
            for i, value in zip(rows, logits.float()[:, self.column].tolist(), strict=True):
                scores[i] = value
            start = stop
        return scores

    def _encode(self, texts: list[str], limit: int, special: bool) -> list[list[int]]:
        """Token ids of each text. One that is too long loses its beginning: the completion stands at the end."""
        side = self.tokenizer.truncation_side
        try:
            self.tokenizer.truncation_side = "left"
            return self.tokenizer(
                texts, truncation=True, max_length=limit, add_special_tokens=special, padding=False
            ).input_ids
        finally:
            self.tokenizer.truncation_side = side

    def _logits(self, ids: list[list[int]]) -> torch.Tensor:
        device = self.model.device
        width = max(1, max(map(len, ids)))
        fill = self.model.config.pad_token_id or 0  # decoder classifiers find the last token by this id
        rows = torch.tensor([row + [fill] * (width - len(row)) for row in ids], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in ids], device=device)
        return self.model(input_ids=rows, attention_mask=mask).logits
