"""What a run began from and a checkpoint does not hold: a resumed run must have the same."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import MISSING, fields
from typing import Any

from hfpg.integrity import weight_sum
from hfpg.models import Reference
from hfpg.pretrained import is_peft, of_adapter


ABOUT = {"peft_version", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "task_type"}


def origin(
    policy: Any, reference: Reference | None, prompts: Sequence[Sequence[int]], rewards: list[str]
) -> dict[str, Any]:
    """The prompts, the names of the rewards, the weights of the reference and below an adapter, its settings."""
    facts: dict[str, Any] = {
        "train_dataset": row_sum(prompts),
        "reward_funcs": rewards,
        "reference": None if reference is None else reference.weight_sum,
        "base_model": None,
        "adapter": None,
    }
    if is_peft(policy):
        active = policy.active_adapter
        below = [p for name, p in policy.named_parameters() if not of_adapter(name, active)]
        facts |= {"base_model": weight_sum(below), "adapter": adapter_settings(policy)}
    return facts


def adapter_settings(model: Any) -> dict[str, Any]:
    """What the configuration of a PeftModel's adapter says that its kind does not say by default."""
    config, found = model.active_peft_config, {}
    for f in fields(config):
        value = getattr(config, f.name)
        usual = f.default_factory() if f.default_factory is not MISSING else f.default
        if value != usual and f.name not in ABOUT:
            found[f.name] = sorted(value) if isinstance(value, set) else value
    return found


def row_sum(rows: Sequence[Sequence[int]]) -> str:
    """How many rows of token ids, and a checksum of up to 4096 of them."""
    crc = 0
    for row in rows[:: -(-len(rows) // 4096)]:
        crc = zlib.crc32(json.dumps(list(row)).encode(), crc)
    return f"{len(rows)} prompts ({crc:08x})"
