"""Around the loop of a trainer: how a run begins, how it ends, and what is saved when it ends too soon."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hfpg import preflight
from hfpg.checkpoint import CheckpointError, checkpoints, find_checkpoint, set_aside, undamaged
from hfpg.fields import resumed_from
from hfpg.resume import check_resumable, ended_early, go_on_from, write_checkpoint
from hfpg.saving import save_actor_critic


if TYPE_CHECKING:
    from hfpg.trainer import PolicyGradientTrainer


def begin(trainer: PolicyGradientTrainer, resume: str | bool | None) -> None:
    """What comes before the first turn: a fresh folder or a checkpoint to go on from, run.json, the first evaluation.

    Raises:
        ConfigError: a checkpoint that is not there, or of a run with other settings; a folder that holds another run.
    """
    resume = resumed_from(trainer.args.resume_from_checkpoint if resume is None else resume)
    path = _take_folder(trainer, resume)
    unseen, trainer.claimed = trainer.occupied and not trainer.claimed, True
    if trainer.value_head_from is not None and path is None:
        trainer.terminal.say(f"the value head goes on from the one saved with {trainer.model_name}")
    if resume:
        again = trainer.run.evaluation_due or (unseen and trainer.state.global_step == 0)
        trainer.recorder.rewind(trainer.state.global_step, evaluation=again)
        for evaluation in trainer.evaluations if unseen and path is None else ():  # made before the folder was ours
            trainer.recorder.metrics(evaluation["step"], evaluation["metrics"])
        aside = trainer.on_main(lambda: set_aside(trainer.output_dir, trainer.state.global_step))
        if aside:
            trainer.terminal.say(f"checkpoints of later steps are kept under other names: {', '.join(aside)}")
    _write_run_file(trainer, path)
    if hasattr(trainer.algorithm, "warnings") and path is None:
        for text in trainer.algorithm.warnings(fresh_value_head=trainer.value_head_from is None):
            trainer.terminal.say(f"note: {text}")
    trainer.events.begin_training(trainer.args.max_steps)
    if trainer.args.eval_on_start and trainer.eval_data is not None and trainer.state.global_step == 0:
        trainer.evaluate()
    trainer.evaluate_if_due()  # where the run was stopped before it was done
    over = None if path is None else ended_early(trainer)
    if over is not None and trainer.state.global_step < trainer.args.max_steps:
        trainer.terminal.say(f"the run had ended at step {trainer.state.global_step}, by {over}; a larger one goes on")
        trainer.control.should_training_stop = True
    if path is not None and trainer.state.global_step >= trainer.args.max_steps:
        trainer.terminal.say(f"the run is done: step {trainer.state.global_step}; a larger max_steps goes on")
    trainer.clock.read()
    trainer.terminal.start(trainer.state.global_step)


def _take_folder(trainer: PolicyGradientTrainer, resume: str | None) -> Path | None:
    """The run's folder, emptied or as a run left it; the checkpoint that was loaded, if any."""
    step, say = trainer.state.global_step, trainer.terminal.say
    trainer.saved_step = min(trainer.saved_step, step)  # an earlier `train` may have failed to load
    path = find_checkpoint(resume, trainer.output_dir)
    if path is not None:
        path = undamaged(path.resolve(), resume != "True", say)
        check_resumable(trainer, path)
    fresh = path is None and not resume and not trainer.claimed
    if fresh or (path is not None and path.parent != trainer.output_dir.resolve()):
        overwrite = trainer.args.overwrite_output_dir
        trainer.on_main(lambda: preflight.clear_folder(trainer.output_dir, trainer.occupied, overwrite))
    if path is not None:
        go_on_from(trainer, path)
    elif resume:
        preflight.refuse_newest_of_nothing(resume, trainer.named_dir)
        torn, where = trainer.output_dir / "interrupted", trainer.readable(trainer.output_dir)
        cut = f" (weights of an update that was cut short are in {trainer.readable(torn)})" if torn.exists() else ""
        say(f"no checkpoint in {where} to resume from: starting at step 0{cut}")
    return path


def _write_run_file(trainer: PolicyGradientTrainer, path: Path | None) -> None:
    trainer.recorder.run_file(
        {
            "seed": trainer.args.seed,
            "algorithm": {"name": type(trainer.algorithm).__name__, **dataclasses.asdict(trainer.algorithm)},
            "config": trainer.args.to_dict(),
            "rewards": trainer.judge.names,
            "processes": trainer.accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "device": str(trainer.accelerator.device),
            "resumed_from": None if path is None else path.name,
            "model": trainer.model_name,
        }
    )


def end(trainer: PolicyGradientTrainer, stepped: bool) -> None:
    """What comes after the last turn: callbacks hear of it, and the model is pushed where that is asked for."""
    trainer.terminal.stop()
    step, most = trainer.state.global_step, trainer.args.max_steps
    if stepped and step < most:
        trainer.terminal.say(f"ended at step {step} of {most}, by {ended_early(trainer) or 'a callback'}")
    trainer.events.end_training()
    if trainer.args.push_to_hub:
        if trainer.eval_data is not None:  # the card tells what is measured
            trainer.evaluate()
        trainer.terminal.say(f"pushing to {trainer.args.hub_model_id}; what is pushed is saved already")
        url = trainer.push_to_hub()
        trainer.terminal.say(f"pushed to {url}")


def save_before_the_end(trainer: PolicyGradientTrainer) -> None:
    """A signal or an error takes nothing: the step that is done is saved, or weights between two optimizer steps."""
    with suppress(OSError):  # a log on a full disk, say
        trainer.terminal.stop()
    step, say = trainer.state.global_step, trainer.terminal.say
    unsaved = step > max(trainer.saved_step, 0)
    if not trainer.accelerator.is_main_process or not (unsaved or trainer.updating or trainer.guards.broken):
        return
    if trainer.guards.broken:
        kept = [p.name for p in checkpoints(trainer.output_dir)] or "none"
        say(f"stopped at step {step}: it is not saved; checkpoints: {kept}")
        return
    if trainer.updating:  # between optimizer steps: no exact place to resume from, but the weights are kept
        where = trainer.output_dir / "interrupted"
        save_actor_critic(trainer.learner.actor, where)
        trainer.processing_class.save_pretrained(where)
    else:
        _record_if_not_yet(trainer)
        try:
            where = write_checkpoint(trainer)
        except CheckpointError as error:  # its disk is full: another one may not be
            say(f"warning: {error}")
            where = _write_elsewhere(trainer)
            say(f"stopped at step {step}; saved in another place: resume_from_checkpoint={str(where)!r} goes on")
            return
    named = "" if trainer.named_dir is not None else f" with output_dir={trainer.readable(trainer.output_dir)!r}"
    again = "start from" if trainer.updating else f"resume_from_checkpoint=True{named} goes on from"
    say(f"stopped at step {step}; what was trained is saved: {again} {trainer.readable(where)}")


def _write_elsewhere(trainer: PolicyGradientTrainer) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="hfpg-"))
    try:
        trainer.recorder.write_waiting(folder)
        return write_checkpoint(trainer, folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _record_if_not_yet(trainer: PolicyGradientTrainer) -> None:
    if trainer.unrecorded is None:
        return
    try:
        trainer.record(*trainer.unrecorded)
    except Exception as error:  # the weights matter more
        trainer.terminal.say(f"step {trainer.state.global_step} could not be written down: {error}")
