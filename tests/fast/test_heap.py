"""glibc is told to keep what is freed, unless the user has said something."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest

from hfpg import distributed
from hfpg.fast import heap
from tests import build


glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is told anything")

FAULTS = """
import resource, sys, torch
from hfpg.fast.heap import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def work():
    for size in (12, 24, 48):
        [torch.ones(size << 18) for _ in range(3)]
work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    """Fresh pages for work that has been done before: blocks of 12, 24 and 48 MB, three of each at once."""
    environ = {name: x for name, x in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    run = [sys.executable, "-c", FAULTS, how]
    return int(subprocess.run(run, env=environ, capture_output=True, text=True, check=True).stdout)


@glibc
def test_work_that_was_done_before_needs_no_fresh_pages():
    assert faults("kept") < faults("default") / 10


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_a_user_who_sets_mallocs_thresholds_is_left_alone(name, monkeypatch):
    monkeypatch.setenv(name, "glibc.malloc.trim_threshold=131072" if name == "GLIBC_TUNABLES" else "131072")
    assert not heap.keep_freed_memory()


def test_a_run_on_the_cpu_keeps_what_it_frees(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(distributed, "keep_freed_memory", lambda: called.append(True))
    build.trainer(tmp_path)
    assert called == [True]


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace())
    assert not heap.keep_freed_memory()
