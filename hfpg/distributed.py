"""What several processes do together: one Accelerator, rows gathered on every rank, errors raised on every rank."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from hfpg.config import TrainConfig, require
from hfpg.types import Rollout, join


def launch(args: TrainConfig) -> Accelerator:
    """The Accelerator of a run, and CPU threads that fit it.

    `accelerate launch` exports OMP_NUM_THREADS=1 for one CPU process, which leaves the other cores idle: here a
    process takes its share of the cores unless `torch_threads` says otherwise.

    Raises:
        ConfigError: launched as several processes of which Accelerate sees one (each would train alone, over the
            other's files), or bf16 on hardware without it.
    """
    trackers = [name for name in args.report_to if name != "none"]
    accelerator = Accelerator(
        cpu=args.use_cpu or None,
        mixed_precision="bf16" if args.bf16 else "no",
        log_with=trackers or None,
        project_dir=args.output_dir if trackers else None,
    )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    require(
        world == accelerator.num_processes,
        f"launched as {world} processes, but Accelerate sees {accelerator.num_processes}; on CPUs use "
        f"`ACCELERATE_USE_CPU=true torchrun --standalone --nproc_per_node {world} …`, on GPUs "
        f"`accelerate launch --multi_gpu --num_processes {world} …`",
    )
    if accelerator.device.type == "cpu":
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        torch.set_num_threads(args.torch_threads or max(1, cores // local))
    return accelerator


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
