"""Decode steps on a GPU as one CUDA graph: recorded once, replayed for every token.

A step of a small model is some thousand kernels, each done before Python has launched the next. Recorded, they are
launched together. For that one step has to be like the next: the newest tokens, their positions and the column of the
cache that they go to are tensors of fixed addresses; attention looks at a window of the cache, of which a mask says
what is filled; who is finished is looked at every few steps only. The tokens are those of `Decoding`: noise is keyed.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from hfpg.fast.linear import half_linears
from hfpg.fields import first_line
from hfpg.generation.decoding import Decoding
from hfpg.generation.stock import Finished, KeyedSampler
from hfpg.text_config import text_config


logger = logging.getLogger(__name__)

PATIENCE = 8  # steps between two looks at who is finished: each look waits for the GPU
WINDOW = 64  # columns, of which the window is a multiple
TOLERANCE, COARSE = 1e-3, 0.05  # of the largest logit, between two orders of the same sums; in half precision
MASKED = 1e4  # logits beyond are some model's −∞

Step = Callable[[], None]


def stands_still(model: PreTrainedModel, stop: Finished, config: GenerationConfig) -> bool:
    """Whether steps of this call may be recorded: on a GPU, with attention that takes a mask, without stop strings."""
    return (
        model.device.type == "cuda"
        and text_config(model.config)._attn_implementation == "sdpa"
        and stop.strings is None  # looked for by the host, in text
        and not config.disable_compile
    )


class ReplayedDecoding(Decoding):
    """One call, whose steps are replayed. Rows leave the batch by halves, and the window grows by halves.

    Each of both is another recording, at about the time of a step by Python. A model whose logits by fixed steps are
    not those of its own is decoded as on a CPU; where recording fails (a model that asks the GPU for a number), fixed
    steps are launched one by one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ids: Int[Tensor, "B T"],
        sampler: KeyedSampler,
        stop: Finished,
        inputs: dict[str, Any],
        recorder: Recorder,
    ):
        super().__init__(model, ids, sampler, stop, inputs)
        self.recorder = recorder
        self.recordings: list[Step] = []  # the GPU may still be replaying one that is of no more use
        self.advance: Step | None = None

    def run(self, counts: Sequence[int]) -> Int[Tensor, "B T"]:
        """Draw until every row is finished or as long as it may be."""
        with half_linears(self.model):
            return super().run(counts)

    def _go_on(self, tokens: Int[Tensor, " B"]) -> Int[Tensor, "B T"]:
        """Draw what follows the first tokens."""
        last = self.longest - 1  # step of the last token
        if last == 0 or not self._begin(tokens):
            return super()._go_on(tokens)
        step = 0
        while (alive := self._left()) and step < last:
            if 2 * alive <= len(self.tokens):
                self._shrink(alive, step)
            chunk = min(PATIENCE, last - step) if self.stop.possible else min(WINDOW, last - step)
            self._see(self.width + step + chunk)
            advance = self.advance or self._recorded() or self._step
            for _ in range(chunk):
                advance()
            step += chunk
        self._settle()
        steps = int(self.step) + 1  # this waits for the GPU: what it replays has to live that long
        longest = int(self.stop.lengths.max()) if self.stop.possible else steps
        self.sampler.record.steps = longest
        return self.ids[:, : self.width + longest]

    # ── one step

    def _step(self) -> None:
        """Read the newest tokens, draw the next, note who is finished: without a word from the host."""
        self.step += 1
        self.positions += 1
        self.seen.index_fill_(3, self.column, True)
        with without_cache(self.tokens.device.type):
            logits, values = self._forward(self.tokens[:, None], self.positions, self.seen[..., : self.window])
        self.tokens.copy_(self._draw(logits, values, self.step))
        self.column += 1
        self._note(self.tokens)

    def _note(self, tokens: Int[Tensor, " b"]) -> None:
        if self.stop.possible:
            self.lengths += ~self.done
            self.done |= self.stop.ended(tokens[:, None])

    def _left(self) -> int:
        """How many rows are not finished; this waits for the GPU."""
        return len(self.tokens) - int(self.done.sum()) if self.stop.possible else len(self.tokens)

    def _recorded(self) -> Step | None:
        """The step, recorded, if it can be."""
        self.advance = self.recorder.record(self._step, type(self.model).__name__, self.tokens.device)
        if self.advance is not None:
            self.recordings.append(self.advance)
        return self.advance

    # ── what stays where it is from step to step

    @property
    def columns(self) -> int:
        """Of the cache: what the largest window has."""
        return -(-super().columns // WINDOW) * WINDOW

    def _begin(self, tokens: Int[Tensor, " B"]) -> bool:
        """Everything in its place; False, and all as it was, where the model does not do the same by fixed steps."""
        device = tokens.device
        self.tokens = tokens.clone()
        self.step, self.column = torch.tensor([[0], [self.width]], device=device)  # the newest tokens' column
        self.seen = torch.zeros(len(tokens), 1, 1, self.columns, dtype=torch.bool, device=device)
        self.seen[..., : self.width] = True if self.mask is None else self.mask[:, None, None, : self.width].bool()
        mask = None if self.mask is None else self.mask[:, : self.width + 1]
        own = self._forward(tokens[:, None], self.positions + 1, mask)[0]
        self.window = 0
        self._see(self.width + 1)
        seen = self.seen[..., : self.window].clone()
        seen[..., self.width] = True
        reason = self._differs(own, tokens, seen)
        if reason is not None:
            self.recorder.tell(f"{type(self.model).__name__} says something else by steps of fixed shape ({reason})")
            for layer in self.layers:
                layer.window = None
                layer.begin()
            return False
        self._note(self.tokens)
        return True

    def _differs(self, own: Tensor, tokens: Tensor, seen: Tensor) -> str | None:
        """What is wrong with a step of fixed shape, beside the model's own logits [B, V] after the same tokens."""
        try:
            found = differ(own, self._forward(tokens[:, None], self.positions + 1, seen)[0])
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            return first_line(error)
        most = COARSE if self.layers[0].dtype.itemsize < 4 else TOLERANCE
        return None if found <= most else f"by {found:.2g} of the largest logit, more than {most}"

    def _see(self, columns: int) -> None:
        """A window of so many columns at least; it grows by half, for few recordings."""
        if columns <= self.window:
            return
        wanted = max(columns, self.window + self.window // 2)
        self.window = min(-(-wanted // WINDOW) * WINDOW, self.columns)
        for layer in self.layers:
            layer.fix(self.column, self.window)
        self.advance = None

    def _shrink(self, alive: int, step: int) -> None:
        """Keep the rows that are left."""
        for layer in self.layers:
            layer.filled = self.width + step
        self.tokens = self._drop(self.tokens, alive)
        self.advance = None

    def _take(self, order: Int[Tensor, " b"]) -> None:
        super()._take(order)
        self.seen = self.seen[order]


class Recorder:
    """Makes the recordings of all calls of a generator, in one pool of memory; after one that failed no more."""

    def __init__(self) -> None:
        self.possible, self.told = True, False
        self.pool: Any = None
        self.newest: Step | None = None  # keeps the pool: its memory serves the recordings of the next call

    def record(self, step: Step, name: str, device: torch.device) -> Step | None:
        """A CUDA graph of what `step` launches; None where there can be none. `name`: of the model."""
        if not self.possible or device.type != "cuda":
            return None
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            try:
                self.newest = record(step, self.pool, device)
            except torch.OutOfMemoryError:  # while it records torch cannot give back what it keeps
                torch.cuda.empty_cache()
                self.newest = record(step, self.pool, device)
        except RuntimeError as error:
            self.possible = False
            self.tell(f"a step of {name} cannot be recorded ({first_line(error)})")
            return None
        return self.newest

    def tell(self, reason: str) -> None:
        """Say once why steps are not replayed."""
        if not self.told:
            logger.info("decode steps are launched one by one, which takes longer: %s", reason)
        self.told = True


def differ(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors of logits, of the largest entry."""
    a, b = a.float(), b.float()
    inside = (a.abs() < MASKED) | (b.abs() < MASKED)
    a, b = torch.where(inside, a, 0), torch.where(inside, b, 0)
    return float((a - b).abs().max() / a.abs().max().clamp(min=1e-6))


@contextlib.contextmanager
def without_cache(kind: str) -> Iterator[None]:
    """Autocast, if it is on, without its cache of weights: what a graph reads has to stay where it is."""
    if not torch.is_autocast_enabled(kind):
        yield
        return
    with torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False):
        yield


def record(step: Step, pool: Any, device: torch.device) -> Step:
    """A CUDA graph of what `step` launches; nothing is computed yet. RuntimeError where `step` waits for the GPU."""
    graph, stream = torch.cuda.CUDAGraph(), recording_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        # other threads, such as a judge's, may use the GPU meanwhile
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            step()
        except BaseException:
            abandon(graph, pool, stream.device_index)
            raise
        graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay


def abandon(graph: Any, pool: Any, device: int) -> None:
    """End a recording in which something failed: CUDA refuses to, and torch's allocator is to stop recording too.

    Otherwise it would believe for the rest of the process that a recording is under way, and give back no memory.
    """
    for end in (graph.capture_end, lambda: torch._C._cuda_endAllocateToPool(device, pool)):
        with contextlib.suppress(RuntimeError):  # that of the step is raised
            end()


@lru_cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps a workspace for each."""
    return torch.cuda.Stream(device)
