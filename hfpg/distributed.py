"""What several processes do together: one Accelerator, rows gathered on every rank, errors raised on every rank."""

from __future__ import annotations

import atexit
import gc
import logging
import os
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from accelerate.tracking import get_available_trackers
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch.nn.parallel import DistributedDataParallel

from hfpg.config import TrainConfig, require
from hfpg.fast.heap import keep_freed_memory
from hfpg.types import Rollout, join


logger = logging.getLogger(__name__)


def launch(args: TrainConfig) -> Accelerator:
    """The Accelerator of a run, and CPU threads that fit it.

    `accelerate launch` exports OMP_NUM_THREADS=1 for one CPU process, which leaves the other cores idle: here a
    process takes its share of the cores unless `torch_threads` says otherwise. Training on a CPU it also keeps the
    memory that it frees (hfpg/fast/heap.py).

    Raises:
        ConfigError: launched as several processes of which Accelerate sees one (each would train alone, over the
            other's files); a tracker that is not installed; a kind of parallelism or precision that is not supported.
    """
    trackers = [name for name in args.report_to if name != "none"]
    installed = [str(getattr(t, "value", t)) for t in get_available_trackers()]
    for name in trackers:
        require(
            name in installed, f"report_to={name!r}: that tracker is not installed; there are {installed or 'none'}"
        )
    apple = not torch.cuda.is_available() and torch.backends.mps.is_available()
    if apple:
        logger.warning("training on the CPU: Apple's GPU has no float64, which sampling and statistics need")
    refuse_another("bf16" if args.bf16 else os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower())
    accelerator = Accelerator(
        cpu=args.use_cpu or apple or None,
        mixed_precision="bf16" if args.bf16 else None,  # None: what `accelerate launch` says
        log_with=trackers or None,
        project_dir=(args.output_dir or "runs") if trackers else None,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=args.ddp_timeout))],
    )
    accelerator.gradient_accumulation_steps = 1  # the launcher's setting would scale the gradient
    require(
        accelerator.mixed_precision in ("no", "bf16"),
        f"mixed_precision={accelerator.mixed_precision!r} is not supported; use bf16, or no",
    )
    kind = str(accelerator.distributed_type.value)
    require(
        kind in ("NO", "MULTI_CPU", "MULTI_GPU"),
        f"{kind} is not supported; hfpg runs one process, or several with DDP (accelerate launch --multi_gpu)",
    )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    require(
        world == accelerator.num_processes,
        f"launched as {world} processes, but Accelerate sees {accelerator.num_processes}; on CPUs use "
        f"`ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node {world} …`, on GPUs "
        f"`accelerate launch --multi_gpu --num_processes {world} …`",
    )
    if world > 1:
        atexit.register(leave)
    if accelerator.device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        torch.set_num_threads(args.torch_threads or max(1, cores // local))
        keep_freed_memory()
    return accelerator


def refuse_another(precision: str) -> None:
    """A process has one precision, that of its first Accelerator; another one would be ignored, or fail."""
    first = AcceleratorState().mixed_precision if is_initialized() else precision
    require(
        first == precision,
        f"this run asks for mixed_precision={precision!r}, and an earlier one in this process had {first!r}, which "
        f"stays until the process ends; use bf16={first == 'bf16'} here too, or start a new process",
    )


def leave() -> None:
    """End the process group at exit, its threads with it.

    Without it a finished run of several processes can abort: a thread of gloo that lets go of a tensor asks for the
    interpreter's lock, and is killed in the middle when the interpreter is shutting down (pytorch/pytorch#179291,
    #190489). Ending the group joins its threads only when nobody holds it any more, so models in DDP let it go too.
    """
    if not torch.distributed.is_initialized():
        return
    for ddp in [found for found in gc.get_objects() if type(found) is DistributedDataParallel]:
        for name in ("process_group", "reducer", "logger"):
            setattr(ddp, name, None)
    torch.distributed.destroy_process_group()


def gather_rows(accelerator: Accelerator, mine: Rollout) -> Rollout:
    """Every rank's rows on every rank, padded to one shape, in sample-id order."""
    parts = [mine]
    if accelerator.num_processes > 1:
        parts = [part.to(mine.scores.device) for part in gather_object([mine.to("cpu")])]
    rows = join(parts)
    return rows.take(torch.argsort(rows.sample_ids))


def gather_list(accelerator: Accelerator, mine: list[Any]) -> list[Any]:
    """The concatenation of every rank's list, in rank order."""
    return gather_object(mine) if accelerator.num_processes > 1 else mine


def raise_together(accelerator: Accelerator, error: Exception | None) -> None:
    """Raise on every rank when any rank has an error, so that none waits for one that is gone."""
    texts = gather_list(accelerator, [None if error is None else f"{type(error).__name__}: {error}"])
    if error is not None:
        raise error
    failed = [(rank, text) for rank, text in enumerate(texts) if text is not None]
    if failed:
        raise RuntimeError(f"rank {failed[0][0]} failed: {failed[0][1]}")


def same_everywhere(accelerator: Accelerator, values: list[Any]) -> list[Any]:
    """The main process's values on every rank."""
    if accelerator.num_processes > 1:
        broadcast_object_list(values)
    return values
