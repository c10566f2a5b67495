"""Learned judges: any `AutoModelForSequenceClassification`, with its own tokenizer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification
from transformers.utils.peft_utils import find_adapter_config_file

from hfpg.config import ConfigError, nearest, require
from hfpg.rewards.model_judge import ModelJudge, in_batches
from hfpg.types import Text, ends_in_answer


class Tokens(NamedTuple):
    """One text as the classifier reads it."""

    ids: list[int]
    types: list[int]  # the segment of each token, where the tokenizer says it; else empty


class ClassifierReward(ModelJudge):
    """The logit that a sequence classifier gives to prompt + completion: `pipeline`'s value, no function applied.

    The text is tokenised again with the classifier's own tokenizer (and chat template, for conversations), so the
    policy's vocabulary never matters. Batches are sorted by length, which changes no score beyond rounding: a model
    whose scores depend on padding gets texts of one length at a time.

    Args:
        model: Hub id, folder, or a loaded classifier (which is used as it stands, in evaluation mode, and not
            changed). "id#LABEL" takes the logit of that label.
        tokenizer: default: the classifier's own.
        label: the same as "#LABEL". Without a label the classifier must have one output.
        normalize: (logit − reward_mean) / reward_std where the classifier's config.json has both, as
            `reward_models/normalize.py --store` writes them; the name then ends in "_normalized". False: the logit.
        device: where it runs. Default: where it is; in a run, the run's device.
        dtype: of the weights of a classifier that is loaded by name; "auto": as they are stored.
        max_tokens: tokens of one forward pass, padding included.
    Raises:
        ConfigError: it cannot be loaded, has no trained head, has several labels and none is named, its tokenizer
            has tokens that it cannot embed, or what stands in its config is no mean and standard deviation.
    """

    auto = AutoModelForSequenceClassification
    encoder_decoder = True
    called = "the reward model {name}"
    failed = "cannot load the reward model {source!r}: {why} (a function is named 'file.py:name')"
    needs_tokenizer = "the reward model {name} needs its tokenizer; give it in reward_processing_classes"

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        label: str | None = None,
        normalize: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = "float32",
        max_tokens: int = 16384,
    ):
        if isinstance(model, str) and label is None and not Path(model).is_dir():
            model, mark, label = model.rpartition("#")
            model, label = (model, label) if mark else (label, None)
        name = _name_of(model)
        super().__init__(model, tokenizer, device=device, dtype=dtype, max_tokens=max_tokens, name=name)
        self.column = self._column(label or None, by_name=isinstance(model, str | Path))
        self.mean, self.std = self._moments() if normalize else (0.0, 1.0)
        if (self.mean, self.std) != (0.0, 1.0):
            self.name = self.__name__ = f"{name}_normalized"
        self.padding: bool | None = None  # whether shorter texts may be padded; None: not tried yet

    def _options(self, source: str) -> dict[str, Any]:
        """An adapter does not say how many outputs its base has: a reward model has one."""
        return {"num_labels": 1} if find_adapter_config_file(source) is not None else {}

    def _column(self, label: str | None, by_name: bool) -> int:
        labels = {int(i): str(name) for i, name in self.model.config.id2label.items()}
        names = list(labels.values())
        if label is None:
            example = f"'{self.name}#{names[-1]}'" if by_name else f"label={names[-1]!r}"
            require(len(names) == 1, f"{self.called} has the labels {names}; name the one to reward, as in {example}")
            return next(iter(labels))
        found = [i for i, name in labels.items() if name == label]
        require(bool(found), f"{self.called} has no label {label!r}; it has {names}{nearest(label, names)}")
        return found[0]

    def _moments(self) -> tuple[float, float]:
        """Mean and standard deviation that stand in the config; 0 and 1 where none do."""
        config = self.model.config
        found: list[Any] = [getattr(config, name, None) for name in ("reward_mean", "reward_std")]
        if found == [None, None]:
            return 0.0, 1.0
        mean, std = found
        numbers = all(isinstance(x, int | float) and math.isfinite(x) for x in found)
        require(
            numbers and std > 0,
            f"{self.called} has reward_mean={mean!r} and reward_std={std!r} in its config.json; they must be a finite "
            "number and one above 0: run reward_models/normalize.py --store True again, or remove both",
        )
        require(
            config.num_labels == 1,
            f"{self.called} has reward_mean and reward_std in its config.json, but {config.num_labels} labels, and "
            "does not say whose they are; remove both, or use ClassifierReward(…, normalize=False)",
        )
        return float(mean), float(std)

    def text(self, prompt: Text, completion: Text) -> str:
        """What the classifier reads.

        Raises:
            ConfigError: a conversation, and the tokenizer has no chat template.
        """
        if not (isinstance(prompt, str) and isinstance(completion, str)) and not self._has_template:
            raise ConfigError(f"{self.called} has no chat template, and the prompts are conversations")
        return as_text(self.tokenizer, prompt, completion)

    @property
    def _has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def __call__(self, prompts: list[Text], completions: list[Text], **columns: Any) -> list[float | None]:
        """One score per completion; None: nothing to read, the text has no token."""
        texts = [self.text(p, c) for p, c in zip(prompts, completions, strict=True)]
        plain = [isinstance(p, str) and isinstance(c, str) for p, c in zip(prompts, completions, strict=True)]
        rows = self._encode(texts, plain)
        scores: list[float | None] = [None] * len(rows)
        known = [i for i, row in enumerate(rows) if row.ids]
        with self._evaluating():
            for batch in self._batches([rows[i] for i in known]):
                logits = self._logits([rows[known[n]] for n in batch])
                for n, logit in zip(batch, logits[:, self.column].tolist(), strict=True):
                    scores[known[n]] = (logit - self.mean) / self.std
        return scores

    def _encode(self, texts: list[str], plain: list[bool]) -> list[Tokens]:
        """Token ids and token types of each text. A chat template has written the special tokens itself.

        A text that is too long loses its beginning: the completion stands at the end.
        """
        rows = [Tokens([], [])] * len(texts)
        side = self.tokenizer.truncation_side
        try:
            self.tokenizer.truncation_side = "left"
            for kind in set(plain):
                chosen = [i for i, p in enumerate(plain) if p is kind]
                told = self.tokenizer(
                    [texts[i] for i in chosen], truncation=True, max_length=self.limit, add_special_tokens=kind
                )
                types = told.get("token_type_ids") or [[]] * len(chosen)
                for i, row in zip(chosen, map(Tokens, told.input_ids, types), strict=True):
                    rows[i] = row
        finally:
            self.tokenizer.truncation_side = side
        return rows

    def _batches(self, rows: list[Tokens]) -> Iterator[list[int]]:
        lengths = [len(row.ids) for row in rows]
        if self.pad is None:  # decoder classifiers refuse a batch then
            yield from ([i] for i in range(len(rows)))
            return
        if self.padding is None and len(set(lengths)) > 1:
            self.padding = self._may_pad(rows[lengths.index(min(lengths))], max(lengths))
        parts: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            parts.setdefault(self._ends(row), []).append(i)
        for part in parts.values():
            some = [lengths[i] for i in part]
            for batch in in_batches(some, self.max_tokens, equal=self.padding is False):
                yield [part[i] for i in batch]

    def _ends(self, row: Tokens) -> int:
        """How often the end token stands in a text: BART and its like refuse a batch in which the numbers differ."""
        config = self.model.config
        return row.ids.count(config.eos_token_id) if config.is_encoder_decoder else 0

    def _may_pad(self, row: Tokens, width: int) -> bool:
        """Whether a text scores the same with padding behind it. XLNet, for one, reads its score there."""
        alone, padded = self._logits([row]).float(), self._logits([row], width).float()
        rounding = torch.finfo(self.model.dtype).eps ** 0.5
        return bool(((alone - padded).abs() <= rounding * (1 + alone.abs())).all())

    def _logits(self, rows: list[Tokens], width: int = 0) -> Tensor:
        inputs = self._padded([row.ids for row in rows], width)
        if rows[0].types:
            columns = inputs["input_ids"].shape[1]
            types = [[*row.types, *[0] * (columns - len(row.types))] for row in rows]
            inputs["token_type_ids"] = torch.tensor(types, device=self.model.device)
        return self.model(**inputs).logits


def as_text(tokenizer: Any, prompt: Text, completion: Text) -> str:
    """Prompt and completion as one text. Beside a conversation, a text is the user's prompt or the answer to it."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt + completion
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}] if prompt else []
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    if ends_in_answer(prompt) and completion:  # one answer, in two pieces
        whole = f"{prompt[-1]['content']}{completion[0]['content']}"
        prompt, completion = prompt[:-1], [completion[0] | {"content": whole}, *completion[1:]]
    return tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)


def _name_of(model: Any) -> str:
    """What scores are logged under: the last part of a Hub id or path."""
    if not isinstance(model, str | Path):
        return Path(getattr(model.config, "_name_or_path", "") or type(model).__name__).name
    path = Path(model)
    return (path.resolve() if path.is_dir() else path).name
