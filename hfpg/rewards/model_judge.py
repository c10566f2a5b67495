"""What all judges that are models share: loading, batches by length, padding, and a model that is left as it was."""

from __future__ import annotations

import contextlib
from abc import ABC
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from hfpg.config import ConfigError, no_progress_bar, require


def in_batches(lengths: Sequence[int], max_tokens: int, *, equal: bool = False) -> Iterator[list[int]]:
    """Rows in batches, shortest first, of at most max_tokens with padding; a row that is longer goes alone.

    With `equal`, rows of different lengths are never in one batch.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        full = lengths[i] * (len(batch) + 1) > max_tokens
        if batch and (full or (equal and lengths[i] != lengths[batch[-1]])):
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def embeddings(model: Any) -> int | None:
    """How many tokens the model can embed; None where it does not say (CANINE hashes characters)."""
    try:
        return getattr(model.get_input_embeddings(), "num_embeddings", None)
    except NotImplementedError:
        return None


def longest_input(model: Any, tokenizer: Any) -> int:
    """Tokens that tokenizer and positions allow.

    RoBERTa and its kin count positions from padding_idx + 1 on: they have so many fewer than their config says.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    limits = [tokenizer.model_max_length, positions if positions > 0 else 1 << 30]  # XLNet says −1
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            limits.append(module.num_embeddings - module.padding_idx - 1)
    return min(limits)


class ModelJudge(ABC):
    """A model of the Hub, a folder or memory, and its own tokenizer.

    Args:
        model: Hub id, folder, or a loaded model (which is used as it stands, in evaluation mode, and not changed).
        tokenizer: default: the model's own; needed with a loaded model.
        device: where it runs. Default: where it is; in a run, the run's device.
        dtype: of the weights of a model that is loaded by name.
        max_tokens: tokens of one forward pass, padding included.
        name: what scores are logged under.
    Raises:
        ConfigError: it cannot be loaded, or lacks what the judge needs.
    """

    auto: Any
    whole = True  # weights that a checkpoint lacks, which would be random, are refused
    encoder_decoder = False
    called = "the judge {name!r}"
    failed = "cannot load {source} for the judge {name!r}: {why}"
    needs_tokenizer = "the judge {name!r} needs its model's tokenizer; give tokenizer="

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = "float32",
        max_tokens: int = 4096,
        name: str,
    ):
        require(max_tokens >= 1, f"max_tokens={max_tokens} must be at least 1; 4096 is the default")
        self.name = self.__name__ = name
        self.called, self.max_tokens = self.called.format(name=name), max_tokens
        if isinstance(model, str | Path):
            model, tokenizer = self._load(str(model), tokenizer, dtype)
        require(tokenizer is not None, self.needs_tokenizer.format(name=name))
        self.model, self.tokenizer = model, tokenizer
        self._check()
        self.limit = longest_input(model, tokenizer)
        self.placed = device is not None  # where the user wants it; otherwise the run's device
        if device is not None:
            self.to(device)

    def _load(self, source: str, tokenizer: Any, dtype: torch.dtype | str) -> tuple[Any, Any]:
        """Model, frozen, and tokenizer, by name."""
        require(
            isinstance(dtype, torch.dtype) or dtype == "auto" or isinstance(getattr(torch, dtype, None), torch.dtype),
            f"dtype={dtype!r} is unknown to torch; use 'float32', 'bfloat16' or 'auto' (as the weights are stored)",
        )
        try:
            with no_progress_bar():
                tokenizer = tokenizer or AutoTokenizer.from_pretrained(source)
                options = self._options(source) | {"dtype": dtype, "output_loading_info": True}
                model, info = self.auto.from_pretrained(source, **options)
        except Exception as error:  # of transformers, safetensors, the Hub's client, the file system
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(self.failed.format(source=source, name=self.name, why=why)) from error
        missing = sorted(info["missing_keys"])
        why = f"its checkpoint has no {', '.join(missing[:3])}: these weights would be random"
        require(not (self.whole and missing), self.failed.format(source=source, name=self.name, why=why))
        return model.eval().requires_grad_(False), tokenizer

    def _options(self, source: str) -> dict[str, Any]:
        """More arguments of `from_pretrained`."""
        return {}

    def _check(self) -> None:
        """Refuse a model and a tokenizer that do not fit."""
        kind = type(self.model).__name__
        require(
            self.encoder_decoder or not getattr(self.model.config, "is_encoder_decoder", False),
            f"{self.called} got the encoder-decoder {kind}; give an encoder or a causal model",
        )
        count = embeddings(self.model)
        if count is None:
            return
        words = self.tokenizer.get_vocab()
        require(
            bool(set(words) - set(self.tokenizer.all_special_tokens)),
            f"{self.called} has a tokenizer without a single word: its files are missing; save the tokenizer beside "
            "the model, or give tokenizer=",
        )
        largest = max(words.values())
        require(
            largest < count,
            f"{self.called} has {count} embeddings, and its tokenizer's ids go up to {largest}: that is the tokenizer "
            "of another model; give the model's own",
        )

    @property
    def pad(self) -> int | None:
        """The model's own padding id, by which some models find the last token; None if it has none to embed."""
        pad = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        return pad if pad is not None and 0 <= pad < (embeddings(self.model) or 1 << 62) else None

    def to(self, device: torch.device | str) -> ModelJudge:
        """Move the model."""
        self.model.to(device)
        return self

    def _padded(self, rows: Sequence[Sequence[int]], width: int = 0) -> dict[str, Tensor]:
        """The model's inputs, padded on the right: no earlier token sees that. `width`: at least so many columns."""
        width = max(width, *map(len, rows))
        fill = self.tokenizer.pad_token_id if self.pad is None else self.pad
        ids = [[*row, *[fill or 0] * (width - len(row))] for row in rows]
        mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        device = self.model.device
        return dict(input_ids=torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device))

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """No gradient and no dropout; afterwards the model is in the mode in which it was."""
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            for module, training in modes:
                module.training = training
