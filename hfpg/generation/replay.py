"""Decode steps on a GPU as one CUDA graph: recorded once, replayed for every token.

A step of a small model is some thousand kernels, each done before Python has launched the next. Recorded, they are
launched together. For that one step has to be like the next: the newest tokens, their positions and the column of the
cache that they go to are tensors of fixed addresses; attention looks at a window of the cache, of which a mask says
what is filled; who is finished is looked at every few steps only. The tokens are those of `Decoding`: noise is keyed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from hfpg.generation.decoding import Decoding
from hfpg.generation.stock import Finished, KeyedSampler


PATIENCE = 8  # steps between two looks at who is finished: each look waits for the GPU
WINDOW = 64  # columns, of which the window is a multiple
TOLERANCE, COARSE = 1e-3, 0.1  # of the largest logit, between two orders of the same sums; in half precision


def stands_still(model: PreTrainedModel, stop: Finished, config: GenerationConfig) -> bool:
    """Whether steps of this call may be recorded: on a GPU, with attention that takes a mask, without stop strings."""
    return (
        model.device.type == "cuda"
        and model.config._attn_implementation == "sdpa"
        and stop.strings is None  # looked for by the host, in text
        and not config.disable_compile
    )


class ReplayedDecoding(Decoding):
    """One call, whose steps are replayed. Rows leave the batch by halves, and the window grows by halves.

    Each of both is another recording, at about the time of a step by Python. A model whose logits by fixed steps are
    not those of its own is decoded as on a CPU; where recording fails (a model that asks the GPU for a number), fixed
    steps are launched one by one.

    Args:
        tell: hears of both.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ids: Int[Tensor, "B T"],
        sampler: KeyedSampler,
        stop: Finished,
        inputs: dict[str, Any],
        tell: Callable[[str], None],
    ):
        super().__init__(model, ids, sampler, stop, inputs)
        self.tell, self.records = tell, True
        self.pool: Any = None
        self.recordings: list[Callable[[], None]] = []  # the GPU may still be replaying one that is of no more use
        self.advance: Callable[[], None] | None = None

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
            advance = self.advance or self._recorded()
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
        try:
            fixed = self._forward(tokens[:, None], self.positions + 1, seen)[0]
            half = self.layers[0].dtype.itemsize < 4
            agrees = differ(own, fixed) <= (COARSE if half else TOLERANCE)
        except (TypeError, ValueError, IndexError, AttributeError, RuntimeError):
            agrees = False
        if not agrees:
            self.tell(f"{type(self.model).__name__} says something else by steps of fixed shape, so none is recorded")
            for layer in self.layers:
                layer.window = None
                layer.begin()
            return False
        self._note(self.tokens)
        return True

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

    # ── recording

    def _recorded(self) -> Callable[[], None]:
        """The step, recorded; by Python where that cannot be done."""
        self.advance = self._step
        if self.records and self.tokens.is_cuda:
            try:
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                self.advance = record(self._step, self.pool, self.tokens.device)
                self.recordings.append(self.advance)
            except RuntimeError as error:
                self.records = False
                self.tell(f"a step of {type(self.model).__name__} cannot be recorded ({str(error).splitlines()[0]})")
        return self.advance


def differ(a: Tensor, b: Tensor) -> float:
    """The largest difference of two tensors, of the largest entry."""
    return float((a.float() - b.float()).abs().max() / a.float().abs().max().clamp(min=1e-6))


def record(step: Callable[[], None], pool: Any, device: torch.device) -> Callable[[], None]:
    """A CUDA graph of what `step` launches; nothing is computed yet. RuntimeError where `step` waits for the GPU."""
    graph, stream = torch.cuda.CUDAGraph(), recording_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        # other threads, such as a judge's, may use the GPU meanwhile
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            step()
        finally:
            graph.capture_end()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay


@lru_cache
def recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps a workspace for each."""
    return torch.cuda.Stream(device)
