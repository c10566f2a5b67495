"""Is what is read what was written? Checksums find damage, not forgery."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def file_sums(folder: Path) -> dict[str, list[int]]:
    """Size and CRC-32 of every file in a folder, by its path there."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        crc = 0
        with path.open("rb") as file:
            while part := file.read(1 << 24):
                crc = zlib.crc32(part, crc)
        found[path.relative_to(folder).as_posix()] = [path.stat().st_size, crc]
    return found


def changed_file(folder: Path, written: dict[str, list[int]]) -> str | None:
    """What happened to the first file that is not as `file_sums` has seen it; None: all are."""
    found = file_sums(folder)
    for name, (size, crc) in written.items():
        if name not in found:
            return f"{name} is missing"
        if found[name][0] != size:
            return f"{name} has {found[name][0]} bytes, {size} were written"
        if found[name][1] != crc:
            return f"{name} holds other bytes than were written"
    return None


def sealed(content: dict[str, Any]) -> str:
    """JSON that carries its own checksum."""
    return json.dumps(content | {"crc": zlib.crc32(json.dumps(content).encode())}, indent=1) + "\n"


def unsealed(text: str) -> dict[str, Any]:
    """What `sealed` was given; JSON without a checksum is taken as it is.

    Raises:
        ValueError: it is no JSON object, or not the one that was written.
    """
    content = json.loads(text)
    if not isinstance(content, dict):
        raise ValueError("no JSON object")
    crc = content.pop("crc", None)
    if crc is not None and crc != zlib.crc32(json.dumps(content).encode()):
        raise ValueError("it holds other values than were written")
    return content


def weight_sum(tensors: Iterable[Tensor]) -> str:
    """Checksum of up to 1024 numbers of each tensor."""
    crc = 0
    for tensor in tensors:
        flat = tensor.detach().flatten()
        part = flat[:: max(1, len(flat) // 1024)][:1024].cpu().contiguous()
        crc = zlib.crc32(part.view(torch.uint8).numpy().tobytes(), crc)
    return f"weights {crc:08x}"
