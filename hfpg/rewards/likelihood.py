"""Likelihood judges: what another language model thinks of a completion.

    CausalFluency     (1/C) Σ_t log p(y_t | x, y_<t)         under a causal language model
    MaskedFluency     (1/C) Σ_t log p(y_t | x, y_≠t)         under a masked language model: token t is masked
                                                             (pseudo-log-likelihood, Salazar et al. 2020, 1910.14659)
    Relevance         cos(e(x), e(y))                        e: the mean of a model's last hidden states

Each has its own tokenizer and reads text, so the policy's vocabulary never matters; C counts the judge's tokens, and
a token that begins in the prompt and ends in the completion is the completion's. Batches are sorted by length, which
changes no score beyond rounding.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from hfpg.config import ConfigError, no_progress_bar, require
from hfpg.ops.logprobs import chosen_logprobs
from hfpg.rewards.model_judge import ModelJudge, in_batches
from hfpg.rewards.rules import optional
from hfpg.types import Text, ends_in_answer, plain_text, text_of


class Row(NamedTuple):
    """One text as the judge's tokens, and the places of those that are scored."""

    ids: list[int]
    scored: list[int]


class Fluency(ModelJudge):
    """What both likelihoods share: text → tokens, of which those of the completion are scored.

    Args:
        reduce: "mean" over the completion's tokens, or their "sum".
        given_prompt: False: the completion is judged alone, as if it had no prompt.

    A conversation goes through the chat template of the judge's tokenizer. A prompt that is too long loses its
    beginning; a completion that is empty, or does not fit into the model's context, is not judged (None).
    """

    needs = 0  # tokens that must stand before one that is scored

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        reduce: Literal["mean", "sum"] = "mean",
        given_prompt: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = "float32",
        max_tokens: int = 4096,
        name: str,
    ):
        super().__init__(model, tokenizer, device=device, dtype=dtype, max_tokens=max_tokens, name=name)
        require(reduce in ("mean", "sum"), f"reduce={reduce!r}; use 'mean' or 'sum'")
        self.reduce, self.given_prompt = reduce, given_prompt

    def _check(self) -> None:
        require(
            getattr(self.tokenizer, "is_fast", False),
            f"{self.called} needs a fast tokenizer, which says where in the text each token stands; "
            f"{type(self.tokenizer).__name__} is none",
        )
        super()._check()

    def __call__(self, prompts: list[Text], completions: list[Text], **columns: Any) -> list[float | None]:
        """One log-likelihood per completion, in nats; None: empty, or too long for the model."""
        rows = [self._row(p, c) for p, c in zip(prompts, completions, strict=True)]
        known = [i for i, row in enumerate(rows) if row is not None]
        scores: list[float | None] = [None] * len(rows)
        with self._evaluating():
            sums = self._sums([row for row in rows if row is not None])
        for i, total in zip(known, sums, strict=True):
            row = rows[i]
            assert row is not None
            scores[i] = total / len(row.scored) if self.reduce == "mean" else total
        return scores

    @abstractmethod
    def _sums(self, rows: list[Row]) -> list[float]:
        """Σ log p of each row's scored tokens, in nats."""

    def _before(self) -> list[int]:
        """What stands before a text that has nothing before it."""
        return []

    def _row(self, prompt: Text, completion: Text) -> Row | None:
        written, special, before = text_of(completion), True, ""
        if self.given_prompt:
            before = prompt if isinstance(prompt, str) else self._templated(prompt)
            special = isinstance(prompt, str)
        encoded = self.tokenizer(
            before + written, add_special_tokens=special, return_offsets_mapping=True, verbose=False
        )
        ids, places = list(encoded.input_ids), encoded.offset_mapping  # a special token's place is (0, 0)
        scored = [t for t, (_, end) in enumerate(places) if end > len(before)]
        if scored and scored[0] == 0:
            first = self._before()
            ids, scored = first + ids, [t + len(first) for t in scored]
        cut = max(0, len(ids) - self.limit)
        if cut:
            head = next((t for t, place in enumerate(places) if tuple(place) != (0, 0)), 0)
            if not scored or scored[0] - cut < max(head, self.needs):
                return None
            ids, scored = ids[:head] + ids[head + cut :], [t - cut for t in scored]
        scored = [t for t in scored if t >= self.needs]
        return Row(ids, scored) if scored else None

    def _templated(self, prompt: list[dict[str, Any]]) -> str:
        if not getattr(self.tokenizer, "chat_template", None):
            raise ConfigError(
                f"the judge {self.name!r} has no chat template, and the prompts are conversations; set "
                "given_prompt=False to judge completions alone"
            )
        how = "continue_final_message" if ends_in_answer(prompt) else "add_generation_prompt"
        return self.tokenizer.apply_chat_template(prompt, tokenize=False, **{how: True})


class CausalFluency(Fluency):
    """Log-likelihood of the completion, given the prompt, under another causal language model.

    Where nothing stands before the first token, it is given the beginning-of-text token (else the end-of-text token);
    a model without either leaves the first token out.
    """

    auto = AutoModelForCausalLM
    needs = 1

    def __init__(self, model: Any, tokenizer: Any = None, *, name: str = "fluency", **settings: Any):
        super().__init__(model, tokenizer, name=name, **settings)

    def _before(self) -> list[int]:
        begin = self.tokenizer.bos_token_id
        begin = self.tokenizer.eos_token_id if begin is None else begin
        return [] if begin is None else [begin]

    def _sums(self, rows: list[Row]) -> list[float]:
        sums = [0.0] * len(rows)
        for batch in in_batches([len(row.ids) for row in rows], self.max_tokens):
            inputs = self._padded([rows[i].ids for i in batch])
            logits = self.model(**inputs).logits
            for k, i in enumerate(batch):
                at = torch.tensor(rows[i].scored, device=logits.device)
                sums[i] = _logprobs(logits[k, at - 1], inputs["input_ids"][k, at]).sum(dtype=torch.float64).item()
        return sums


class MaskedFluency(Fluency):
    """Pseudo-log-likelihood of the completion under a masked language model: one token is masked at a time.

    It costs one forward pass per token of the completion, batched up to max_tokens.
    """

    auto = AutoModelForMaskedLM

    def __init__(self, model: Any, tokenizer: Any = None, *, name: str = "masked_fluency", **settings: Any):
        super().__init__(model, tokenizer, name=name, **settings)
        require(
            self.tokenizer.mask_token_id is not None,
            f"the judge {name!r} has no mask token; give a masked language model, or use CausalFluency",
        )

    def _sums(self, rows: list[Row]) -> list[float]:
        sums = [0.0] * len(rows)
        masked = [(i, t) for i, row in enumerate(rows) for t in row.scored]
        for batch in in_batches([len(rows[i].ids) for i, _ in masked], self.max_tokens):
            pairs = [masked[n] for n in batch]
            inputs = self._padded([rows[i].ids for i, _ in pairs])
            place = (torch.arange(len(pairs)), torch.tensor([t for _, t in pairs]))
            tokens = inputs["input_ids"][place].clone()
            inputs["input_ids"][place] = self.tokenizer.mask_token_id
            found = _logprobs(self.model(**inputs).logits[place], tokens)
            for (i, _), value in zip(pairs, found.tolist(), strict=True):
                sums[i] += value
        return sums


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    return chosen_logprobs(logits.to(torch.promote_types(logits.dtype, torch.float32)), tokens)


class Relevance(ModelJudge):
    """Cosine similarity, in [−1, 1], of the embeddings of prompt and completion. Of a conversation, the last message.

    Args:
        pooling: "mean" of the last hidden states; "cls": the first one; "own": as the model says, by the library
            sentence-transformers (extra `embedding`), whose models may pool, project or normalise otherwise.

    An empty prompt or completion is not judged (None); a text that is too long loses its end.
    """

    auto = AutoModel
    whole = False  # many checkpoints lack the pooler, which is not read

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        pooling: Literal["mean", "cls", "own"] = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | str = "float32",
        max_tokens: int = 16384,
        name: str = "relevance",
    ):
        require(pooling in ("mean", "cls", "own"), f"pooling={pooling!r}; use 'mean', 'cls' or 'own'")
        self.pooling = pooling
        if pooling != "own":
            super().__init__(model, tokenizer, device=device, dtype=dtype, max_tokens=max_tokens, name=name)
            return
        self.name = self.__name__ = name
        self.placed = device is not None
        if isinstance(model, str | Path):
            library = optional("sentence_transformers", "sentence-transformers", "embedding", "pooling='own'")
            with no_progress_bar():
                where = None if device is None else str(device)
                model = library.SentenceTransformer(str(model), device=where, model_kwargs={"dtype": dtype})
        require(hasattr(model, "encode"), f"pooling='own' needs a SentenceTransformer, not a {type(model).__name__}")
        self.model = model

    def __call__(self, prompts: list[Text], completions: list[Text], **columns: Any) -> list[float | None]:
        """One similarity per completion; None: one of the two is empty."""
        pairs = [(plain_text(p), plain_text(c)) for p, c in zip(prompts, completions, strict=True)]
        texts = list(dict.fromkeys(text for pair in pairs for text in pair if text.strip()))
        vectors = dict(zip(texts, self._embed(texts), strict=True))

        def similarity(x: Tensor | None, y: Tensor | None) -> float | None:
            return None if x is None or y is None else torch.cosine_similarity(x, y, dim=0).item()

        return [similarity(vectors.get(p), vectors.get(c)) for p, c in pairs]

    def _embed(self, texts: list[str]) -> list[Tensor | None]:
        if not texts:
            return []
        if self.pooling == "own":
            return list(self.model.encode(texts, convert_to_tensor=True, show_progress_bar=False).float())
        side, self.tokenizer.truncation_side = self.tokenizer.truncation_side, "right"
        try:
            encoded = self.tokenizer(texts, truncation=True, max_length=self.limit).input_ids
        finally:
            self.tokenizer.truncation_side = side
        kept = [i for i, ids in enumerate(encoded) if ids]
        vectors: list[Tensor | None] = [None] * len(texts)
        with self._evaluating():
            for batch in in_batches([len(encoded[i]) for i in kept], self.max_tokens):
                inputs = self._padded([encoded[kept[n]] for n in batch])
                hidden = self.model(**inputs).last_hidden_state
                hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
                mask = inputs["attention_mask"][..., None]
                pooled = hidden[:, 0] if self.pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
                for n, vector in zip(batch, pooled, strict=True):
                    vectors[kept[n]] = vector
        return vectors
