"""An error, Ctrl-C or SIGTERM ends a run; what it has trained is saved first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def saving_first(save: Callable[[], None], say: Callable[[str], None]) -> Iterator[None]:
    """Call `save` before any exception leaves the block; SIGTERM becomes SystemExit(143) inside it.

    An error in `save` itself is said, and the first one goes on.
    """

    def terminate(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    # only the main thread may set handlers; elsewhere SIGTERM keeps its meaning
    ours = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, terminate) if ours else None
    try:
        yield
    except BaseException:
        try:
            save()
        except Exception as error:
            say(f"what was trained since the last checkpoint could not be saved: {error}")
        raise
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)
