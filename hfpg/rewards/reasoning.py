"""Verifiable tasks of `reasoning-gym` (extra `reasoning`): a data set and its exact reward, by name."""

from __future__ import annotations

import difflib
import json
from typing import Any

from hfpg.config import ConfigError, nearest, require
from hfpg.types import Text


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
        text = completion if isinstance(completion, str) else str(completion[-1]["content"])
        item = json.loads(row)
        if "metadata" not in item:
            return None
        return float(self.task.score_answer(answer=text.rpartition(self.marker)[2].strip(), entry=item))


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
        ConfigError: reasoning-gym is not installed, or has no such task or option.
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
    rows = [
        {"prompt": instruction + row["question"], "answer": str(row["answer"]), "entry": json.dumps(row, default=str)}
        for row in task
    ]
    return rows, ReasoningReward(name, task, marker)
