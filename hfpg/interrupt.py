"""An error, Ctrl-C, SIGTERM or SIGHUP ends a run; what it has trained is saved first."""

from __future__ import annotations

import _thread
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


GRACE = 15.0  # seconds that a signal waits: half of what most schedulers give a process before they kill it
ENDINGS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


def tell(text: bytes) -> None:
    """Say something on stderr without Python's buffers: the code that a signal interrupts may be printing."""
    with suppress(OSError):
        os.write(2, text)


def speak_to_nobody_where_nobody_listens() -> None:
    """Point stdout and stderr to the null device where the terminal or the other end of the pipe is gone.

    Every print would be an error from then on, also those before the save.
    """
    if not hasattr(select, "poll"):  # Windows
        return
    for descriptor in (1, 2):
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        if any(event & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, event in poll.poll(0)):
            nobody = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nobody, descriptor)
            os.close(nobody)


class Interrupt:
    """What signals do to a run: inside `saving_first` they end it, and inside `held` not before its end."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self._holding = self._saving = False
        self._waiting: int | None = None  # the signal that is held
        self._timer: threading.Timer | None = None
        self._raised = float("-inf")  # when a signal was last made an exception

    @contextmanager
    def saving_first(self, save: Callable[[], None]) -> Iterator[None]:
        """Call `save` before any exception leaves the block; SIGTERM and SIGHUP become SystemExit(128 + n) inside it.

        Signals that come while it saves are ignored, or an impatient second Ctrl-C would undo the first. An error in
        `save` itself is said, and the first one goes on. Signals that the process ignores (nohup) stay ignored.
        """
        # only the main thread may set handlers; elsewhere signals keep their meaning
        ours = ENDINGS if threading.current_thread() is threading.main_thread() else []
        before = {number: signal.getsignal(number) for number in ours}
        before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
        for number in before:
            signal.signal(number, self._hear)
        try:
            yield
        except BaseException:
            self._saving = True
            speak_to_nobody_where_nobody_listens()
            try:
                save()
            except Exception as error:
                self.say(f"what was trained since the last checkpoint could not be saved: {error}")
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            self._saving = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """A signal inside takes effect at the end of the block, or at a second one, or after GRACE seconds.

        For an update and its report: between optimizer steps there is no exact place to resume from.
        """
        self._holding, self._waiting, self._timer = True, None, None
        try:
            yield
        finally:
            self._holding = False
            if self._timer is not None:
                self._timer.cancel()
        if self._waiting is not None:
            self._end(self._waiting)

    def _hear(self, number: int, frame: Any) -> None:
        """The handler of every signal."""
        speak_to_nobody_where_nobody_listens()
        if self._saving or time.monotonic() - self._raised < 1:
            tell(b"\nwhat was trained is being saved; please wait\n")
        elif self._holding and self._waiting is None:
            self._waiting = number
            tell(b"\nstopping when this update is done; once more: at once, weights but no checkpoint\n")
            self._timer = threading.Timer(GRACE, _thread.interrupt_main, [number])
            self._timer.daemon = True
            self._timer.start()
        else:
            self._end(number)

    def _end(self, number: int) -> None:
        self._raised = time.monotonic()
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
