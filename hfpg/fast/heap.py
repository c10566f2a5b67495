"""Freed memory that stays with the process.

By default glibc returns the top of the heap, and every block above its mmap threshold, to the system as soon as they
are free, and the next micro-batch pays for fresh pages: 3 to 13 % of a step of GPT-2 small, a sixth of one of
SmolLM2-135M (docs/performance.md). Peak memory does not grow.
"""

from __future__ import annotations

import ctypes
import os


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of <malloc.h>
NEVER = 2**31 - 1  # the largest that mallopt takes
LARGEST = 1 << 27  # bytes: blocks below come from the heap; an embedding of GPT-2 small, 154 MB, does not


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what is freed, for the rest of the process. True if it was told.

    Does nothing without glibc, or where the user has set malloc's thresholds or tunables.
    """
    theirs = any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if theirs or os.name != "posix":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return bool(libc.mallopt(M_TRIM_THRESHOLD, NEVER)) and bool(libc.mallopt(M_MMAP_THRESHOLD, LARGEST))
