"""What a run began from and a checkpoint does not hold: a resumed run must have the same."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from hfpg.models import Reference
from hfpg.pretrained import is_peft


ABOUT = {"peft_version", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "task_type"}


def origin(
    policy: Any, reference: Reference | None, ref_model: Any, prompts: Sequence[Sequence[int]], rewards: list[str]
) -> dict[str, Any]:
    """The prompts, the names of the rewards, the weights that the run needs again, and the adapter's settings.

    Weights: those of the reference, which is the policy as it was passed, and those below an adapter.
    """
    return {
        "train_dataset": row_sum(prompts),
        "reward_funcs": rewards,
        "model": weight_sum(needed_again(policy, reference)),
        "ref_model": weight_sum(ref_model.parameters()) if hasattr(ref_model, "parameters") else ref_model,
        "adapter": adapter_settings(policy) if is_peft(policy) else None,
    }


def needed_again(policy: Any, reference: Reference | None) -> list[Tensor]:
    """The parameters of a policy that has just been passed that no checkpoint brings back."""
    if reference is not None and not reference.adapter_off:
        return list(policy.parameters())  # a copy of it is the reference, adapter included
    if not is_peft(policy):
        return []
    return [p for name, p in policy.named_parameters() if f".{policy.active_adapter}." not in name]


def adapter_settings(model: Any) -> dict[str, Any]:
    """What the configuration of a PeftModel's adapter says that its kind does not say by default."""
    config = model.active_peft_config
    usual = type(config)().to_dict()
    found = {name: value for name, value in config.to_dict().items() if value != usual.get(name) and name not in ABOUT}
    return {name: sorted(value) if isinstance(value, set) else value for name, value in found.items()}


def row_sum(rows: Sequence[Sequence[int]]) -> str:
    """How many rows of token ids, and a checksum of up to 4096 of them."""
    crc = 0
    for row in rows[:: -(-len(rows) // 4096)]:
        crc = zlib.crc32(json.dumps(list(row)).encode(), crc)
    return f"{len(rows)} prompts ({crc:08x})"


def weight_sum(tensors: Iterable[Tensor]) -> str:
    """Checksum of up to 1024 numbers of each tensor."""
    crc = 0
    for tensor in tensors:
        flat = tensor.detach().flatten()
        part = flat[:: max(1, len(flat) // 1024)][:1024].cpu().contiguous()
        crc = zlib.crc32(part.view(torch.uint8).numpy().tobytes(), crc)
    return f"weights {crc:08x}"
