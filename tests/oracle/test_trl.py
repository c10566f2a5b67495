"""TRL's own code on the same numbers: its advantages, loss and gradient beside those of hfpg's algorithms.

TRL 1.16 makes advantages in `_generate_and_score_completions` and the loss in `_compute_loss`. Both run here as they
are, on a stand-in for `self`: what it would sample, score and forward are the tensors of one `Rollout`. hfpg's side is
the algorithm object itself: rewards, estimate, loss, and the aggregation that the learner uses.

Where the definitions agree, loss and gradient are equal to 1e-12. Where they do not, a formula turns one into the
other, so that a silent change on either side fails. The page for readers: docs/algorithms/trl.md.
`close` and `unlike` hold the assertions of most tests.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.rewards import get_soft_overlong_punishment

from hfpg.algorithms import CISPO, DAPO, GRPO, GSPO, RLOO, DrGRPO
from hfpg.config import ConfigError
from hfpg.ops.importance import off_policy_weights
from hfpg.ops.kl import k3
from hfpg.ops.masked import aggregate, masked_mean, row_mean, token_coefficients
from hfpg.ops.objectives import clip_fraction, clipped_surrogate
from hfpg.types import Rollout, Scored


K, LONGEST, EOS = 4, 9, 2  # samples per prompt; max_completion_length, wider than any completion here; the stop token


class Case(NamedTuple):
    """Sixteen completions of four prompts under four policies, float64; padding is noise, which may not matter."""

    rows: Rollout
    new: Tensor  # [B, C] log-probs of the policy that is optimised
    entropy: Tensor  # [B, C]


class Found(NamedTuple):
    """What one side makes of a case. TRL's advantages are one per row, spread here over its tokens."""

    advantages: Tensor
    loss: Tensor
    gradient: Tensor  # to the new log-probs
    entropy_gradient: Tensor
    metrics: dict[str, Any]


def case(on_policy: bool = False, **changes: Any) -> Case:
    """Ragged rows, one group of equal scores; `on_policy`: the old policy is the new one, all ratios are 1."""
    g = torch.Generator().manual_seed(3)
    lengths = torch.tensor([6, 1, 3, 5, 2, 4, 6, 3, 5, 2, 1, 4, 6, 2, 5, 3])

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(16, 6, generator=g, dtype=torch.float64)

    old, scores = -noise(1).abs() - 0.5, noise(2)[:, 0]
    scores[4:8] = 0.5
    new, ref, behaviour, entropy = old + noise(0.5), old + noise(0.4), old + noise(0.4), noise(1).abs()
    rows = Rollout(
        prompt_ids=torch.ones(16, 2, dtype=torch.long),
        prompt_mask=torch.ones(16, 2, dtype=torch.bool),
        completion_ids=torch.ones(16, 6, dtype=torch.long),
        completion_mask=torch.arange(6) < lengths[:, None],
        finished=torch.tensor([True, True, False, True] * 4),
        sample_ids=torch.arange(16),
        group_ids=torch.arange(16) // K,
        scores=scores,
        weights=torch.ones(16, dtype=torch.float64),
        old_logprobs=new if on_policy else old,
        entropy=entropy,
        ref_logprobs=ref,
        behaviour_logprobs=behaviour,
    )
    return Case(dataclasses.replace(rows, **changes), new, entropy)


# ── the two sides


def trl(world: Case, trainer: type = GRPOTrainer, **settings: Any) -> Found:
    """TRL's advantages, and its loss summed over the micro-batches of one optimizer step."""
    parts = settings.get("gradient_accumulation_steps", 1)
    config = {GRPOTrainer: GRPOConfig, RLOOTrainer: RLOOConfig}[trainer](
        output_dir="never-written",
        use_cpu=True,
        bf16=False,
        report_to="none",
        gradient_checkpointing=None,  # TRL's default is a deprecated name and warns
        per_device_train_batch_size=16 // parts,
        max_completion_length=LONGEST,
        **{"num_generations": K, "num_iterations": 2} | settings,  # more than 1: TRL scores the old policy
    )
    self = stand_in(world, config)
    new, entropy = world.new.clone().requires_grad_(), world.entropy.clone().requires_grad_()
    losses = []
    with float64():
        inputs = trainer._generate_and_score_completions(self, [{"prompt": "p"}] * 16)
        for rows in torch.arange(16).chunk(parts):
            part = {name: x[rows] if x.dim() else x for name, x in inputs.items()}
            losses.append(trainer._compute_loss(self, forward_of(new[rows], entropy[rows]), part))
    loss = torch.stack(losses).sum()
    gradients = torch.autograd.grad(loss, (new, entropy), allow_unused=True, materialize_grads=True)
    advantages = torch.where(world.rows.completion_mask, inputs["advantages"][:, None], 0)
    return Found(advantages, loss.detach(), *gradients, self._metrics["train"])


@contextmanager
def float64() -> Iterator[None]:
    """TRL's sampler log-probs, and K / (K − 1) in its standard deviation, are in the default dtype."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def stand_in(world: Case, config: Any) -> SimpleNamespace:
    """What the two methods read of `self`. A trainer copies most fields of its config under their names."""
    rows = world.rows
    ids = torch.where(rows.finished[:, None], EOS, rows.completion_ids)
    completions = [row[mask].tolist() for row, mask in zip(ids, rows.completion_mask, strict=True)]
    said = zip(rows.behaviour_logprobs, rows.completion_mask, strict=True)
    sampler = [row[mask].tolist() for row, mask in said] if getattr(config, "use_vllm", False) else None
    sampled: tuple = ([[1, 1]] * 16, completions, completions)
    if isinstance(config, GRPOConfig):
        sampled = (*sampled[:2], None, completions, sampler, {}, None, None)
    scores = torch.where(rows.weights > 0, rows.scores, torch.nan)
    own = dict(
        args=config,
        accelerator=SimpleNamespace(
            device=torch.device("cpu"),
            process_index=0,
            num_processes=1,
            gather=lambda x: x,
            reduce=lambda x, reduction: x,
            sync_gradients=True,
        ),
        model=forward_of(rows.old_logprobs, rows.entropy),
        ref_model=forward_of(rows.ref_logprobs, None),
        _generate=lambda prompts: sampled,
        _get_per_token_logps_and_entropies=lambda model, *_, **__: (model.logprobs, model.entropy, None),
        _calculate_rewards=lambda *_: scores[:, None],
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        reward_funcs=[None],
        reward_func_names=["judge"],
        reward_weights=torch.ones(1, dtype=torch.float64),
        epsilon_low=config.epsilon,
        epsilon_high=config.epsilon if config.epsilon_high is None else config.epsilon_high,
        current_gradient_accumulation_steps=config.gradient_accumulation_steps,
        _entropy_bonus_enabled=getattr(config, "entropy_coef", 0) != 0,
        aux_loss_enabled=False,
        environment_factories=None,
        environments=None,
        tools=None,
        pad_to_multiple_of=None,
        _tokenizer=SimpleNamespace(pad_token_id=0),
        eos_token_ids=[EOS],
        _metrics={"train": defaultdict(list)},
        _logs=defaultdict(list, rewards=defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
    )
    return SimpleNamespace(**vars(config) | own)


def forward_of(logprobs: Tensor | None, entropy: Tensor | None) -> SimpleNamespace:
    """A model whose forward pass says this."""
    return SimpleNamespace(training=True, is_gradient_checkpointing=False, logprobs=logprobs, entropy=entropy)


def hfpg(world: Case, algorithm: Any) -> Found:
    """The page with hfpg's algorithm: rewards, estimate, loss, and the learner's aggregation."""
    rows, rewards, state = algorithm.rewards(world.rows, algorithm.init(), LONGEST)
    credit, state = algorithm.estimate(rows, rewards, state)
    new, entropy = world.new.clone().requires_grad_(), world.entropy.clone().requires_grad_()
    out = algorithm.loss(Scored(new, entropy, None), rows, credit, state)
    loss = aggregate(out.loss, rows.completion_mask, rows.weights, algorithm.aggregation, LONGEST)
    gradients = torch.autograd.grad(loss, (new, entropy), allow_unused=True, materialize_grads=True)
    return Found(credit.advantages, loss.detach(), *gradients, out.metrics)


def close(found: Tensor, expected: Tensor) -> None:
    """Equal to 1e-12."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def unlike(found: Tensor, other: Tensor) -> None:
    """The difference that a formula explains is there to be explained."""
    assert (found - other).abs().max() > 1e-3


# ── GRPO: where the definitions agree

PLAIN = GRPO(kl_coef=0.0, aggregation="token_mean")  # TRL's default: loss_type='dapo', beta=0
K3 = dict(kl_coef=0.3, kl_in="loss", kl_estimator="k3")
PLAIN_K3 = dict(beta=0.3, use_bias_correction_kl=False)
GROUP_OF_4 = dict(num_generations=4, resample_rounds=0, soft_overlong=0)
VLLM = dict(use_vllm=True, vllm_importance_sampling_clip_max=1.2)

SAME: dict[str, tuple[dict[str, Any], Any]] = {
    "default": (dict(), PLAIN),
    "grpo": (dict(loss_type="grpo"), GRPO(kl_coef=0.0)),
    "bnpo": (dict(loss_type="bnpo", epsilon=0.1), GRPO(kl_coef=0.0, aggregation="token_mean", clip_range=0.1)),
    "dr_grpo": (dict(loss_type="dr_grpo", scale_rewards="none"), DrGRPO()),
    "clip_higher": (dict(epsilon_high=0.28), DAPO(**GROUP_OF_4)),
    "delta": (dict(epsilon_high=0.28, delta=1.5), DAPO(**GROUP_OF_4, dual_clip=1.5)),
    "delta_grpo": (dict(loss_type="grpo", delta=1.4), GRPO(kl_coef=0.0, dual_clip=1.4)),
    "gspo": (
        dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4, epsilon_high=4e-4),
        GSPO(),
    ),
    "gspo_dapo": (
        dict(importance_sampling_level="sequence", delta=1.3),
        GRPO(kl_coef=0.0, importance="sequence", aggregation="token_mean", dual_clip=1.3),
    ),
    "luspo": (
        dict(loss_type="luspo", importance_sampling_level="sequence"),
        GRPO(kl_coef=0.0, importance="sequence", aggregation="sequence_sum"),
    ),
    "luspo_token": (dict(loss_type="luspo"), GRPO(kl_coef=0.0, aggregation="sequence_sum")),
    "cispo": (dict(loss_type="cispo", epsilon_high=5.0), CISPO()),
    "cispo_cap": (dict(loss_type="cispo", epsilon_high=1.1), CISPO(is_cap=1.1)),
    "k3": (dict(loss_type="grpo", **PLAIN_K3), GRPO(**K3)),
    "k3_dr_grpo": (dict(loss_type="dr_grpo", **PLAIN_K3), GRPO(aggregation="constant", **K3)),
    "k3_gspo": (
        dict(loss_type="grpo", importance_sampling_level="sequence", **PLAIN_K3),
        GSPO(clip_range=0.2, clip_range_high=None, **K3),
    ),
    "k3_cispo": (dict(loss_type="cispo", epsilon_high=5.0, **PLAIN_K3), CISPO(**K3)),
    "scale_batch": (dict(scale_rewards="batch"), GRPO(kl_coef=0.0, aggregation="token_mean", scale="batch")),
    "scale_none": (dict(scale_rewards="none"), GRPO(kl_coef=0.0, aggregation="token_mean", scale="none")),
    "entropy": (dict(entropy_coef=0.2), GRPO(kl_coef=0.0, aggregation="token_mean", entropy_coef=0.2)),
    "vllm_token": (
        dict(**VLLM, vllm_importance_sampling_mode="token_truncate"),
        GRPO(kl_coef=0.0, aggregation="token_mean", off_policy="token", weight_cap=1.2),
    ),
    "vllm_sequence": (
        dict(**VLLM, vllm_importance_sampling_mode="sequence_truncate"),
        GRPO(kl_coef=0.0, aggregation="token_mean", off_policy="truncated", weight_cap=1.2),
    ),
}


@pytest.mark.parametrize("name", SAME)
def test_advantages_loss_and_gradient_are_those_of_trl(name: str):
    settings, algorithm = SAME[name]
    theirs, ours = trl(case(), **settings), hfpg(case(), algorithm)
    weights = 1.0
    if algorithm.off_policy != "none":  # TRL multiplies the loss by them, hfpg the advantages: the same, w ≥ 0
        rows = case().rows
        log_ratio = rows.old_logprobs - rows.behaviour_logprobs
        weights = off_policy_weights(log_ratio, rows.completion_mask, algorithm.off_policy, algorithm.weight_cap)
    close(ours.advantages, theirs.advantages * weights)
    close(ours.loss, theirs.loss)
    close(ours.gradient, theirs.gradient)
    close(ours.entropy_gradient, theirs.entropy_gradient)
    assert theirs.gradient.abs().max() > 1e-3 and not ours.gradient[~case().rows.completion_mask].any()


def test_no_two_rows_of_the_table_are_the_same_case():
    """Every setting changes what TRL computes: none of the rows above agrees because nothing happened."""
    theirs = [trl(case(), **settings) for settings, _ in SAME.values()]
    losses = torch.stack([found.loss for found in theirs])
    apart = (losses[:, None] - losses).abs() + torch.eye(len(losses))
    assert apart.min() > 1e-4, (apart == apart.min()).nonzero()


@pytest.mark.parametrize("name", ["default", "grpo", "dr_grpo", "gspo", "cispo", "k3", "entropy"])
def test_the_first_step_is_the_same_too(name: str):  # house: asserts inside what it calls
    """num_iterations=1: TRL scores no old policy and takes the new one for it; hfpg's old one equals the new one."""
    settings, algorithm = SAME[name]
    theirs, ours = trl(case(), num_iterations=1, **settings), hfpg(case(on_policy=True), algorithm)
    close(ours.loss, theirs.loss)
    close(ours.gradient, theirs.gradient)
    unlike(theirs.gradient, trl(case(), **settings).gradient)


@pytest.mark.parametrize("name", ["default", "clip_higher", "delta", "k3"])
def test_clip_fraction_and_kl_are_reported_alike(name: str):
    settings, algorithm = SAME[name]
    theirs, ours = trl(case(), **settings).metrics, hfpg(case(), algorithm).metrics
    rows = case().rows
    means = {name: masked_mean(x.detach(), rows.completion_mask, rows.weights) for name, x in ours.items()}
    assert 0.1 < means["clip_fraction"] < 0.9
    assert theirs["clip_ratio/region_mean"] == [pytest.approx(float(means["clip_fraction"]), abs=1e-6)]  # in float32
    if "beta" in settings:
        assert theirs["kl"] == [pytest.approx(float(means["kl_loss"]), abs=1e-12)]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_row_that_nobody_could_judge_counts_in_no_mean_and_has_no_advantage(scale: str):
    weights = torch.ones(16, dtype=torch.float64)
    weights[torch.tensor([2, 8, 9, 10])] = 0  # one of four, and three of four
    world = case(weights=weights)
    ours = hfpg(world, GRPO(kl_coef=0.0, scale=scale))
    close(ours.advantages, trl(world, scale_rewards=scale).advantages)
    assert not ours.advantages[[2, 8, 9, 10, 11]].any()  # row 11 has nothing left to compare with
    unlike(ours.advantages, hfpg(case(), GRPO(kl_coef=0.0, scale=scale)).advantages)


def test_the_soft_overlong_penalty_is_that_of_trls_reward_function():
    rows = case(scores=torch.zeros(16, dtype=torch.float64)).rows
    shaped, _, _ = DAPO(soft_overlong=0.8).rewards(rows, DAPO().init(), LONGEST)  # over the last 8 of 9 tokens
    ids = [row[mask].tolist() for row, mask in zip(rows.completion_ids, rows.completion_mask, strict=True)]
    theirs = get_soft_overlong_punishment(max_completion_len=LONGEST, soft_punish_cache=8)(ids)
    close(shaped.scores, torch.tensor(theirs, dtype=torch.float64))
    assert shaped.scores.unique().numel() == 6


def test_dapo_is_the_same_whatever_the_micro_batches():  # house: asserts inside what it calls
    """And so is hfpg always: denominators are those of the whole minibatch."""
    settings, algorithm = SAME["default"]
    close(hfpg(case(), algorithm).loss, trl(case(), gradient_accumulation_steps=4, **settings).loss)
    close(hfpg(case(), algorithm).gradient, trl(case(), gradient_accumulation_steps=4, **settings).gradient)


# ── GRPO: where they do not, and by how much


@pytest.mark.parametrize(
    ("loss_type", "aggregation"), [("grpo", "sequence_mean"), ("dapo", "token_mean"), ("dr_grpo", "constant")]
)
@pytest.mark.parametrize("on_policy", [False, True])
def test_trl_multiplies_k3_by_the_ratio(loss_type, aggregation, on_policy):  # house: asserts inside what it calls
    """TRL's default, use_bias_correction_kl: β ρ k3, whose gradient is β ρ δ; hfpg's k3 is plain, β (1 − e^−δ)."""
    world, beta = case(on_policy), 0.3
    theirs, ours = trl(world, loss_type=loss_type, beta=beta), hfpg(world, GRPO(aggregation=aggregation, **K3))
    rows = world.rows
    rho, delta = (world.new - rows.old_logprobs).exp(), world.new - rows.ref_logprobs
    c = token_coefficients(rows.completion_mask, rows.weights, aggregation, LONGEST)
    close(theirs.loss - ours.loss, beta * (c * (rho - 1) * k3(delta)).sum())  # 0 at ratio 1
    close(theirs.gradient - ours.gradient, beta * c * (rho * delta - (1 - (-delta).exp())))  # never 0
    unlike(theirs.gradient, ours.gradient)


def test_trls_kl_gradient_at_ratio_1_is_that_of_k2():  # house: asserts inside what it calls
    world = case(on_policy=True)
    k2 = hfpg(world, GRPO(kl_coef=0.3, kl_estimator="k2"))
    close(k2.gradient, trl(world, loss_type="grpo", beta=0.3).gradient)


@pytest.mark.parametrize(
    ("loss_type", "aggregation"), [("grpo", "sequence_mean"), ("dr_grpo", "constant"), ("luspo", "sequence_sum")]
)
def test_trls_entropy_bonus_is_a_token_mean_whatever_the_loss_type(loss_type, aggregation):  # house: close asserts
    """hfpg aggregates it as it does the loss, so that entropy_coef is a price per token of that loss."""
    world, coef = case(), 0.2
    theirs = trl(world, loss_type=loss_type, entropy_coef=coef)
    ours = hfpg(world, GRPO(kl_coef=0.0, aggregation=aggregation, entropy_coef=coef))
    mask, weights = world.rows.completion_mask, world.rows.weights
    mean = masked_mean(world.entropy, mask, weights)
    close(theirs.loss - ours.loss, coef * (aggregate(world.entropy, mask, weights, aggregation, LONGEST) - mean))
    close(theirs.gradient, ours.gradient)
    close(ours.entropy_gradient, -coef * token_coefficients(mask, weights, aggregation, LONGEST))
    close(theirs.entropy_gradient, -coef * token_coefficients(mask, weights, "token_mean"))
    unlike(theirs.entropy_gradient, ours.entropy_gradient)


@pytest.mark.parametrize(("loss_type", "aggregation"), [("grpo", "sequence_mean"), ("dapo", "token_mean")])
def test_trl_keeps_rows_without_a_score_in_the_denominator(loss_type, aggregation):  # house: close asserts
    """hfpg's row weight 0 takes them out of it: a step is not smaller because a judge was silent."""
    weights = torch.ones(16, dtype=torch.float64)
    weights[torch.tensor([0, 13])] = 0
    world = case(weights=weights)
    theirs, ours = trl(world, loss_type=loss_type), hfpg(world, GRPO(kl_coef=0.0, aggregation=aggregation))
    lengths = world.rows.completion_mask.sum(1)
    units = lengths if loss_type == "dapo" else torch.ones_like(lengths)
    kept = (weights * units).sum() / units.sum()
    close(theirs.loss, ours.loss * kept)
    close(theirs.gradient, ours.gradient * kept)
    unlike(theirs.gradient, ours.gradient)


def test_trl_keeps_groups_of_equal_scores_in_the_denominator():  # house: asserts inside what it calls
    """It has no dynamic sampling. hfpg's DAPO draws again for them, and leaves out those that stay equal."""
    theirs = trl(case(), epsilon_high=0.28)
    ours = hfpg(case(), DAPO(**GROUP_OF_4 | dict(resample_rounds=3)))
    tokens = case().rows.completion_mask.sum(1)
    kept = 1 - tokens[4:8].sum() / tokens.sum().double()
    close(theirs.loss, ours.loss * kept)
    close(theirs.gradient, ours.gradient * kept)
    unlike(theirs.gradient, ours.gradient)


def test_trl_compares_with_cut_completions_that_it_masks():  # house: asserts inside what it calls
    """mask_truncated_completions leaves their scores in the group's mean; truncation='mask' takes them out as well."""
    settings = dict(mask_truncated_completions=True, scale_rewards="none")
    ours = hfpg(case(), GRPO(kl_coef=0.0, aggregation="token_mean", scale="none", truncation="mask"))
    theirs = trl(case(), **settings)
    rows = case().rows
    groups, finished = rows.scores.view(-1, K), rows.finished.view(-1, K)
    shift = (groups * finished).sum(1) / finished.sum(1) - groups.mean(1)  # of the baseline
    counts = rows.completion_mask & rows.finished[:, None]
    close(theirs.advantages * counts, ours.advantages + shift.repeat_interleave(K)[:, None] * counts)
    unlike(theirs.advantages * counts, ours.advantages)
    # a judge that does not score cut completions makes both the same
    silent = trl(case(weights=rows.finished.double()), **settings)
    close(ours.loss, silent.loss)
    close(ours.gradient, silent.gradient)


def test_bnpo_depends_on_the_micro_batches():  # house: asserts inside what it calls
    """TRL's bnpo averages the token means of the micro-batches; hfpg's token_mean is TRL's dapo."""
    theirs, ours = trl(case(), loss_type="bnpo", gradient_accumulation_steps=2), hfpg(case(), PLAIN)
    mask, weights = case().rows.completion_mask, case().rows.weights
    whole = token_coefficients(mask, weights, "token_mean")
    halves = torch.cat(
        [token_coefficients(m, w, "token_mean") / 2 for m, w in zip(mask.chunk(2), weights.chunk(2), strict=True)]
    )
    close(theirs.gradient * whole, ours.gradient * halves)
    unlike(theirs.gradient, ours.gradient)


def test_cispo_with_trls_default_cap_is_a_fifth_of_a_policy_gradient():
    """TRL's cap is epsilon_high, absolute, and without it ε = 0.2: every weight is 0.2. hfpg refuses such a cap."""
    world = case(on_policy=True)
    close(trl(world, loss_type="cispo").gradient, 0.2 * hfpg(world, CISPO()).gradient)
    with pytest.raises(ConfigError, match=r"is_cap=0\.2 is the largest ratio"):
        CISPO(is_cap=0.2)


@pytest.mark.parametrize(("loss_type", "aggregation"), [("sapo", "sequence_mean"), ("vespo", "token_mean")])
def test_losses_without_a_counterpart_take_the_same_first_step(loss_type, aggregation):  # house: close asserts
    """SAPO's gate has slope 1 and VESPO's weight is 1 at ratio 1; after it hfpg has nothing like them."""
    algorithm = GRPO(kl_coef=0.0, aggregation=aggregation)
    first = case(on_policy=True)
    close(hfpg(first, algorithm).gradient, trl(first, loss_type=loss_type).gradient)
    unlike(hfpg(case(), algorithm).gradient, trl(case(), loss_type=loss_type).gradient)


# ── RLOO


@pytest.mark.parametrize(
    ("settings", "algorithm"),
    [
        (dict(), RLOO(kl_coef=0.0)),
        (dict(reward_clip_range=(-1.0, 1.0)), RLOO(kl_coef=0.0, reward_clip=1.0)),
    ],
    ids=["plain", "reward_clip"],
)
@pytest.mark.parametrize("silent", [[], [2, 8, 9]], ids=["all", "some"])
def test_rloo_advantages_and_first_gradient_are_those_of_trl(settings: dict[str, Any], algorithm: RLOO, silent: list):
    """The values differ, −mean A against −mean A Σ log π: only the gradient of a policy-gradient loss means something.

    TRL divides by all rows, hfpg by those that count; what hfpg's others have for an advantage does not matter.
    """
    weights = torch.ones(16, dtype=torch.float64)
    weights[silent] = 0
    world = case(on_policy=True, weights=weights)
    theirs, ours = trl(world, RLOOTrainer, beta=0.0, **settings), hfpg(world, algorithm)
    close(ours.advantages * weights[:, None], theirs.advantages)
    close(ours.gradient * weights.mean(), theirs.gradient)
    close(theirs.loss, -theirs.advantages[:, 0].mean())
    close(ours.loss, row_mean(-(theirs.advantages * world.new).sum(1), weights))
    assert theirs.gradient.abs().max() > 1e-3


def test_rloo_off_ratio_1_has_trls_clip_and_sequence_ratio_missing():
    """TRL: min(ρ A, clip(ρ) A) with the ratio of the whole sequence, a product. hfpg's RLOO has no ratio: one step."""
    world = case()
    theirs, ours = trl(world, RLOOTrainer, beta=0.0), hfpg(world, RLOO(kl_coef=0.0))
    mask, weights = world.rows.completion_mask, world.rows.weights
    log_ratio = world.new - world.rows.old_logprobs
    whole = torch.where(mask, log_ratio, 0).sum(1, keepdim=True)
    advantages = ours.advantages[:, :1]
    close(theirs.loss, row_mean(clipped_surrogate(whole, advantages, 0.2)[:, 0], weights))
    held = clip_fraction(whole, advantages, 0.2)
    assert 0 < held.mean() < 1
    close(theirs.gradient, ours.gradient * (1 - held) * off_policy_weights(log_ratio, mask, "sequence"))
    unlike(theirs.gradient, ours.gradient)


def test_rloo_credits_kl_to_go_and_trl_the_whole_of_it():  # house: asserts inside what it calls
    """Both compare returns after −β Σ k1. In hfpg a token does not answer for the KL of the tokens before it.

    The expected gradients are the same. On the first token so are the advantages; on the others they are
    β Σ_{s < t} k1_s apart.
    """
    beta = 0.3
    theirs, ours = trl(case(), RLOOTrainer, beta=beta), hfpg(case(), RLOO(kl_coef=beta))
    rows = case().rows
    k1 = torch.where(rows.completion_mask, rows.old_logprobs - rows.ref_logprobs, 0)
    before = torch.where(rows.completion_mask, k1.cumsum(1) - k1, 0)
    close(ours.advantages - theirs.advantages, beta * before)
    close(ours.advantages[:, 0], theirs.advantages[:, 0])
    unlike(ours.advantages, theirs.advantages)
    unlike(ours.advantages[:, 0], hfpg(case(), RLOO(kl_coef=0.0)).advantages[:, 0])


def test_grpo_without_its_own_mean_and_spread_has_all_of_trls_rloo_at_ratio_1():  # house: asserts inside what it calls
    """Its return is that of the whole completion, KL and all; it clips token ratios, TRL's RLOO the sequence's."""
    settings = dict(baseline="leave_one_out", scale="none", aggregation="sequence_sum")
    algorithm = GRPO(kl_coef=0.3, kl_in="reward", kl_estimator="k1", **settings)
    world = case(on_policy=True)
    theirs, ours = trl(world, RLOOTrainer, beta=0.3), hfpg(world, algorithm)
    close(ours.advantages, theirs.advantages)
    close(ours.gradient, theirs.gradient)
    unlike(hfpg(case(), algorithm).gradient, trl(case(), RLOOTrainer, beta=0.3).gradient)


def test_rloo_keeps_a_sample_that_is_alone_in_its_group():
    """Its others were not judged. TRL gives it no advantage; hfpg takes its return, with b = 0."""
    weights = torch.ones(16, dtype=torch.float64)
    weights[9:12] = 0
    world = case(weights=weights)
    theirs, ours = trl(world, RLOOTrainer, beta=0.0), hfpg(world, RLOO(kl_coef=0.0))
    assert not theirs.advantages[8].any()
    close(ours.advantages[8], torch.where(world.rows.completion_mask[8], world.rows.scores[8], 0))
    rest = [i for i in range(16) if i not in range(8, 12)]
    close(ours.advantages[rest], theirs.advantages[rest])
