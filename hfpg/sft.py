"""Likelihood training: a causal LM learns texts, or answers to prompts, before it is rewarded (SFT).

    L = −(1/N) Σ_t log π(y_t | x, y_<t)        over the N tokens of the texts y, each with its end of text

The loop is that of `transformers.Trainer`.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import PrinterCallback, Trainer, TrainingArguments

from hfpg.config import ConfigError, no_progress_bar, require
from hfpg.text_config import context_length


logger = logging.getLogger(__name__)

IGNORED = -100  # the label of a position that is not learnt, as in transformers
YES, NO = ("true", "yes", "1", "1.0"), ("false", "no", "0", "0.0", "")
QUIET: dict[str, Any] = dict(report_to="none", disable_tqdm=True, logging_strategy="no", save_strategy="no")


def fine_tune(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    prompts: Sequence[str] | None = None,
    *,
    held_out: int = 0,
    output_dir: str | Path | None = None,
    **settings: Any,
) -> tuple[float, float]:
    """Train a model, in place, on texts.

    Args:
        texts: what is learnt; the end-of-text token is learnt behind each.
        prompts: what stands before each text: read, not learnt.
        held_out: the first so many texts are measured and not learnt.
        output_dir: folder for model and tokenizer; it exists only when they are whole.
        settings: fields of `transformers.TrainingArguments`, such as num_train_epochs and learning_rate.
    Returns:
        NLL of the held-out texts before and after, in nats per token; nan where nothing is held out.
    Raises:
        ConfigError: no text is left to learn, not as many prompts as texts, output_dir exists, or the tokenizer has no
            end of text.
    """
    require(
        prompts is None or len(prompts) == len(texts),
        f"{0 if prompts is None else len(prompts)} prompts stand before {len(texts)} texts; give one each",
    )
    require(
        0 <= held_out < len(texts),
        f"{len(texts)} texts are given and {held_out} of them held out, which leaves none to learn; give more texts, "
        f"such as {10 * max(held_out, 1)}",
    )
    taken = output_dir is not None and Path(output_dir).exists()
    require(not taken, f"{output_dir} exists; name a folder that does not, or remove it")
    if output_dir is not None:
        _refuse_unwritable(Path(output_dir))
    rows = tokenized(tokenizer, texts, prompts, context_length(model.config))
    held, learnt = rows[:held_out], [row for row in rows[held_out:] if row["labels"][-1] != IGNORED]
    lost = len(rows) - held_out - len(learnt)
    require(
        bool(learnt),
        f"all {lost} prompts fill the model's context of {context_length(model.config)} tokens, which leaves no token "
        "to learn; give shorter prompts",
    )
    if lost:
        logger.warning(
            "%d of %d texts are not learnt: their prompts fill the model's context", lost, lost + len(learnt)
        )
    with TemporaryDirectory() as folder:
        how: dict[str, Any] = QUIET | {"dataloader_pin_memory": torch.cuda.is_available()} | settings
        trainer = Trainer(model, TrainingArguments(folder, **how), collate, learnt)
        trainer.remove_callback(PrinterCallback)
        before = nll(trainer.model, held)
        trainer.train()
    if output_dir is not None and trainer.is_world_process_zero():
        _save(model, tokenizer, Path(output_dir))
    trainer.accelerator.wait_for_everyone()
    return before, nll(model.eval(), held)


def chosen_texts(path: str | Path, sentences: bool = False) -> list[str]:
    """What people chose in a .jsonl file of preferences, in alphabetical order, each once; ties are left out.

    Args:
        sentences: only texts that begin with a capital letter and end with a full stop, if there are any.
    Raises:
        ConfigError: it cannot be read, or a row has no text in its column `chosen`.
    """
    found: set[str] = set()
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # splitlines also cuts inside of a text
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the preferences {path}: {getattr(error, 'strerror', error)}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{number}: no JSON: {error.msg}; give one object a line") from None
        text = row.get("chosen") if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise ConfigError(f"{path}:{number}: expected a text in the column 'chosen', found {line[:60]!r}")
        if not _is_tie(row, f"{path}:{number}"):
            found.add(text)
    whole = {text for text in found if text[:1].isupper() and text[-1:] in ".!?"} if sentences else set()
    return sorted(whole or found)


def _is_tie(row: dict[str, Any], where: str) -> bool:
    """Whether nobody was preferred, as a reward model reads it: said, by equal scores, or by equal texts."""
    said = str(row.get("tie") if row.get("tie") is not None else "").strip().lower()
    require(said in (*YES, *NO), f"{where}: tie={row.get('tie')!r} is neither true nor false; use true or false")
    scores = row.get("score_chosen"), row.get("score_rejected")
    return said in YES or row["chosen"] == row.get("rejected") or (scores[0] is not None and scores[0] == scores[1])


@torch.no_grad()
def written_by(model: Any, tokenizer: Any, count: int, max_new_tokens: int, **sampling: Any) -> list[str]:
    """What a model writes from its beginning-of-text token, `count` times; texts that do not end by themselves go.

    `sampling`: more arguments of `generate`, such as top_k.
    """
    begin = torch.full((count, 1), tokenizer.bos_token_id, device=model.device)
    ids = model.generate(begin, do_sample=True, max_new_tokens=max_new_tokens, **sampling)[:, 1:]
    return tokenizer.batch_decode(ids[(ids == tokenizer.eos_token_id).any(1)], skip_special_tokens=True)


def tokenized(
    tokenizer: Any, texts: Sequence[str], prompts: Sequence[str] | None = None, context: int | None = None
) -> list[dict[str, list[int]]]:
    """`input_ids` and `labels` of each text; what is beyond the context is cut off, end of text included.

    Labels go by position: the end of text is learnt, though its token may serve as padding, too.
    """
    end = tokenizer.eos_token_id
    require(
        end is not None, "the tokenizer has no end-of-text token; a text must learn to end: set tokenizer.eos_token"
    )

    def ids(text: str, special: bool) -> list[int]:
        found = list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids)
        return found[:-1] if len(found) > 1 and found[-1] == end else found  # some tokenizers end a text themselves

    rows = []
    for i, text in enumerate(texts):
        before = [] if prompts is None else ids(prompts[i], True)
        after = [*ids(text, prompts is None), end]
        labels = [IGNORED] * len(before) + after
        rows.append({"input_ids": [*before, *after][:context], "labels": labels[:context]})
    return rows


def collate(rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """One batch, padded on the right, where every architecture counts positions alike."""
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (width - len(row[name])) for row in rows])

    mask = torch.tensor([[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows])
    return {"input_ids": padded("input_ids", 0), "attention_mask": mask, "labels": padded("labels", IGNORED)}


@torch.no_grad()
def nll(model: Any, rows: Sequence[dict[str, list[int]]], batch: int = 32) -> float:
    """−(1/N) Σ_t log π(y_t | x, y_<t) over all learnt tokens of the rows, in nats; nan without rows."""
    training, total, count = model.training, 0.0, 0
    model.eval()
    for start in range(0, len(rows), batch):
        given = {name: column.to(model.device) for name, column in collate(rows[start : start + batch]).items()}
        labels = given.pop("labels")[:, 1:]
        logits = model(**given).logits[:, :-1].float()
        total += cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum").item()
        count += int((labels != IGNORED).sum())
    model.train(training)
    return total / count if count else float("nan")


def _refuse_unwritable(folder: Path) -> None:
    part = folder.with_name(f"{folder.name}.part")
    try:
        part.mkdir(parents=True, exist_ok=True)
        (part / ".probe").write_text("")
    except OSError as error:
        raise ConfigError(f"output_dir={str(folder)!r} cannot be written: {error.strerror}; name another") from None
    shutil.rmtree(part, ignore_errors=True)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with no_progress_bar():
        model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    os.replace(part, folder)
