"""hfpg's side: PolicyGradientTrainer on one piece of work, timed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import hfpg
from hfpg import PolicyGradientTrainer, TrainConfig
from hfpg.algorithms import GRPO, PPO, RLOO
from tests.benchmarks.job import serve
from tests.benchmarks.measure import Meter, Run, Stopwatch, held_mb, peak_mb, torch_phases
from tests.benchmarks.work import Work, prompt_texts, tokenizer_of


NAMES = {"sample": "generate", "rescore": "score", "update": "forward"}  # what is left of `update` inside


class Timed(PolicyGradientTrainer):
    """Calls `end_lap` where the loop would write a checkpoint. No side writes any."""

    def __init__(self, end_lap: Callable[[], None], **kwargs: Any):
        super().__init__(**kwargs)
        self.end_lap = end_lap

    def checkpoint_if_due(self) -> None:
        """A turn is done."""
        self.end_lap()


def algorithm(work: Work) -> Any:
    """The method with the settings that TRL's has.

    RLOO takes one step per rollout; where TRL's takes several, on clipped ratios, GRPO without spread has the same
    advantages and the same first step.
    """
    steps: dict[str, Any] = dict(epochs=work.epochs, minibatches=work.minibatches)
    shared: dict[str, Any] = dict(num_generations=work.generations, kl_coef=work.kl_coef)
    if work.algorithm == "ppo":
        return PPO(lam=0.95, value_clip_range=0.2, value=work.value, **steps, **shared)
    if work.algorithm == "grpo":
        return GRPO(**steps, **shared)
    if work.epochs == work.minibatches == 1:
        return RLOO(**shared)
    kl: dict[str, Any] = dict(kl_in="reward", kl_estimator="k1") if work.kl_coef else {}
    return GRPO(baseline="leave_one_out", scale="none", aggregation="sequence_sum", **kl, **steps, **shared)


def config(work: Work, output_dir: str) -> TrainConfig:
    """The run: no checkpoint, no completions shown."""
    part: dict[str, Any] = {} if work.trainable_layers is None else dict(trainable_layers=work.trainable_layers)
    return TrainConfig(
        output_dir=output_dir,
        max_steps=work.steps + 1,
        prompts_per_step=work.prompts_per_step,
        max_completion_length=work.completion_length,
        max_tokens_per_micro_batch=work.micro_positions,
        learning_rate=work.learning_rate,
        lr_scheduler_type="constant",
        seed=work.seed,
        torch_threads=work.threads,
        use_cpu=work.device == "cpu",
        bf16=work.bf16,
        use_liger_kernel=work.liger,
        generation_kwargs=None if work.recording else {"disable_compile": True},
        save_steps=0,
        completions_steps=0,
        disable_tqdm=True,
        **part,
    )


def run(work: Work, folder: Path, watch: Stopwatch | None = None, callbacks: Sequence[Any] = ()) -> Run:
    """Warm-up and measured steps in this process. The peak is read before `train` ends."""
    import_mb, peak = held_mb(work.device), [0.0]
    meter = Meter(watch or Stopwatch(), work.generations)

    def end_lap() -> None:
        meter.lap()
        peak[0] = peak_mb(work.device)

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), tokenizer_of(folder)
    onednn = torch.backends.mkldnn.flags(enabled=work.products == "onednn")
    with tempfile.TemporaryDirectory() as output, torch_phases(meter.watch), onednn:
        trainer = Timed(
            end_lap,
            model=model,
            processing_class=tokenizer,
            algorithm=algorithm(work),
            reward_funcs=meter.even_share,
            train_dataset=[{"prompt": text} for text in prompt_texts(work, tokenizer)],
            args=config(work, f"{output}/run"),
            callbacks=list(callbacks),
        )
        with clock_phases(trainer.clock, meter.watch):
            meter.begin()
            trainer.train()
    return Run(f"hfpg {hfpg.__version__}", meter.laps, import_mb, peak[0])


@contextmanager
def clock_phases(clock: Any, watch: Stopwatch) -> Iterator[None]:
    """What the trainer's clock counts, the stopwatch counts too."""
    plain = clock.phase

    @contextmanager
    def both(name: str) -> Iterator[None]:
        with plain(name), watch.phase(NAMES.get(name, name)):
            yield

    clock.phase = both
    yield
    clock.phase = plain


if __name__ == "__main__":
    serve(run)
