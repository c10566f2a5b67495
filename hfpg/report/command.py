"""The command that started this program, so that it can be run again."""

from __future__ import annotations

import shlex
import sys


def command_line() -> str | None:
    """This program's command, quoted for a shell: `hfpg train …`, `python -m hfpg.cli train …`, `python train.py …`.

    A module that `accelerate launch` or `torchrun` runs stands here as one process runs it. None where no command
    does it again: in a notebook, at a prompt, from `python -c` or from the standard input.
    """
    if sys.argv[0] in ("", "-", "-c") or sys.argv[0].endswith("kernel_launcher.py"):
        return None
    module = getattr(sys.modules["__main__"], "__spec__", None)
    start = sys.argv[:1]
    if module is not None and module.origin == sys.argv[0]:  # `-m` puts the module's file here; its name is what runs
        start = ["python", "-m", module.name]
    elif sys.argv[0].endswith(".py"):
        start = ["python", sys.argv[0]]
    return shlex.join([*start, *sys.argv[1:]])
