"""Methods side by side, each from a copy of one policy: the noise of its gradient, and the scores before and after."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hfpg.algorithms import Reinforce
from hfpg.config import TrainConfig, require
from hfpg.preflight import refuse_taken
from hfpg.trainer import PolicyGradientTrainer
from hfpg.types import Estimates, Rollout


@dataclass(frozen=True)
class Compared:
    """One method's run."""

    method: Any
    trainer: PolicyGradientTrainer
    noise: float  # tr Cov(g) / ‖E g‖² at the start
    norm: float  # ‖E g‖ there
    before: dict[str, float]  # `eval_*` metrics on the held-out prompts
    after: dict[str, float]

    def line(self, *metrics: str) -> str:
        """Under `heading`: the method, its noise and ‖E g‖, and metrics before → after."""
        changes = [f"{self.before[name]:.2f} → {self.after[name]:.2f}" for name in metrics]
        return _line(_name(self.method), f"{self.noise:.2f}", f"{self.norm:.2f}", *changes)

    def show(self, prompts: int = 5) -> None:
        """The same held-out prompts, before and after, in the terminal."""
        first, last = (evaluation["shown"][:prompts] for evaluation in self.trainer.evaluations)
        terminal = self.trainer.terminal
        terminal.console.quiet = not self.trainer.accelerator.is_main_process
        terminal.before_after([(*a, *b[1:]) for a, b in zip(first, last, strict=True)])


def heading(*metrics: str) -> str:
    """What stands over the lines."""
    return _line("method", "noise", "‖E g‖", *metrics)


def _line(method: str, noise: str, norm: str, *changes: str) -> str:
    return f"{method:<12}{noise:>7}{norm:>8}   {''.join(f'{text:<18}' for text in changes)}".rstrip()


def _name(method: Any) -> str:
    return str(method.baseline if type(method) is Reinforce else type(method).__name__)


def _folder(output_dir: str | None, number: int, method: Any) -> str:
    return f"{output_dir}/{number}-{_name(method)}"


def compare(
    model: Any,
    methods: Sequence[Any],
    reward_funcs: Any,
    train_dataset: Any,
    eval_dataset: Any,
    args: TrainConfig,
    processing_class: Any,
    repeats: int = 16,
) -> Iterator[Compared]:
    """Measure, evaluate, train and evaluate a copy of `model` with every method, one after the other.

    Args:
        model: a PreTrainedModel; it stays as it is.
        methods: of `hfpg.algorithms`. Each gets as many completions a step: args.prompts_per_step of them.
        args: of every run. Each has a folder of its own in output_dir; without one nothing is kept.
        repeats: rollouts that measure the noise (see `gradient_noise`).
    Raises:
        ConfigError: completions that cannot be dealt out in groups, or what the trainer refuses.
    """
    check_comparison(methods, args, repeats)
    rows = args.prompts_per_step
    with TemporaryDirectory() as folder:
        for number, method in enumerate(methods):
            name = _folder(args.output_dir or folder, number, method)
            own = replace(args, output_dir=name, prompts_per_step=rows // method.num_generations)
            trainer = PolicyGradientTrainer(
                deepcopy(model), method, reward_funcs, train_dataset, eval_dataset, own, processing_class
            )
            trainer.terminal.console.quiet = True  # whoever compares shows one table
            noise, norm = gradient_noise(trainer, repeats)
            before = trainer.evaluate()
            trainer.train()
            yield Compared(method, trainer, noise, norm, before, trainer.evaluate())


def gradient_noise(trainer: PolicyGradientTrainer, repeats: int, warm_up: int = 4) -> tuple[float, float]:
    """tr Cov(g) / ‖E g‖² and ‖E g‖, of one step's policy gradient g.

    ‖E g‖² is estimated by ‖mean g‖² − tr Cov(g) / repeats: the mean of a few is noisy itself, which makes it longer.
    Times the batch, the first number is the gradient noise scale of McCandlish et al. 2018 (arXiv 1812.06162). The
    gradient is that of `Learner.gradient`, which training uses; the value error has no part in it. The policy and the
    place in the data stay as they are; a running mean or a value function keeps what it has learnt.

    Args:
        trainer: made, and perhaps trained.
        repeats: rollouts that are measured; prompts and random numbers are new each time.
        warm_up: rollouts before them, from which a running mean or a value function learns.
    Raises:
        ConfigError: fewer than two repeats have no covariance.
    """
    check_repeats(repeats)
    run, state = trainer.run, trainer.state
    position, step, squares, total = run.position, state.global_step, 0.0, torch.zeros((), dtype=torch.float64)
    for number in range(warm_up + repeats):
        state.global_step = 10**6 + number  # the samples' keys follow from it: these are none of training's
        run.position = state.global_step * trainer.args.prompts_per_step
        rollout, credit = _credit(trainer)
        if number >= warm_up:
            g = _policy_gradient(trainer, rollout, credit)
            squares, total = squares + float(g.square().sum()), total + g
        elif trainer.algorithm.value:
            _fit_value(trainer, rollout, credit)
    run.position, state.global_step = position, step
    length = float((total / repeats).square().sum())  # ‖mean g‖²
    variance = (squares - repeats * length) / (repeats - 1)
    square = max(length - variance / repeats, 0.0)
    return (variance / square if square > 0 else math.inf), math.sqrt(square)


def check_comparison(methods: Sequence[Any], args: TrainConfig, repeats: int) -> None:
    """Raise ConfigError for what `compare` cannot do: a caller with work before it asks first."""
    check_repeats(repeats)
    rows = args.prompts_per_step
    for method in methods:
        require(
            rows % method.num_generations == 0,
            f"prompts_per_step={rows} completions are no whole groups of num_generations={method.num_generations}; "
            f"use a multiple of it, such as {max(1, rows // method.num_generations) * method.num_generations}",
        )
    for number, method in enumerate(methods if args.output_dir else ()):
        refuse_taken(args, _folder(args.output_dir, number, method))


def check_repeats(repeats: int) -> None:
    """Raise ConfigError for too few rollouts."""
    require(repeats >= 2, f"repeats={repeats} must be at least 2: one gradient has no covariance; 16 is usual")


def _credit(trainer: PolicyGradientTrainer) -> tuple[Rollout, Estimates]:
    """The next rollout and its credit; the method's running means go on."""
    method, longest = trainer.algorithm, trainer.args.max_completion_length
    rollout = trainer.rescore(*trainer.collect())
    rollout, rewards, now = method.rewards(rollout, trainer.algorithm_state, longest)
    credit, trainer.algorithm_state = method.estimate(rollout, rewards, now)
    return rollout, credit


def _policy_gradient(trainer: PolicyGradientTrainer, rollout: Rollout, credit: Estimates) -> Float[Tensor, " N"]:
    """The gradient of the policy's parameters that are trained, without the value error, in float64."""
    method, learner, now = trainer.algorithm, trainer.learner, trainer.algorithm_state
    alone = replace(method, value_coef=0.0) if method.value and hasattr(method, "value_coef") else method
    how = {name: on for name, on in method.schedule(now).items() if name in ("with_entropy", "with_kl")}
    learner.gradient(rollout, credit, partial(alone.loss, state=now), method.aggregation, **how)
    found = [p.grad.flatten().double() for p in learner.actor.policy.parameters() if p.grad is not None]
    learner.optimizer.zero_grad()
    return torch.cat(found)


def _fit_value(trainer: PolicyGradientTrainer, rollout: Rollout, credit: Estimates) -> None:
    method, learner = trainer.algorithm, trainer.learner
    loss = getattr(method, "value_loss", None) or partial(method.loss, state=trainer.algorithm_state)
    learner.optimize(rollout, credit, loss, aggregation=method.aggregation, epochs=8, train="value")
