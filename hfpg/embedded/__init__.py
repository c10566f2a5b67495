"""The demo's default: a tiny language model, the judge that trains it, the judge that watches, and prompts.

Made from human-rated film-review sentences by `reward_models/build_embedded.py`; each folder has a card, and
`NOTICE` says whose work it rests on.
"""

import json
from pathlib import Path
from typing import Literal

from hfpg.config import require
from hfpg.embedded.judge_b import judge_b


HERE = Path(__file__).resolve().parent

NAME = "hfpg/tiny-gpt2-reviews"
"""What the language model is called in reports and cards."""

MODEL = str(HERE / "tiny-gpt2-reviews")
"""Folder of the language model and its tokenizer; stored in half precision, so load it with dtype=torch.float32."""

JUDGE_A = str(HERE / "judge-a")
"""Folder of the classifier that trains the policy: one logit, the predicted human rating from -4 to 4."""


def prompts(split: Literal["train", "eval"], most: int | None = None) -> list[str]:
    """The prompts of a split, at most `most` of them: beginnings of two to four words.

    No sentence gives prompts to both splits. Raises ConfigError unless `most` is 1 or more.
    """
    lists = json.loads((HERE / "prompts.json").read_text(encoding="utf-8"))
    if split not in lists:
        raise ValueError(f"split={split!r} is unknown; the splits are {', '.join(map(repr, lists))}")
    require(most is None or most >= 1, f"eval_prompts={most} must be at least 1, such as 256")
    return lists[split][:most]


__all__ = ["JUDGE_A", "MODEL", "NAME", "judge_b", "prompts"]
