"""Weights of a frozen model in a file, whose memory the system may have back.

The reference policy is asked once a step, and its weights are as many as the policy's. On a CPU they lie in a file
that is mapped into memory: a layer's pages are read in when it computes, from the system's cache of the file as long
as there is room, and let go right after. The file has no name and is gone with the process, however that ends.
"""

from __future__ import annotations

import copy
import errno
import logging
import mmap
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


logger = logging.getLogger(__name__)

SMALLEST = 64 << 20  # bytes of weights that are worth a file: 21 MB less were lost in the heap's holes (docs/log.md)
ROOM = 10  # times the file's size that must be free on the disk: checkpoints, three times the weights each, come first


class ParkedCopy:
    """A frozen copy of a module, bit for bit, with its weights in a file.

    They are in memory where the system has no such mappings, where there are too few or they are not on a CPU, and
    where the file cannot be made or would take room that checkpoints may need.

    Args:
        original: what is copied.
        shared: parameters by their id that the copy has in common with the original.
        folder: where the file is made: there, or in the nearest folder above that exists; None: in memory.
    """

    def __init__(self, original: nn.Module, shared: Mapping[int, nn.Parameter], folder: Path | None):
        self.memory: mmap.mmap | None = None
        weights = [p for p in original.parameters() if id(p) not in shared and _plain(p)]
        places = list(_places(weights))
        if folder is not None and sum(map(_size, weights)) >= SMALLEST and _maps_let_go():
            try:
                self.memory = _written(weights, places, folder)
            except (OSError, ValueError) as error:  # no room, no right, a file system without mappings
                logger.info("the copy of the weights stays in memory: %s: %s", type(error).__name__, error)
        # never copied in memory: freed again, that would leave a hole there
        views = [] if self.memory is None else [self._view(p, at) for p, at in zip(weights, places, strict=True)]
        parked = dict(zip(map(id, weights), views, strict=False))
        self.module = copy.deepcopy(original, {**shared, **parked}).requires_grad_(False)
        where = dict(zip(map(id, views), places, strict=False))
        for layers in self.module.modules():
            if isinstance(layers, nn.ModuleList):  # not the LM head: a head with hooks is not hfpg's to compute
                for layer in layers:
                    if own := [where[id(p)] for p in layer.parameters() if id(p) in where]:
                        layer.register_forward_hook(partial(self._after, own))

    def _view(self, p: Tensor, at: slice) -> nn.Parameter:
        """What the file says of a parameter."""
        assert self.memory is not None
        found = torch.frombuffer(self.memory, dtype=torch.uint8, count=_size(p), offset=at.start)
        return nn.Parameter(found.view(p.dtype).view(p.shape), requires_grad=False)

    def let_go(self) -> None:
        """No page of the file counts as this process's memory, until it is read again."""
        if self.memory is not None:
            self.memory.madvise(mmap.MADV_DONTNEED)

    def _after(self, places: list[slice], *_: Any) -> None:
        assert self.memory is not None
        for at in places:
            self.memory.madvise(mmap.MADV_DONTNEED, at.start, at.stop - at.start)


def _plain(p: Tensor) -> bool:
    return type(p) is nn.Parameter and p.device.type == "cpu" and p.is_contiguous() and p.numel() > 0


def _size(p: Tensor) -> int:
    return p.numel() * p.element_size()


def _maps_let_go() -> bool:
    """Linux's MADV_DONTNEED lets pages go at once; elsewhere it is a hint."""
    return sys.platform == "linux" and hasattr(mmap, "MADV_DONTNEED")


def _places(weights: Sequence[Tensor]) -> Iterator[slice]:
    """Where in the file each lies: on pages of its own."""
    start = 0
    for p in weights:
        yield slice(start, start + _size(p))
        start += -(-_size(p) // mmap.PAGESIZE) * mmap.PAGESIZE


def _written(weights: Sequence[Tensor], places: Sequence[slice], folder: Path) -> mmap.mmap:
    """A file with these weights, mapped privately: a write would change memory only.

    Its room on the disk is taken first: a disk that fills up later would end the process at a read.
    """
    there, size = next(f for f in (folder, *folder.absolute().parents) if f.is_dir()), places[-1].stop
    if (free := shutil.disk_usage(there).free) < ROOM * size:
        raise OSError(errno.ENOSPC, f"{free} bytes are free, and {ROOM} times the {size} of the file should be")
    with tempfile.TemporaryFile(dir=there) as file:
        os.posix_fallocate(file.fileno(), 0, size)
        for p, at in zip(weights, places, strict=True):
            file.seek(at.start)
            file.write(p.detach().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
