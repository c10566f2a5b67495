"""transformers callbacks: every event fires, every `control.should_*` is obeyed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler, ExportableState

from hfpg.config import TrainConfig
from hfpg.distributed import same_everywhere


def training_arguments(args: TrainConfig, device: torch.device) -> TrainingArguments:
    """A real TrainingArguments with what TrainConfig shares with it, for callbacks to read.

    It refuses `bf16` without a GPU, unless it hears that the CPU is meant.
    """
    return TrainingArguments(
        output_dir=str(args.output_dir),
        max_steps=args.max_steps,
        seed=args.seed,
        learning_rate=args.learning_rate,
        weight_decay=args.weight_decay,
        adam_beta1=args.adam_beta1,
        adam_beta2=args.adam_beta2,
        adam_epsilon=args.adam_epsilon,
        max_grad_norm=args.max_grad_norm,
        lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=args.warmup_steps,
        logging_steps=args.logging_steps,
        eval_strategy="steps" if args.eval_steps else "no",
        eval_steps=args.eval_steps or None,
        save_strategy="steps" if args.save_steps else "no",
        save_steps=args.save_steps or 500,
        save_total_limit=args.save_total_limit,
        run_name=args.run_name,
        disable_tqdm=args.disable_tqdm,
        bf16=args.bf16,
        use_cpu=device.type == "cpu",
        metric_for_best_model=args.keep_best_by or "eval_score",
        greater_is_better=True,
        accelerator_config={"use_configured_state": True},  # or it would reset the Accelerator that exists
        report_to="none",
        push_to_hub=args.push_to_hub,
        hub_model_id=args.hub_model_id,
        hub_private_repo=args.hub_private_repo,
    )


class Events:
    """The callback handler of a run, with its state and control."""

    def __init__(
        self,
        args: TrainConfig,
        callbacks: Sequence[Any] | None,
        *,
        model: Any,
        processing_class: Any,
        learner: Any,
    ):
        self.args, self.accelerator = training_arguments(args, learner.accelerator.device), learner.accelerator
        main = self.accelerator.is_main_process
        self.state = TrainerState(is_local_process_zero=main, is_world_process_zero=main, max_steps=args.max_steps)
        self.state.num_input_tokens_seen = 0
        self.state.compute_steps(self.args, args.max_steps)  # for a loop that is not `train`
        self.control = TrainerControl()
        self.epoch: int | None = None
        made = [c() if isinstance(c, type) else c for c in callbacks or []]
        self.handler = CallbackHandler(
            [DefaultFlowCallback(), *made], model, processing_class, learner.optimizer, learner.scheduler
        )
        self.fire("on_init_end")

    def fire(self, event: str, **values: Any) -> None:
        """Call one event of every callback; the handler resets the flags that the event answers."""
        self.control = getattr(self.handler, event)(self.args, self.state, self.control, **values)

    def remember(self) -> None:
        """Put what callbacks count into the state, for a checkpoint: EarlyStoppingCallback's patience, say."""
        self.state.stateful_callbacks = {}
        for callback in self._stateful():
            self.state.stateful_callbacks.setdefault(type(callback).__name__, []).append(callback.state())

    def recall(self, state: TrainerState) -> None:
        """Go on from the state of a checkpoint; callbacks get what they had counted, and keep their settings."""
        self.state = state
        self.state.is_world_process_zero = self.state.is_local_process_zero = self.accelerator.is_main_process
        saved = {name: list(states) for name, states in (state.stateful_callbacks or {}).items()}
        for callback in self._stateful():
            if states := saved.get(type(callback).__name__):
                for name, value in states.pop(0)["attributes"].items():
                    setattr(callback, name, value)

    def _stateful(self) -> list[Any]:
        return [callback for callback in self.handler.callbacks if isinstance(callback, ExportableState)]

    def add(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add a callback to a trainer that exists."""
        self.handler.add_callback(callback)

    def begin_training(self, max_steps: int) -> None:
        """The loop begins, at step 0 or where a checkpoint left off."""
        self.state.max_steps = max_steps
        self.state.compute_steps(self.args, max_steps)
        self.epoch = None
        self.fire("on_train_begin")

    def begin_step(self, epoch: float) -> None:
        """A step begins; `epoch` is how often the stream has gone through the data set."""
        if self.epoch != int(epoch):
            if self.epoch is not None:
                self.fire("on_epoch_end")
            self.epoch = int(epoch)
            self.fire("on_epoch_begin")
        self.fire("on_step_begin")

    def end_step(self, epoch: float) -> bool:
        """A step is done. True when a callback asks to go on with the next epoch at once."""
        self.state.epoch = epoch
        self.fire("on_step_end")
        self.agree()
        return self.control.should_epoch_stop

    def agree(self) -> None:
        """The main process's flags on every rank.

        A callback may look at the clock, or at files of one machine: ranks that differ would wait for ever.
        """
        names = [f.name for f in dataclasses.fields(self.control) if f.name.startswith("should_")]
        flags = same_everywhere(self.accelerator, [getattr(self.control, name) for name in names])
        for name, flag in zip(names, flags, strict=True):
            setattr(self.control, name, flag)

    def end_training(self) -> None:
        """The loop is over."""
        if self.epoch is not None:
            self.fire("on_epoch_end")
        self.fire("on_train_end")

    def log(self, metrics: dict[str, float]) -> None:
        """Metrics of a step go to the history."""
        self.state.log_history.append({**metrics, "step": self.state.global_step})

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Metrics of an evaluation, likewise."""
        self.state.log_history.append({**metrics, "step": self.state.global_step})
        self.fire("on_evaluate", metrics=metrics)
        score = metrics.get(str(self.args.metric_for_best_model))
        if score is not None and (self.state.best_metric is None or score > self.state.best_metric):
            self.state.best_metric, self.state.best_global_step = score, self.state.global_step
