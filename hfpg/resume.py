"""What a trainer puts into a checkpoint, and takes out of it when a run goes on."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import EarlyStoppingCallback

from hfpg.checkpoint import best_fits, check_settings, load_checkpoint, read_state, rotate, save_checkpoint
from hfpg.distributed import same_everywhere


if TYPE_CHECKING:
    from hfpg.trainer import PolicyGradientTrainer


def write_checkpoint(trainer: PolicyGradientTrainer, elsewhere: Path | None = None) -> Path:
    """Write checkpoint-N, on the main process, into the run's folder or another one.

    Raises:
        GuardStop: the policy has weights that are not finite.
        CheckpointError: it could not be written.
    """
    trainer.guards.weights(p for p in trainer.learner.actor.parameters() if p.requires_grad)
    run = trainer.run
    run.algorithm, run.guards = dataclasses.asdict(trainer.algorithm_state), trainer.guards.counts()
    run.fisher_trial, run.evaluation_due = trainer.learner.fisher_trial, evaluation_due(trainer)
    run.last_evaluation = trainer.evaluations[-1] if len(trainer.evaluations) > 1 else None
    trainer.events.remember()
    given = trainer.learner, trainer.processing_class, trainer.state, run, settings_of(trainer), trainer.replay
    path = save_checkpoint(elsewhere or trainer.output_dir, *given)
    if elsewhere is None:
        rotate(trainer.output_dir, trainer.args.save_total_limit)
    return path


def go_on_from(trainer: PolicyGradientTrainer, path: Path) -> None:
    """Everything as it was when the checkpoint was written.

    Raises:
        ConfigError: the run that wrote it had other settings, or began from something else.
    """
    trainer.saved_step = math.inf  # a stop in the middle of this must not write over what is read
    names = trainer.judge.names
    rewards = read_state(path)["config"].get("reward_funcs", names)
    if rewards != names:
        trainer.terminal.say(f"note: {path.name} was rewarded by {rewards}, and from here on by {names}")
    then, now = read_state(path)["config"].get("max_steps"), trainer.args.max_steps
    if then != now and not trainer.args.lr_scheduler_type.startswith("constant"):
        kind = trainer.args.lr_scheduler_type
        trainer.terminal.say(
            f"note: max_steps was {then} and is {now}: the {kind} learning rate goes on as if always so"
        )
    state, run = load_checkpoint(path, trainer.learner, settings_of(trainer))
    trainer.run = run
    trainer.events.recall(state)
    trainer.algorithm_state = dataclasses.replace(trainer.algorithm.init(), **run.algorithm)
    trainer.guards.resume(run.guards)
    trainer.learner.fisher_trial = run.fisher_trial
    first, last = run.first_evaluation, run.last_evaluation
    trainer.evaluations = [e for e in (first, last) if e is not None]
    best, step = trainer.output_dir / "best", run.watch.get("best_step") if run.watch else None
    fits = trainer.on_main(lambda: best_fits(best, step))
    if not same_everywhere(trainer.accelerator, [fits])[0]:  # it is another branch's, or in another folder
        run.watch = {}
    trainer.replay.load(path, trainer.accelerator.device)
    trainer.saved_step, trainer.updating = trainer.state.global_step, False
    trainer.events.handler.lr_scheduler = trainer.learner.scheduler  # made anew for the step that is resumed


def evaluation_due(trainer: PolicyGradientTrainer) -> bool:
    """Whether an evaluation of this step is asked for, or was before the run was stopped."""
    return trainer.eval_data is not None and (trainer.control.should_evaluate or trainer.run.evaluation_due)


def settings_of(trainer: PolicyGradientTrainer) -> dict[str, Any]:
    """Every setting of the run and its origin, flat: the algorithm's fields and TrainConfig's have different names."""
    name = {"algorithm": type(trainer.algorithm).__name__}
    fields = name | dataclasses.asdict(trainer.algorithm) | trainer.args.to_dict() | trainer.origin
    return json.loads(json.dumps(fields, default=_by_name))


def _by_name(value: Any) -> str:
    """What JSON cannot write; of a function its name, as the rest of its text is an address."""
    text = str(value)
    return getattr(value, "__qualname__", type(value).__qualname__) if " at 0x" in text else text


def check_resumable(trainer: PolicyGradientTrainer, path: Path) -> None:
    """Raise ConfigError for a checkpoint of a run with other settings, before anything is touched."""
    check_settings(path, read_state(path)["config"], settings_of(trainer))


def ended_early(trainer: PolicyGradientTrainer) -> str | None:
    """Why a run that is resumed has ended already: its evaluations had said so, and still do. None: it goes on."""
    limit, watch = trainer.args.stop_overoptimized, trainer.run.watch
    if 0 < limit <= watch.get("falling", 0) and watch.get("name") == trainer.args.keep_best_by:
        return f"stop_overoptimized={limit}"
    for callback in trainer.events.handler.callbacks:
        if isinstance(callback, EarlyStoppingCallback) and (
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
        ):
            return f"EarlyStoppingCallback({callback.early_stopping_patience})"
    return None
