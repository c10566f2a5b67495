"""Stopwatch and scales: seconds by phase, wall and CPU; resident memory; the laps of one side."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


PHASES = ("generate", "judge", "score", "forward", "backward", "optimizer", "rest")
"""generate: draw completions. judge: the reward. score: old and reference log-probs and values. forward: the training
forward with its loss. rest: everything else of a step."""

Seconds = tuple[float, float]  # wall, CPU of all threads


def now() -> Seconds:
    """The clocks, when a GPU has done what it was given."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


class Stopwatch:
    """Seconds by phase. A phase inside another takes its time from it, and what no phase has is "rest": they add up.

    Args:
        clocks: read for the time; tests have their own.
        also: entered with every phase, such as the profiler's `record_function`.
    """

    def __init__(
        self,
        clocks: Callable[[], Seconds] = now,
        also: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext(),
    ):
        self.clocks, self.also = clocks, also
        self.stack: list[tuple[str, AbstractContextManager[Any]]] = [("rest", nullcontext())]
        self.spent: dict[str, Seconds] = {}
        self.entered: Counter[str] = Counter()
        self.since = clocks()

    def _charge(self) -> None:
        then, self.since = self.since, self.clocks()
        wall, cpu = self.spent.get(self.stack[-1][0], (0.0, 0.0))
        self.spent[self.stack[-1][0]] = wall + self.since[0] - then[0], cpu + self.since[1] - then[1]

    def enter(self, name: str) -> None:
        """A phase begins."""
        self._charge()
        self.entered[name] += 1
        context = self.also(name)
        context.__enter__()
        self.stack.append((name, context))

    def leave(self) -> None:
        """The phase that began last ends."""
        self._charge()
        self.stack.pop()[1].__exit__(None, None, None)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase around a block."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def lap(self) -> tuple[dict[str, Seconds], Counter[str]]:
        """Seconds by phase since the last lap, and how often each was entered."""
        self._charge()
        found, self.spent, self.entered = (self.spent, self.entered), {}, Counter()
        return found


def wrap(owner: Any, name: str, watch: Stopwatch, phase: str | Callable[..., str | None]) -> None:
    """Count the calls of a method or function for a phase; `phase` may look at the arguments, None: not counted."""
    plain = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        which = phase if isinstance(phase, str) else phase(*args, **kwargs)
        with nullcontext() if which is None else watch.phase(which):
            return plain(*args, **kwargs)

    setattr(owner, name, counted)


@contextmanager
def torch_phases(watch: Stopwatch) -> Iterator[None]:
    """Every backward pass and every optimizer step inside is a phase, whoever calls for it."""
    plain = torch.autograd.backward
    wrap(torch.autograd, "backward", watch, "backward")
    before = register_optimizer_step_pre_hook(lambda *_: watch.enter("optimizer"))
    after = register_optimizer_step_post_hook(lambda *_: watch.leave())
    try:
        yield
    finally:
        torch.autograd.backward = plain
        before.remove()
        after.remove()


@dataclass(frozen=True)
class Lap:
    """One step: seconds by phase, tokens that were chosen, tokens of its prompts (each prompt once)."""

    phases: dict[str, Seconds]
    completion_tokens: int
    prompt_tokens: int
    optimizer_steps: int

    @property
    def wall(self) -> float:
        """Seconds on the clock."""
        return sum(wall for wall, _ in self.phases.values())

    @property
    def cpu(self) -> float:
        """Seconds of all threads."""
        return sum(cpu for _, cpu in self.phases.values())


@dataclass
class Meter:
    """The laps of one side, and the reward that both sides use: the share of even token ids."""

    watch: Stopwatch
    generations: int
    laps: list[Lap] = field(default_factory=list)
    completion_tokens: int = 0
    prompt_tokens: int = 0  # of every row

    def even_share(
        self, prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Sequence[int]], **_: Any
    ) -> list[float]:
        """A reward function; counts what it is shown. A prompt has as many words as tokens."""
        self.count(sum(len(p.split()) for p in prompts), sum(len(ids) for ids in completion_ids))
        return [sum(token % 2 == 0 for token in ids) / max(1, len(ids)) for ids in completion_ids]

    def count(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Tokens of rows of this lap."""
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens

    def begin(self) -> None:
        """Forget what was before the first step."""
        self.watch.lap()
        self.completion_tokens = self.prompt_tokens = 0

    def lap(self) -> None:
        """A step is done."""
        seconds, entered = self.watch.lap()
        prompt_tokens = self.prompt_tokens // self.generations
        self.laps.append(Lap(seconds, self.completion_tokens, prompt_tokens, entered["optimizer"]))
        self.completion_tokens = self.prompt_tokens = 0


def memory_mb(field: str) -> float:
    """A line of /proc/self/status in MB: VmRSS, resident now; VmHWM, its peak. NaN where there is no such file.

    `getrusage` would not do: the peak that it tells is inherited from the process that started this one.
    """
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    found = [int(line.split()[1]) for line in lines if line.startswith(f"{field}:")]
    return found[0] / 1024 if found else float("nan")


def held_mb(device: str) -> float:
    """What the process holds now: resident memory; on a GPU nothing counts but tensors."""
    return memory_mb("VmRSS") if device == "cpu" else 0.0


def peak_mb(device: str) -> float:
    """The most that it has held."""
    return memory_mb("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20


@dataclass(frozen=True)
class Run:
    """One process of one side: its laps (the first is warm-up) and its memory in MB, after import and at its peak."""

    library: str
    laps: list[Lap]
    import_mb: float
    peak_mb: float
