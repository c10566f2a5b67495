"""TrainConfig: what a run is, flat; and `parse`, which reads YAML first and then flags that win.

The algorithm owns the method (epochs, clip_range, kl_coef, …); TrainConfig owns the run. Both are one flat namespace
of flags. A field that exists in `transformers.TrainingArguments` has its name and meaning here, with one exception:
`*_steps` count turns of the training loop (collect, estimate, update), not optimizer steps.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from transformers import HfArgumentParser
from transformers.utils import logging as hf_logging

# the rest of hfpg asks this module for them
from hfpg.fields import ConfigError, check_choices, check_numbers, nearest, refuse_unread, require  # noqa: F401


class GuardStop(RuntimeError):
    """A guard has ended the run: what was trained is saved, and the message says what was seen and what to change."""


def field(default: Any, help: str) -> Any:  # `help` is the word that argparse and transformers use
    """A dataclass field with its help text."""
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: default.copy(), metadata={"help": help})
    return dataclasses.field(default=default, metadata={"help": help})


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

    # the model
    model_revision: str = field("main", "Branch, tag or commit of the model on the Hub.")
    trust_remote_code: bool = field(False, "Run model code from the Hub repository. Never applies to judges.")

    def __post_init__(self) -> None:
        if self.resume_from_checkpoint in (False, "False", "false", ""):
            self.resume_from_checkpoint = None
        if self.resume_from_checkpoint is True:
            self.resume_from_checkpoint = "True"
        for f in dataclasses.fields(self):
            if isinstance(getattr(self, f.name), Path):
                setattr(self, f.name, str(getattr(self, f.name)))
        self.report_to = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        self.stop_strings = [self.stop_strings] if isinstance(self.stop_strings, str) else self.stop_strings
        check_choices(self)
        self._check_ranges()
        self._check_together()

    def _check_ranges(self) -> None:
        """Every number in its range, and finite: NaN and inf are in none, but for max_grad_norm=inf, no limit."""
        counts = ("max_steps", "prompts_per_step", "max_completion_length", "max_tokens_per_micro_batch")
        for name in (*counts, "judge_chunks", "logging_steps"):
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

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, for run.json."""
        return dataclasses.asdict(self)


class YamlValue(NamedTuple):
    """What stands behind a key: the value, the same with every scalar as it is written, and the line of the key."""

    value: Any
    texts: Any
    line: int


def read_yaml(path: str | Path) -> dict[str, YamlValue]:
    """Top-level keys of a YAML mapping with their values.

    Raises ConfigError with file and line for a file that is no mapping, cannot be parsed, or names a key twice.
    """
    found: dict[str, YamlValue] = {}
    line = 1
    try:
        text = Path(path).read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise ConfigError(f"{path}:1: expected lines of the form `key: value`, found {text.strip()[:40]!r}")
        loader = yaml.SafeLoader("")
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            require(isinstance(key_node, yaml.ScalarNode), f"{path}:{line}: a key must be a name")
            require(key_node.value not in found, f"{path}:{line}: key {key_node.value!r} stands twice; keep one")
            texts = yaml.BaseLoader("").construct_object(value_node, deep=True)
            found[key_node.value] = YamlValue(loader.construct_object(value_node, deep=True), texts, line)
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else line
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except ConfigError:
        raise
    except (yaml.YAMLError, ValueError) as error:  # control characters, bytes that are no UTF-8, impossible dates
        raise ConfigError(f"{path}:{line}: not valid YAML: {str(error).splitlines()[0]}") from None
    return found


def json_mapping(text: str) -> dict:
    """A JSON object, such as '{"use_cache": true}'."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(
            f"expected a JSON object such as '{{\"use_cache\": true}}', found {text[:40]!r}"
        )
    return value


class PlainParser(argparse.ArgumentParser):
    """An argparse parser whose errors are ConfigErrors: the caller decides how to end."""

    def error(self, message: str) -> Any:
        raise ConfigError(message)


def peek(argv: Sequence[str], *names: str) -> argparse.Namespace:
    """The values of a few flags, None where absent, before the other flags are known."""
    before = PlainParser(add_help=False, allow_abbrev=False)
    for name in names:
        before.add_argument(f"--{name}")
    return before.parse_known_args(argv)[0]


def parse(
    classes: Sequence[type],
    argv: Sequence[str] | None = None,
    description: str | None = None,
    defaults: Callable[[Any], dict[str, Any]] | None = None,
    elsewhere: Mapping[str, str] | None = None,
    prog: str | None = None,
) -> tuple[Any, ...]:
    """One instance of each dataclass from `--config FILE.yaml` and flags; flags win over the file.

    Args:
        classes: dataclasses with disjoint field names, such as `(ScriptArguments, PPO, TrainConfig)`.
        argv: command-line words; default: those of this process.
        description: the first lines of `--help`.
        defaults: given the first class's instance, values that file and flags win over: a recipe's own defaults.
        elsewhere: what to say of a name that is known, but not here.
        prog: the command, as `--help` says it.
    Raises:
        ConfigError: a name that two classes share, an unknown key or flag (all of them at once, each with the
            nearest known name), a value of the wrong type.
    """
    owner: dict[str, type] = {}
    for cls in classes:
        for f in dataclasses.fields(cls):
            require(f.name not in owner, f"field {f.name!r} stands in {owner.get(f.name)} and in {cls}")
            owner[f.name] = cls
    argv = list(sys.argv[1:] if argv is None else argv)
    path = peek(argv, "config").config
    values: dict[str, tuple[Any, Any, str]] = {}
    told = elsewhere or {}
    if path is not None:
        found = read_yaml(path)
        unknown = [
            f"{path}:{it.line}: unknown key {name!r}{told.get(name) or nearest(name, list(owner))}"
            for name, it in found.items()
            if name not in owner
        ]
        require(not unknown, "\n".join(unknown))
        values = {name: (it.value, it.texts, f"{path}:{it.line}") for name, it in found.items()}
    silent = argv if defaults is None else [word for word in argv if word not in ("-h", "--help")]  # knows no defaults
    made = _build(classes, values, silent, description, told, prog)
    if defaults is not None:
        own = {name: (value, value, "defaults") for name, value in defaults(made[0]).items()}
        made = _build(classes, own | values, argv, description, told, prog)
    return made


def _build(
    classes: Sequence[type],
    values: dict[str, tuple[Any, Any, str]],
    argv: Sequence[str],
    description: str | None,
    elsewhere: Mapping[str, str],
    prog: str | None,
) -> tuple[Any, ...]:
    """Instances from values (each with its text and the place it stands at) and from flags, which win."""
    how: Any = dict(prog=prog, usage="%(prog)s [--config FILE.yaml] [--FIELD VALUE …]", formatter_class=_Help)
    parser = _Parser(classes, description=description, allow_abbrev=False, **how)
    parser.add_argument("--config", default=None, help="YAML file with any of these fields; flags win over it.")
    namespace = argparse.Namespace()
    for action in parser._actions:
        if action.dest in values and action.nargs != 0:  # not --no_X, which has the name of --X and no value
            value = _convert(action, *values[action.dest])
            setattr(namespace, action.dest, value)
            action.default = value  # `--help` tells what the run would use
            action.required = False
    namespace, rest = parser.parse_known_args(argv, namespace)
    known = [f"--{f.name}" for cls in classes for f in dataclasses.fields(cls)]
    flags = {word: word.split("=")[0] for word in rest if word.startswith("--")} or {word: word for word in rest}
    told = {
        word: elsewhere.get(name.removeprefix("--").replace("-", "_")) or nearest(name, known)
        for word, name in flags.items()
    }
    require(not rest, "\n".join(f"unknown flag {word!r}{what}" for word, what in told.items()))
    return tuple(
        cls(**{f.name: getattr(namespace, f.name) for f in dataclasses.fields(cls) if f.init}) for cls in classes
    )


def _convert(action: argparse.Action, value: Any, texts: Any, where: str) -> Any:
    """A YAML value by the type that the flag has: one type check for both."""
    if value is None:
        require(action.default is None, f"{where}: {action.dest} must have a value; the default is {action.default!r}")
        return None
    if action.nargs in ("+", "*"):
        items = zip(value, texts, strict=True) if isinstance(value, list) else [(value, texts)]
        return [_convert_one(action, item, text, where) for item, text in items]
    return _convert_one(action, value, texts, where)


def _convert_one(action: argparse.Action, value: Any, text: Any, where: str) -> Any:
    kind: Any = action.type or str
    if kind is json_mapping and isinstance(value, dict):
        return value
    try:
        require(not isinstance(value, list | dict), f"{where}: {action.dest}: expected one value, found {value!r:.60}")
        converted = kind(str(text if kind is str else value))  # a version 1.10 is no number, and No is a word
    except (ValueError, argparse.ArgumentTypeError) as error:
        if isinstance(error, ConfigError):
            raise
        if isinstance(error, argparse.ArgumentTypeError):
            raise ConfigError(f"{where}: {action.dest}: {error}") from None
        name = getattr(kind, "__name__", str(kind))
        raise ConfigError(f"{where}: {action.dest}: invalid {name} value: {value!r:.60}") from None
    require(
        action.choices is None or converted in action.choices,
        f"{where}: {action.dest}={value!r} is unknown; choose from {list(action.choices or [])}",
    )
    return converted


@contextlib.contextmanager
def one_sentence() -> Iterator[None]:
    """For scripts: a ConfigError ends the program with its sentence and exit status 2, a GuardStop with 3."""
    try:
        yield
    except (ConfigError, GuardStop) as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2 if isinstance(error, ConfigError) else 3)


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


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Every default, and the description with its lines as they are."""


class _Parser(HfArgumentParser):
    """HfArgumentParser whose errors are ConfigErrors (the caller decides how to end), and with dict fields as JSON."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        for action in self._actions:
            if action.type is dict:
                action.type = json_mapping
        self._negative_number_matcher = re.compile(r"-\d*\.?\d+(e[+-]?\d+)?$", re.I)  # argparse's knows no 1e-3

    def error(self, message: str) -> Any:
        raise ConfigError(message)
