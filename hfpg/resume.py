"""What a trainer puts into a checkpoint, and takes out of it when a run goes on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from hfpg.checkpoint import best_fits, load_checkpoint, read_state, rotate, save_checkpoint
from hfpg.distributed import same_everywhere


def write_checkpoint(trainer: Any) -> Path:
    """Write checkpoint-N, on the main process.

    Raises:
        GuardStop: the policy has weights that are not finite.
        CheckpointError: it could not be written.
    """
    trainer.guards.weights(p for p in trainer.learner.actor.parameters() if p.requires_grad)
    run = trainer.run
    run.algorithm, run.guards = dataclasses.asdict(trainer.algorithm_state), trainer.guards.counts()
    run.fisher_trial, run.evaluation_due = trainer.learner.fisher_trial, evaluation_due(trainer)
    trainer.events.remember()
    given = trainer.learner, trainer.processing_class, trainer.state, run, settings_of(trainer), trainer.replay
    path = save_checkpoint(trainer.output_dir, *given)
    rotate(trainer.output_dir, trainer.args.save_total_limit)
    return path


def go_on_from(trainer: Any, path: Path) -> None:
    """Everything as it was when the checkpoint was written.

    Raises:
        ConfigError: the run that wrote it had other settings, or began from something else.
    """
    trainer.saved_step = trainer.state.global_step  # a stop in the middle of this saves nothing
    names = trainer.judge.names
    rewards = read_state(path)["config"].get("reward_funcs", names)
    if rewards != names:
        trainer.terminal.say(f"note: {path.name} was rewarded by {rewards}, and from here on by {names}")
    state, run = load_checkpoint(path, trainer.learner, settings_of(trainer))
    trainer.run = run
    trainer.events.recall(state)
    trainer.algorithm_state = dataclasses.replace(trainer.algorithm.init(), **run.algorithm)
    trainer.guards.resume(run.guards)
    trainer.learner.fisher_trial = run.fisher_trial
    trainer.evaluations = [] if run.first_evaluation is None else [run.first_evaluation]
    best, step = trainer.output_dir / "best", run.watch.get("best_step") if run.watch else None
    fits = trainer.on_main(lambda: best_fits(best, step))
    if not same_everywhere(trainer.accelerator, [fits])[0]:  # it is another branch's, or in another folder
        run.watch = {}
    trainer.replay.load(path, trainer.accelerator.device)
    trainer.saved_step, trainer.updating = trainer.state.global_step, False
    trainer.events.handler.lr_scheduler = trainer.learner.scheduler  # made anew for the step that is resumed


def evaluation_due(trainer: Any) -> bool:
    """Whether an evaluation of this step is asked for, or was before the run was stopped."""
    return trainer.eval_data is not None and (trainer.control.should_evaluate or trainer.run.evaluation_due)


def settings_of(trainer: Any) -> dict[str, Any]:
    """Every setting of the run and its origin, flat: the algorithm's fields and TrainConfig's have different names."""
    name = {"algorithm": type(trainer.algorithm).__name__}
    fields = name | dataclasses.asdict(trainer.algorithm) | trainer.args.to_dict() | trainer.origin
    return json.loads(json.dumps(fields, default=str))
