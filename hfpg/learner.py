"""The only place where parameters change: minibatches, micro-batches by token budget, clipping, the optimizer step.

Denominators are global by construction: the coefficients of a minibatch are made from all of its rows (every rank
holds them), and micro-batches and ranks only add up parts of one weighted sum. So the gradient does not depend on the
micro-batch size, on the token budget or on the number of processes.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from accelerate import Accelerator
from jaxtyping import Bool
from torch import Tensor
from transformers import get_scheduler

from hfpg.config import TrainConfig, require
from hfpg.fast.direct import adding_to, keeping_blocks
from hfpg.fast.linear import own_products
from hfpg.fast.packing import MORE, packed_batches, positions_of
from hfpg.micro_batches import R, balance, clip_columns, micro_batches, model_inputs, trim
from hfpg.models import ActorCritic, Reference
from hfpg.ops.keyed import permutation
from hfpg.ops.masked import Aggregation, extent, token_coefficients
from hfpg.pretrained import causal_lm
from hfpg.token_local import Slopes
from hfpg.types import Estimates, Rollout, Samples, Scored, TokenLoss


LossFunction = Callable[[Scored, Rollout, Estimates], TokenLoss]
Trained = Literal["all", "value"]


class OldScores(NamedTuple):
    """What the policy says of samples before the update: [B, C] each, `last_values` [B]; None where absent."""

    logprobs: Tensor
    entropy: Tensor
    ref_logprobs: Tensor | None
    values: Tensor | None
    last_values: Tensor | None
    prompt_states: Tensor | None = None  # [B, P, H], [B, C, H]: what the frozen layers say
    completion_states: Tensor | None = None


class Learner:
    """Scores completions with the policy, and trains it.

    Args:
        actor: the module to train; given to `accelerator.prepare` here.
        accelerator: processes, device and precision.
        args: the run's settings (learning rates, schedule, token budget, clipping).
        reference: the frozen policy, or None.
        on_event: called with the name of a callback event around every optimizer step.
    """

    def __init__(
        self,
        actor: ActorCritic,
        accelerator: Accelerator,
        args: TrainConfig,
        reference: Reference | None = None,
        on_event: Callable[[str], None] = lambda event: None,
    ):
        self.actor, self.accelerator, self.args, self.reference = actor, accelerator, args, reference
        self.on_event = on_event
        optimizer = torch.optim.AdamW(
            parameter_groups(actor, args),
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            fused=True,
        )
        self.model, self.optimizer = accelerator.prepare(actor, optimizer)
        self.fisher_trial: int | None = None  # what a trial said of second derivatives; see natural.py
        self.start_schedule(turn=0)

    # ── scoring

    @torch.no_grad()
    def score(self, samples: R, with_last_values: bool = False, given: OldScores | None = None) -> OldScores:
        """log π_old, entropy, log π_ref and V(s_t) of samples, each [B, C]; the latter two None where absent.

        `with_last_values`: also V after the last chosen token, [B]. The same forward that trains, so the ratio of the
        first minibatch is 1 up to rounding. `given`: what is known already (see `captured`) and is not computed again.
        """
        found = {} if given is None else {name: x for name, x in given._asdict().items() if x is not None}

        def put(name: str, rows: Tensor, values: Tensor) -> None:
            like: Tensor = samples.prompt_ids if name.startswith("prompt_") else samples.completion_ids
            size = (*like.shape[: values.dim()], *values.shape[2:])
            target = found.setdefault(name, values.new_zeros(size))
            if values.dim() == 1:
                target[rows] = values
            elif name.startswith("prompt_"):
                target[rows, -values.shape[1] :] = values
            else:
                target[rows, : values.shape[1]] = values

        # on a CPU those of training: oneDNN knows their shapes
        times = 1 if samples.completion_ids.device.type == "cpu" else 4
        for rows in self.micro_batches(samples, times * self.args.max_tokens_per_micro_batch):
            inputs = model_inputs(trim(samples.take(rows)), self.args.temperature)
            with self.accelerator.autocast(), own_products(self.actor, causal_lm(self.actor.policy)):
                said = self._said(inputs, with_last_values, given)
            for name, values in said.items():
                put(name, rows, values if name.endswith("_states") else at_least_single(values))
        return OldScores(**{name: found.get(name) for name in OldScores._fields})  # type: ignore[arg-type]

    def _said(self, inputs: dict[str, Any], with_last_values: bool, given: OldScores | None) -> dict[str, Tensor]:
        """What the forward passes of policy, value function and reference say that is not known yet."""
        said: dict[str, Tensor | None] = {}
        if self.actor.frozen_layers and inputs["prompt_states"] is None:
            inputs |= dict(zip(("prompt_states", "completion_states"), self.actor.states(**inputs), strict=True))
        if given is None:
            scored = self.actor(**inputs, with_entropy=True, with_last_values=with_last_values)
            said = {name: getattr(scored, name, None) for name in OldScores._fields}
        elif self.actor.value is not None and given.values is None:
            said["values"] = self.actor.values(**inputs)
        if self.reference is not None:
            said["ref_logprobs"] = self.reference.logprobs(**inputs)
        if self.actor.frozen_layers:
            said |= {name: inputs[name] for name in ("prompt_states", "completion_states")}
        return {name: values for name, values in said.items() if values is not None}

    def gap(self, samples: R) -> float:
        """Largest difference, over all ranks, between what the sampler captured and what the scoring forward says.

        Of log-probs, entropies and values, each in units of its largest or of 1: their rounding grows with their size.
        """
        given, scored, worst = captured(samples), self.score(samples), 0.0
        if given is None:
            worst = math.inf
        elif given.logprobs.numel():
            for a, b in zip(given, scored, strict=True):
                if a is not None and b is not None:
                    off = float((a - b).abs().max() / b.abs().max().clamp(min=1))
                    worst = max(worst, off if math.isfinite(off) else math.inf)  # max(0.0, nan) is 0.0
        gaps = torch.tensor([worst], device=self.accelerator.device)
        return float(self.accelerator.gather(gaps).max())

    # ── training

    def optimize(
        self,
        rollout: Rollout,
        estimates: Estimates,
        loss: LossFunction,
        *,
        aggregation: Aggregation,
        epochs: int = 1,
        minibatches: int = 1,
        max_kl: float | None = None,
        with_entropy: bool = False,
        with_kl: bool = False,
        train: Trained = "all",
        skip_zero: bool = False,
        token_local: bool = False,
    ) -> dict[str, float]:
        """`epochs` passes over the rollout in `minibatches` optimizer steps each.

        Rows are dealt to minibatches by a permutation that is a function of (seed, step, epoch). The update ends early
        when a minibatch's mean `kl_to_old` exceeds `max_kl` (that minibatch is not stepped on), or its gradient is not
        finite (skipped; parameters are left as they are). A minibatch without a row that counts is passed over; where
        none has one, the update is skipped. `train="value"` leaves the policy as it is. `with_kl`: the loss gets the
        exact KL to the reference. `skip_zero`: the loss is advantage times something, so rows whose advantages are all
        0 add exactly nothing and are left out, of the metrics too. `token_local`: a token's loss depends on its own
        scores alone, so that the LM head may make its gradient in the forward pass (ValueError where that is not so).
        Returns metrics averaged over the minibatches done.
        """
        totals: dict[str, float] = {}
        steps, ended = 0, ""
        first_error = 0.0
        for epoch in range(epochs):
            order = permutation(len(rollout), self.args.seed, "minibatch", self.turn, epoch)
            for rows in order.tensor_split(minibatches):
                rows = rows.sort().values  # one minibatch: the same micro-batches, thus shapes, in every epoch
                if not rollout.weights[rows].any():
                    continue  # nobody scored any of these: there is nothing to step on
                given = (rollout.take(rows), estimates.take(rows), loss, aggregation)
                metrics, largest = self.gradient(*given, with_entropy, with_kl, skip_zero, token_local)
                if train == "value":
                    self.forget_policy_gradient()
                first_error = first_error if steps else largest
                if max_kl is not None and metrics.get("kl_to_old", 0.0) > max_kl:
                    ended = "kl_stops"
                elif not math.isfinite(norm := self.clip()):
                    ended = "skipped_steps"
                else:
                    metrics["grad_norm"] = norm
                    self.step()
                    steps += 1
                    totals = {k: totals.get(k, 0.0) + v for k, v in metrics.items()}
                self.forget_gradient()
                if ended:
                    break
            if ended:
                break
        if not rollout.weights.any():
            ended = "skipped_steps"
        averaged = {k: v / max(steps, 1) for k, v in totals.items()}
        ends = {name: float(ended == name) for name in ("kl_stops", "skipped_steps")}
        return averaged | ends | {"optimizer_steps": float(steps), "first_log_ratio_max": first_error}

    def gradient(
        self,
        rollout: Rollout,
        estimates: Estimates,
        loss: LossFunction,
        aggregation: Aggregation,
        with_entropy: bool = False,
        with_kl: bool = False,
        skip_zero: bool = False,
        token_local: bool = False,
    ) -> tuple[dict[str, float], float]:
        """Accumulate the gradient of one minibatch (the same rows on every rank) in `.grad`, before clipping.

        Returns the loss and the loss function's per-token metrics as token means over the minibatch, and the largest
        |log π_new − log π_old|; the same on every rank.
        """
        world, longest = self.accelerator.num_processes, self.args.max_completion_length
        coefficients = token_coefficients(rollout.completion_mask, rollout.weights, aggregation, longest)
        counting = rollout.weights > 0
        if skip_zero:
            counting = counting & torch.where(rollout.completion_mask, estimates.advantages != 0, False).any(1)
        means = token_coefficients(rollout.completion_mask, rollout.weights * counting, "token_mean")
        batches = self.shares(rollout, counting)
        if not batches:  # every rank takes part in the reduction: a row that counts for nothing
            batches, coefficients, means = [torch.tensor([0])], coefficients * 0, means * 0
        sums: dict[str, Tensor] = {}
        largest = torch.zeros((), device=coefficients.device)
        for number, rows in enumerate(batches):
            last = number == len(batches) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                part = trim(rollout.take(rows))
                width = part.completion_ids.shape[1]
                credit = clip_columns(estimates.take(rows), width)
                inputs = model_inputs(part, self.args.temperature)
                reference = self.reference if with_kl else None
                slopes = Slopes(loss, part, credit, world * coefficients[rows, :width]) if token_local else None
                # around the backward pass too: it makes parts of the forward again, which has to be the same one
                with adding_to(*self._direct()), own_products(self.actor, causal_lm(self.actor.policy)):
                    new = self.model(**inputs, with_entropy=with_entropy, reference=reference, slopes=slopes)
                    token = loss(new, part, credit)
                    weighted = torch.where(part.completion_mask, token.loss, 0) * coefficients[rows, :width]
                    total = weighted.sum()
                    # a loss may leave an output out, but DDP waits for the gradient of every parameter
                    total = total + sum(0 * x.sum() for x in (new.logprobs, new.values) if x is not None)
                    self.accelerator.backward(total * world)  # DDP takes the mean over ranks; the sum is wanted
            if not last:
                self.on_event("on_substep_end")
            with torch.no_grad():
                change = torch.where(part.completion_mask, new.logprobs - part.old_logprobs, 0)
                largest = torch.maximum(largest, change.abs().max())
                found = {
                    k: (torch.where(part.completion_mask, v, 0) * means[rows, :width]).sum()
                    for k, v in token.metrics.items()
                }
                for name, value in (found | {"loss": total}).items():
                    sums[name] = sums.get(name, 0) + value.detach().double()
        names = sorted(sums)
        reduced = self.accelerator.reduce(torch.stack([sums[n] for n in names]), reduction="sum")
        return dict(zip(names, reduced.tolist(), strict=True)), float(self.accelerator.gather(largest[None]).max())

    def shares(self, rollout: Rollout, counts: Bool[Tensor, " B"] | None = None) -> list[Tensor]:
        """The rows that this rank trains, in micro-batches. Rows of weight 0 add exactly nothing and are left out."""
        counting = (rollout.weights > 0 if counts is None else counts).nonzero()[:, 0].cpu()
        dealt = balance(rollout.lengths[counting], self.accelerator.num_processes)
        mine = counting[dealt[self.accelerator.process_index]]
        return [mine[part] for part in self.micro_batches(rollout.take(mine), self.args.max_tokens_per_micro_batch)]

    def micro_batches(self, rows: R, max_tokens: int) -> list[Tensor]:
        """Parts of the rows whose forward pass has at most `max_tokens` positions (one row at least).

        Packed rows may have a tenth more, where they do not come out even.
        """
        lengths = rows.prompt_mask.sum(1), extent(rows.completion_mask)
        if self.actor.packs:
            found = packed_batches(*lengths, rows.group_ids, self.actor.hidden_size, max_tokens)
            return [part for batch in found for part in self._fitting(rows, batch, max_tokens)]
        return micro_batches(*lengths, max_tokens)

    def _fitting(self, rows: R, batch: Tensor, max_tokens: int) -> list[Tensor]:
        """The batch, halved until each part's layout has at most `max_tokens` positions and a tenth more.

        Rows are longer than was planned where prompts are empty.
        """
        part = trim(rows.take(batch))
        given = (part.prompt_ids, part.prompt_mask, part.completion_ids, part.completion_mask)
        if len(batch) == 1 or positions_of(*given, self.actor.hidden_size) <= MORE * max_tokens:
            return [batch]
        middle = len(batch) // 2
        halves = batch[:middle], batch[middle:]
        return [fits for half in halves for fits in self._fitting(rows, half, max_tokens)]

    def _direct(self) -> list[Tensor]:
        """Matrices whose gradient is added up in place: hooks, by which processes average theirs, would miss it."""
        return self.actor.large_matrices() if self.accelerator.num_processes == 1 else []

    def forget_gradient(self) -> None:
        """Drop what was accumulated; large blocks stay, as zeros."""
        with keeping_blocks(*self._direct()):
            self.optimizer.zero_grad(set_to_none=True)

    def forget_policy_gradient(self) -> None:
        """Drop what was accumulated for the policy: the next step trains the value function alone."""
        for name, parameter in self.actor.named_parameters():
            if not name.startswith("value."):
                parameter.grad = None

    def clip(self) -> float:
        """Scale the accumulated, reduced gradient down to `max_grad_norm`; returns the norm before."""
        return float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.args.max_grad_norm))

    def step(self) -> None:
        """One optimizer step with the gradient that has been accumulated."""
        self.on_event("on_pre_optimizer_step")
        self.optimizer.step()
        self.on_event("on_optimizer_step")

    def start_schedule(self, turn: int) -> None:
        """The learning rate of a turn of the page. Warm-up begins with a share of the rate, not with 0."""
        groups, first = self.optimizer.param_groups, int(self.args.warmup_steps > 0)
        for group in groups:
            group["lr"] = group.setdefault("initial_lr", group["lr"])
        self.scheduler = get_scheduler(
            self.args.lr_scheduler_type,
            self.optimizer.optimizer,
            num_warmup_steps=self.args.warmup_steps,
            num_training_steps=self.args.max_steps + first,
        )
        self.turn = -first
        while self.turn < turn:
            self.end_turn()

    def end_turn(self) -> None:
        """One turn of the page is done: the learning rate moves on."""
        self.turn += 1
        with warnings.catch_warnings():
            # torch warns when no optimizer step came before: a skipped update is no mistake of the schedule
            warnings.filterwarnings("ignore", message=".*lr_scheduler.step.*")
            self.scheduler.step()

    @property
    def learning_rate(self) -> float:
        """The policy's learning rate now."""
        return float(self.optimizer.param_groups[0]["lr"])

    # ── state, as plain tensors by parameter name

    def optimizer_state(self) -> dict[str, Tensor]:
        """AdamW's moments and step counts, `PARAMETER|KEY` → tensor, in their own dtype."""
        names = {id(p): n for n, p in self.actor.named_parameters()}
        return {
            f"{names[id(p)]}|{key}": value.detach().cpu().clone().contiguous()
            for p, state in self.optimizer.optimizer.state.items()
            for key, value in state.items()
        }

    def load_optimizer_state(self, tensors: dict[str, Tensor], turn: int) -> None:
        """Put back what `optimizer_state` gave, and the learning rate of turn `turn`."""
        parameters = dict(self.actor.named_parameters())
        unknown = sorted({n.rpartition("|")[0] for n in tensors} - set(parameters))
        require(not unknown, f"the checkpoint has optimizer state of unknown parameters, such as {unknown[:2]}")
        self.optimizer.optimizer.state.clear()
        for name, tensor in tensors.items():
            parameter, _, key = name.rpartition("|")
            target = parameters[parameter]
            value = tensor.to(target.device, copy=True)
            self.optimizer.optimizer.state[target][key] = value
        self.start_schedule(turn)


def parameter_groups(actor: ActorCritic, args: TrainConfig) -> list[dict[str, Any]]:
    """Policy matrices with weight decay, other policy parameters without, and the value head at its own rate."""
    named = [(n, p) for n, p in actor.named_parameters() if p.requires_grad]
    policy = [p for n, p in named if not n.startswith("value.")]
    value_rate = args.learning_rate if args.value_learning_rate is None else args.value_learning_rate
    groups = [
        {"params": [p for p in policy if p.dim() >= 2], "lr": args.learning_rate, "weight_decay": args.weight_decay},
        {"params": [p for p in policy if p.dim() < 2], "lr": args.learning_rate, "weight_decay": 0.0},
        {"params": [p for n, p in named if n.startswith("value.")], "lr": value_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def at_least_single(x: Tensor) -> Tensor:
    """In float32, or in its own dtype where that is more."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def captured(samples: Samples | Rollout) -> OldScores | None:
    """What the engine said of its own tokens while it drew them, where that is log μ and the entropy at least."""
    if samples.sampler_logprobs is None or samples.sampler_entropy is None:
        return None
    return OldScores(samples.sampler_logprobs, samples.sampler_entropy, None, samples.sampler_values, None)
