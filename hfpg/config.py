"""TrainConfig: what a run is, flat.

The algorithm owns the method (epochs, clip_range, kl_coef, …); TrainConfig owns the run. Both are one flat namespace
of flags. A field that exists in `transformers.TrainingArguments` has its name and meaning here, with one exception:
`*_steps` count turns of the training loop (collect, estimate, update), not optimizer steps.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers.utils import logging as hf_logging

# the rest of hfpg, and recipes, ask this module for them
from hfpg.fields import (  # noqa: F401
    ConfigError,
    check_choices,
    check_numbers,
    is_repo_id,
    nearest,
    refuse_unread,
    require,
    resumed_from,
)
from hfpg.flags import parse  # noqa: F401


class GuardStop(RuntimeError):
    """A guard has ended the run: what was trained is saved, and the message says what was seen and what to change."""


def field(default: Any, help: str, least: float | None = None) -> Any:  # `help`: argparse's and transformers' word
    """A dataclass field with its help text. `parse` refuses a number below `least`."""
    metadata = {"help": help} if least is None else {"help": help, "least": least}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: default.copy(), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(kw_only=True)
class TrainConfig:
    """Settings of a run. Batch sizes are global: they do not depend on the number of processes."""

    # where
    output_dir: str | None = field(None, "Folder of the run. Default: the next free runs/ALGORITHM-MODEL folder.")
    overwrite_output_dir: bool = field(
        False, "Start again in a folder that holds a run: its checkpoints and records go."
    )
    resume_from_checkpoint: str | None = field(
        None, "'True': the newest checkpoint of output_dir; or the path of a checkpoint folder."
    )
    run_name: str | None = field(None, "Name shown by trackers. Default: the name of output_dir.")

    # what is sampled
    seed: int = field(42, "Every random number is a function of this seed, a purpose and counters.")
    max_steps: int = field(100, "Turns of the loop: collect, rescore, estimate, update.")
    prompts_per_step: int = field(
        64, "Prompts of one step, over all processes; each is sampled num_generations times."
    )
    max_completion_length: int = field(48, "Longest completion, in tokens.")
    temperature: float = field(1.0, "Sampling temperature; every policy is scored at this temperature.")
    top_k: int = field(0, "Sample among the k likeliest tokens; 0: all. Policies are renormalised over the kept set.")
    top_p: float = field(1.0, "Sample in the likeliest set of mass p; 1: all. Policies are renormalised over it.")
    stop_token_ids: list[int] | None = field(None, "Tokens that end a completion. Default: those of the model.")
    stop_strings: list[str] | None = field(None, "Strings that end a completion, beside the stop tokens.")
    generation_kwargs: dict | None = field(
        None, "More options of `generate` as JSON; those that change the distribution are refused by name."
    )

    # data
    prompt_column: str = field("prompt", "Column of the data set that holds the prompt, text or conversation.")
    chat_template: str | None = field(None, "File with a Jinja chat template, for tokenizers that have none.")
    overlong_prompts: Literal["raise", "truncate", "drop"] = field(
        "raise", "Prompts longer than the context allows: raise, truncate (keep the end), or drop."
    )
    reward_weights: list[float] | None = field(None, "One weight per reward function. Default: 1 each.")
    reward_on_error: Literal["raise", "drop"] = field(
        "raise", "An exception, NaN, inf or wrong count in a reward function: end the run, or drop the completions."
    )
    max_dropped: float = field(0.5, "Share of a step's completions that may be dropped; more ends the run, saved.")
    stop_constant: int = field(
        0, "End after so many steps in a row in which no reward function told two completions apart; 0: only say so."
    )
    step_marker: str | None = field(
        None, "Text that ends a step of a completion, for reward functions that score steps; such as a line break."
    )
    judge_chunks: int = field(
        1, "Parts of a step's prompts: one is judged while the next is sampled. More than 1 is for slow judges."
    )

    # optimisation
    learning_rate: float = field(1e-5, "Peak learning rate of the policy (AdamW).")
    value_learning_rate: float | None = field(None, "Learning rate of the value head. Default: learning_rate.")
    lr_scheduler_type: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = field("linear", "Schedule of transformers, over max_steps.")
    warmup_steps: int = field(0, "Steps of linear warm-up.")
    weight_decay: float = field(0.0, "AdamW weight decay, on matrices only.")
    adam_beta1: float = field(0.9, "AdamW β₁.")
    adam_beta2: float = field(0.999, "AdamW β₂.")
    adam_epsilon: float = field(1e-8, "AdamW ε. 1e-5 softens the first steps.")
    max_grad_norm: float = field(1.0, "Gradient is scaled down to this global L2 norm; watch `grad_norm`.")
    max_tokens_per_micro_batch: int = field(
        8192, "Memory knob: tokens of one forward and backward pass on one process. Does not change the gradient."
    )
    trainable_layers: int | None = field(
        None, "Train the top so many layers only; what those below say is computed once a rollout. Default: all."
    )
    trust_sampler: bool = field(
        True, "Old log-probs are those of sampling, where the first step shows that scoring gives the same (fp32)."
    )
    use_liger_kernel: bool = field(
        False, "Fused norms, rotary embeddings and MLPs of liger-kernel; on a GPU, for the models that it knows."
    )
    bf16: bool = field(False, "bfloat16 autocast (needs hardware that has it). Log-probs stay fp32.")
    use_cpu: bool = field(False, "Stay on the CPU even when there is an accelerator.")
    torch_threads: int | None = field(None, "CPU threads per process. Default: all cores, shared by the processes.")
    ddp_timeout: int = field(
        1800, "Seconds that a process waits for the others, as for one whose judge is slower, before the run ends."
    )

    # watching
    logging_steps: int = field(1, "Log every so many steps.")
    completions_steps: int = field(10, "Write and show completions every so many steps; 0: never.")
    num_completions_to_print: int = field(4, "Completions shown each time.")
    eval_steps: int = field(0, "Evaluate on eval_dataset every so many steps; 0: only when asked.")
    eval_on_start: bool = field(False, "Evaluate before the first step.")
    keep_best_by: str | None = field(
        None,
        "Metric of evaluations (see eval_steps), as eval_scores/judge_b; the best by it is kept in output_dir/best.",
    )
    stop_overoptimized: int = field(
        0, "End after so many evaluations in a row with eval_score above and keep_best_by below the best; 0: say so."
    )
    report_to: list[str] = field(["none"], "Accelerate trackers: tensorboard, wandb, trackio, … or none.")
    disable_tqdm: bool = field(False, "Plain lines instead of the live view.")

    # keeping
    save_steps: int = field(50, "Checkpoint every so many steps; 0: only at the end.")
    save_total_limit: int | None = field(None, "Keep at most so many checkpoints (the newest). Default: all.")
    push_to_hub: bool = field(False, "Push the tuned model to the Hub at the end (log in with `hf auth login`).")
    hub_model_id: str | None = field(None, "Repository to push to, as user/name.")
    hub_private_repo: bool | None = field(None, "Create the repository private.")
    hub_license: str | None = field(None, "License that the card names, as the Hub writes it: apache-2.0, mit, …")
    hub_dataset: str | None = field(None, "Data set of the Hub that the card names; default: the one of --dataset.")

    # the model
    model_revision: str = field("main", "Branch, tag or commit of the model on the Hub.")
    trust_remote_code: bool = field(False, "Run model code from the Hub repository. Never applies to judges.")

    def __post_init__(self) -> None:
        if isinstance(self.resume_from_checkpoint, bool | str):
            self.resume_from_checkpoint = resumed_from(self.resume_from_checkpoint)
        for f in dataclasses.fields(self):
            if isinstance(getattr(self, f.name), Path):
                setattr(self, f.name, str(getattr(self, f.name)))
        self.report_to = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        self.stop_strings = [self.stop_strings] if isinstance(self.stop_strings, str) else self.stop_strings
        check_choices(self)
        require(self.output_dir != "", "output_dir='' is no folder; name one, such as 'runs/mine', or leave it out")
        self._check_ranges()
        self._check_together()

    def _check_ranges(self) -> None:
        """Every number in its range, and finite: NaN and inf are in none, but for max_grad_norm=inf, no limit."""
        counts = ("max_steps", "prompts_per_step", "max_completion_length", "max_tokens_per_micro_batch")
        for name in (*counts, "judge_chunks", "logging_steps", "ddp_timeout"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        require(
            0 < self.temperature < math.inf,
            f"temperature={self.temperature}: a policy gradient needs a random policy; use a value above 0, like 1.0",
        )
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must be above 0 and at most 1 (1: no cut)")
        require(self.top_k >= 0, f"top_k={self.top_k} must be 0 (no cut) or more")
        require(
            0 <= self.max_dropped <= 1, f"max_dropped={self.max_dropped} must be a share between 0 and 1, such as 0.5"
        )
        require(self.step_marker != "", "step_marker='' marks nothing; use a text such as a line break")
        require(
            "" not in (self.stop_strings or []),
            f"stop_strings={self.stop_strings}: an empty text ends nothing; leave it out",
        )
        require(self.max_grad_norm > 0, f"max_grad_norm={self.max_grad_norm} must be above 0, such as 1.0")
        usual = {"learning_rate": 1e-5, "value_learning_rate": 1e-5, "weight_decay": 0.01, "adam_epsilon": 1e-8}
        for name, works in usual.items():
            value = getattr(self, name)
            finite = value is None or 0 <= value < math.inf
            require(finite, f"{name}={value} must be finite and not negative, such as {works}")
        require(
            all(map(math.isfinite, self.reward_weights or [])),
            f"reward_weights={self.reward_weights} must be finite, such as 1.0",
        )
        for name in ("adam_beta1", "adam_beta2"):
            require(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)} must be at least 0 and below 1")
        switches = ("eval_steps", "save_steps", "completions_steps", "warmup_steps", "stop_overoptimized")
        for name in (*switches, "stop_constant", "num_completions_to_print"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must be 0 (off) or more")
        for name, without in (("torch_threads", "to use all cores"), ("save_total_limit", "to keep all")):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}={value} must be at least 1, or absent {without}")

    def _check_together(self) -> None:
        """Settings that need each other."""
        require(
            self.stop_overoptimized == 0 or self.keep_best_by is not None,
            f"stop_overoptimized={self.stop_overoptimized} compares eval_score with another metric; name it with "
            "keep_best_by, such as 'eval_scores/judge_b'",
        )
        require(
            self.keep_best_by is None or 0 < self.eval_steps <= self.max_steps,
            f"keep_best_by={self.keep_best_by!r} keeps the best of the evaluations during training, and eval_steps="
            f"{self.eval_steps} schedules none in max_steps={self.max_steps}; set eval_steps, such as "
            f"{max(1, self.max_steps // 10)}",
        )
        require(
            not self.push_to_hub or self.hub_model_id is not None,
            "push_to_hub=True needs hub_model_id, such as 'me/gpt2-positive'",
        )
        require(  # the Hub would refuse the card, and with it the push
            self.hub_license is None or bool(re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", self.hub_license)),
            f"hub_license={self.hub_license!r} is no identifier of a license; write it as the Hub does: 'apache-2.0'",
        )
        require(
            self.hub_dataset is None or is_repo_id(self.hub_dataset),
            f"hub_dataset={self.hub_dataset!r} is no name of a data set of the Hub, such as 'stanfordnlp/imdb'",
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for run.json."""
        return dataclasses.asdict(self)


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """For scripts: a ConfigError ends the program with its sentence and exit status 2, a GuardStop with 3.

    Ctrl-C ends it with 130: a run has said where it is saved, and a traceback would push that out of sight.
    """
    try:
        yield
    except (ConfigError, GuardStop) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2 if isinstance(error, ConfigError) else 3)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


@contextlib.contextmanager
def no_progress_bar() -> Iterator[None]:
    """transformers draws a bar for every file that it reads or writes; in the middle of a live view that is a mess."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


SECRET = re.compile(r"hf_(?:[a-z]+_)?[A-Za-z0-9]{20,}")
"""An access token of the Hub: it must stand in no file that hfpg writes or pushes."""
