"""TRL's side: its trainers as they are on one piece of work, timed. RLOO and GRPO of TRL 1.16, PPO of TRL 1.12."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from tests.benchmarks.job import serve
from tests.benchmarks.measure import Meter, Run, Stopwatch, held_mb, peak_mb, torch_phases, wrap
from tests.benchmarks.work import Work, prompt_texts, tokenizer_of


def run(work: Work, folder: Path, watch: Stopwatch | None = None) -> Run:
    """Warm-up and measured steps in this process."""
    classes = trainer_and_config(work.algorithm)
    import_mb = held_mb(work.device)
    meter = Meter(watch or Stopwatch(), work.generations)
    torch.manual_seed(work.seed)
    tokenizer = tokenizer_of(folder)
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token  # PPO takes every pad token for padding
    make = ppo if work.algorithm == "ppo" else compared
    with tempfile.TemporaryDirectory() as output, torch_phases(meter.watch):
        trainer = make(work, *classes, folder, tokenizer, output, meter)
        trainer.train()
        meter.lap()
    return Run(f"TRL {trl.__version__}", meter.laps, import_mb, peak_mb(work.device))


def trainer_and_config(algorithm: str) -> tuple[Any, Any]:
    """The two classes. TRL imports them only now: before memory is looked at."""
    if algorithm == "ppo":
        from trl.experimental.ppo import PPOConfig, PPOTrainer

        return PPOTrainer, PPOConfig
    return (trl.GRPOTrainer, trl.GRPOConfig) if algorithm == "grpo" else (trl.RLOOTrainer, trl.RLOOConfig)


def settings(work: Work, output: str) -> dict[str, Any]:
    """What all trainers are told. Gradients are accumulated over the micro-batches of a minibatch."""
    return dict(
        output_dir=output,
        per_device_train_batch_size=work.rows,
        gradient_accumulation_steps=work.samples // work.minibatches // work.rows,
        learning_rate=work.learning_rate,
        lr_scheduler_type="constant",
        temperature=1.0,
        seed=work.seed,
        use_cpu=work.device == "cpu",
        bf16=work.bf16,
        use_liger_kernel=work.liger,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        logging_steps=10**6,
        disable_tqdm=True,
    )


def between(meter: Meter) -> Callable[[], None]:
    """To be called when a step begins: that is the end of the one before."""
    begun: list[bool] = []

    def next_step() -> None:
        meter.lap() if begun else meter.begin()
        begun.append(True)

    return next_step


# ── RLOO, GRPO


def compared(
    work: Work, trainer_class: Any, config_class: Any, folder: Path, tokenizer: Any, output: str, meter: Meter
) -> Any:
    """RLOOTrainer or GRPOTrainer, its parts counted. GRPO has the loss of hfpg's preset: see docs/performance.md."""
    own = dict(loss_type="grpo", use_bias_correction_kl=False) if work.algorithm == "grpo" else {}
    shared = settings(work, output)
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(folder),
        reward_funcs=meter.even_share,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompt_texts(work, tokenizer)]),
        args=config_class(
            **shared,
            **own,
            num_generations=work.generations,
            steps_per_generation=shared["gradient_accumulation_steps"] * work.minibatches,
            num_iterations=work.epochs,
            max_steps=(work.steps + 1) * work.epochs * work.minibatches,
            max_completion_length=work.completion_length,
            top_k=0,
            top_p=1.0,
            beta=work.kl_coef,
        ),
    )
    count_compared(trainer, meter)
    return trainer


def count_compared(trainer: Any, meter: Meter) -> None:
    """Phases of the group trainers; a step begins where a batch is generated."""
    watch, next_step, collect = meter.watch, between(meter), trainer._generate_and_score_completions

    def collect_next(*args: Any, **kwargs: Any) -> Any:
        next_step()
        return collect(*args, **kwargs)

    trainer._generate_and_score_completions = collect_next
    wrap(trainer, "_generate_single_turn", watch, "generate")
    wrap(trainer, "_calculate_rewards", watch, "judge")
    wrap(trainer, "compute_loss", watch, "forward")
    wrap(trainer, "_get_per_token_logps_and_entropies", watch, lambda *_, **__: unless_training("score"))


def unless_training(phase: str) -> str | None:
    """The phase of a forward without gradient; with one, it is part of `compute_loss`."""
    return None if torch.is_grad_enabled() else phase


# ── PPO


def ppo(
    work: Work, trainer_class: Any, config_class: Any, folder: Path, tokenizer: Any, output: str, meter: Meter
) -> Any:
    """PPOTrainer of TRL 1.12, its parts counted. Its critic is a model of its own; its reward has to be a module."""
    judge = GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=64, n_layer=1, n_head=2, num_labels=1)
    judge.pad_token_id = tokenizer.pad_token_id
    texts = prompt_texts(work, tokenizer)
    data = Dataset.from_list([{"input_ids": tokenizer(text)["input_ids"]} for text in texts])
    reward = GPT2ForSequenceClassification(judge)
    trainer = trainer_class(
        args=config_class(
            **settings(work, output),
            num_mini_batches=work.minibatches,
            num_ppo_epochs=work.epochs,
            total_episodes=(work.steps + 1) * work.samples,
            response_length=work.completion_length,
            local_rollout_forward_batch_size=min(4 * work.rows, work.samples),  # more rows at once are faster
            stop_token="eos",
            num_sample_generations=0,
            kl_coef=work.kl_coef,
        ),
        processing_class=tokenizer,
        model=AutoModelForCausalLM.from_pretrained(folder),
        ref_model=AutoModelForCausalLM.from_pretrained(folder),
        value_model=AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1),
        reward_model=reward,
        train_dataset=data,
        eval_dataset=data.select(range(4)),
    )
    count_ppo(sys.modules[trainer_class.__module__], reward, tokenizer, meter)
    return trainer


def count_ppo(module: Any, reward: Any, tokenizer: Any, meter: Meter) -> None:
    """Phases of PPO: its trainer calls functions of its module."""
    watch, next_step, generate = meter.watch, between(meter), module.batch_generation

    def generate_next(policy: Any, queries: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        next_step()
        with watch.phase("generate"):
            out = generate(policy, queries, *args, **kwargs)
        responses = out[0][:, queries.shape[1] :]
        ended = (responses == tokenizer.eos_token_id).long().cumsum(1)
        chosen = (ended == 0) | ((ended == 1) & (responses == tokenizer.eos_token_id))
        meter.count(int((queries != tokenizer.pad_token_id).sum()), int(chosen.sum()))
        return out

    module.batch_generation = generate_next
    wrap(module, "forward", watch, lambda *_, **__: unless_training("score") or "forward")
    wrap(module, "get_reward", watch, lambda model, *_, **__: "judge" if model is reward else "score")
    wrap(module, "selective_log_softmax", watch, lambda *_, **__: unless_training("score"))


if __name__ == "__main__":
    serve(run)
