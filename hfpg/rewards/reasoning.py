"""Verifiable tasks of `reasoning-gym` (extra `reasoning`): a data set and its exact reward, by name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from typing import Any

from hfpg.config import ConfigError, nearest, require
from hfpg.types import Text, text_of


TRIED = 20  # rows whose right answer is scored when a task is made


class ReasoningReward:
    """Scores an answer by the task's own verifier, in 0 … 1.

    The answer is what stands after `marker` in the completion (all of it when there is none), stripped. A row that is
    not of this task's data set cannot be judged (None).
    """

    def __init__(self, name: str, task: Any, marker: str = "####"):
        self.name, self.task, self.marker = name, task, marker

    def __call__(self, completions: list[Text], entry: list[str], **columns: Any) -> list[float | None]:
        """One score per completion; `entry` is the data set's column with the task's row as JSON."""
        return [self._score(text, row) for text, row in zip(completions, entry, strict=True)]

    def _score(self, completion: Text, row: str) -> float | None:
        text = text_of(completion)
        item = from_json(row)
        if not isinstance(item, dict) or "metadata" not in item:
            return None
        answer = text.rpartition(self.marker)[2].strip()
        try:
            return float(self.task.score_answer(answer=answer, entry=item))
        except Exception:  # some verifiers fail on what they cannot parse; on right answers they were tried beforehand
            return 0.0


TUPLE, KEYED = "__tuple__", "__keyed__"  # what JSON does not have, and verifiers compare by


def to_json(row: Any) -> str:
    """A row as text. Tuples and keys that are no text are kept: a verifier compares with them."""

    def marked(value: Any) -> Any:
        if isinstance(value, tuple):
            return {TUPLE: [marked(item) for item in value]}
        if isinstance(value, list):
            return [marked(item) for item in value]
        if isinstance(value, dict):
            if all(isinstance(key, str) for key in value):
                return {key: marked(item) for key, item in value.items()}
            return {KEYED: [[marked(key), marked(item)] for key, item in value.items()]}
        return value

    return json.dumps(marked(row), default=str)


def from_json(text: str) -> Any:
    """What `to_json` was given, from its text."""

    def unmarked(value: dict[str, Any]) -> Any:
        if value.keys() == {TUPLE}:
            return tuple(value[TUPLE])
        return dict(value[KEYED]) if value.keys() == {KEYED} else value

    return json.loads(text, object_hook=unmarked)


def refuse_lossy(reward: ReasoningReward, rows: Sequence[Any]) -> None:
    """Refuse a task whose verifier takes a right answer for a worse one when answer and row have been texts.

    Of a task without a given answer (any colouring that fits is right) there is nothing to try.
    """
    for row in rows:
        if row["answer"] is None:
            continue
        right = float(reward.task.score_answer(answer=row["answer"], entry=row))
        (found,) = reward(completions=[str(row["answer"])], entry=[to_json(row)])
        require(
            found is not None and found >= right,
            f"reasoning-gym's task {reward.name!r} scores its own answer {str(row['answer'])!r:.60} {right:g}, but "
            f"{found} when it is read from a text with the marker {reward.marker!r}: right answers earn nothing; "
            "use another task, such as 'chain_sum', or another marker=",
        )


def reasoning_task(
    name: str, size: int = 1000, seed: int = 0, marker: str = "####", instruction: str = "", **config: Any
) -> tuple[list[dict[str, str]], ReasoningReward]:
    """`train_dataset, reward = reasoning_task("chain_sum", size=2000, min_digits=1, max_digits=2)`.

    Args:
        name: a data set of reasoning-gym.
        size, seed: how many tasks, and which.
        marker: what an answer stands behind in a completion.
        instruction: text before every question.
        config: options of the task.
    Returns:
        rows with `prompt`, `answer` and `entry` (the task's row as JSON), and the reward function.
    Raises:
        ConfigError: reasoning-gym is not installed, has no such task or option, or right answers of the task lose
            their score as text.
    """
    try:
        import reasoning_gym
    except ImportError:
        raise ConfigError(
            "reasoning_task needs the package reasoning-gym; install it with pip install 'hfpg[reasoning]'"
        ) from None
    known = list(reasoning_gym.factory.DATASETS)
    near = ", ".join(difflib.get_close_matches(name, known, n=5, cutoff=0.0))
    require(
        name in known, f"reasoning-gym has no task {name!r}{nearest(name, known)}; it has {len(known)}, such as {near}"
    )
    try:
        task = reasoning_gym.create_dataset(name, size=size, seed=seed, **config)
    except (TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"reasoning-gym's task {name!r} cannot be made with {config}: {error}") from None
    drawn = list(task)
    reward = ReasoningReward(name, task, marker)
    refuse_lossy(reward, drawn[:TRIED])
    rows = [
        {"prompt": instruction + row["question"], "answer": str(row["answer"]), "entry": to_json(row)} for row in drawn
    ]
    return rows, reward
