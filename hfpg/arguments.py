"""What `PolicyGradientTrainer` is given: each argument is of its kind, or one sentence says what it must be."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from torch import nn
from transformers import TrainerCallback

from hfpg.algorithms import PRESETS
from hfpg.config import TrainConfig, require
from hfpg.generation.hf import check_options


VERBS = ("init", "rewards", "estimate", "update")
SETTINGS = ("num_generations", "kl_coef", "value")
"""What every method has, beside its verbs: see docs/extending.md."""


def check_arguments(
    algorithm: Any, args: Any, callbacks: Any = None, peft_config: Any = None, generator: Any = None
) -> TrainConfig:
    """The settings, those of TrainConfig() for None, when every argument can be what its name says.

    Raises:
        ConfigError: the value seen, and one that works.
    """
    args = TrainConfig() if args is None else args
    require(
        isinstance(args, TrainConfig),
        f"args is a {type(args).__name__}; give a hfpg.TrainConfig, such as TrainConfig(learning_rate=1e-5), whose "
        "fields have the names of transformers.TrainingArguments",
    )
    _check_algorithm(algorithm)
    check_options(args.generation_kwargs or {})
    require(
        callbacks is None or isinstance(callbacks, list | tuple),
        f"callbacks={callbacks!r:.60} is no list; give one, such as [EarlyStoppingCallback(3)]",
    )
    for one in callbacks or ():
        kind = one if isinstance(one, type) else type(one)
        require(
            issubclass(kind, TrainerCallback),
            f"callbacks has {one!r:.60}, which is no transformers.TrainerCallback; derive its class from that",
        )
    require(
        generator is None or callable(generator),
        f"generator={generator!r:.60} cannot be called; give a function of (policy, prompts) that returns Samples, "
        "or leave it out",
    )
    if peft_config is not None:
        from peft import PeftConfig

        require(
            isinstance(peft_config, PeftConfig),
            f"peft_config={peft_config!r:.60} is a {type(peft_config).__name__}; give a peft.LoraConfig, such as "
            "LoraConfig(r=4)",
        )
    return args


def _check_algorithm(algorithm: Any) -> None:
    """An instance of a dataclass with the verbs, not its name or class."""
    named = PRESETS.get(algorithm.lower(), PRESETS["ppo"]) if isinstance(algorithm, str) else algorithm
    name = named.__name__ if isinstance(named, type) else "PPO"
    verbs = all(hasattr(algorithm, verb) for verb in VERBS)
    require(
        dataclasses.is_dataclass(algorithm) and not isinstance(algorithm, type) and verbs,
        f"algorithm={algorithm!r:.60} is no instance of a method; give one, such as {name}() from hfpg.algorithms",
    )
    missing = [setting for setting in SETTINGS if not hasattr(algorithm, setting)]
    require(
        not missing,
        f"the algorithm {type(algorithm).__name__} has no {', '.join(missing)}; a method says how many completions "
        "each prompt gets (num_generations=1), how much KL costs (kl_coef=0.0) and what critic it has (value=None)",
    )
    shared = {f.name for f in dataclasses.fields(algorithm)} & {f.name for f in dataclasses.fields(TrainConfig)}
    require(  # one flat namespace of flags
        not shared, f"{type(algorithm).__name__} and TrainConfig both have the fields {sorted(shared)}; rename one"
    )


def named_or_made(model: Any, argument: str = "model", *, optional: bool = False) -> Any:
    """A model as the rest of hfpg takes it: a Hub id or folder as text, or a module with a `config`.

    Raises:
        ConfigError: neither.
    """
    if model is None and optional:
        return None
    if isinstance(model, os.PathLike):
        return os.fspath(model)
    made = isinstance(model, nn.Module) and hasattr(model, "config")
    require(
        made or (isinstance(model, str) and model != ""),
        f"{argument}={model!r:.60} is no model; give a Hub id such as 'gpt2', a folder, or a PreTrainedModel",
    )
    return model
