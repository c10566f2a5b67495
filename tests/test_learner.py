"""The gradient does not depend on how the work is cut: micro-batches, token budgets, processes."""

import copy
import dataclasses
import functools

import pytest
import torch
from accelerate import Accelerator

from hfpg.algorithms import GRPO, PPO
from hfpg.config import TrainConfig
from hfpg.fast.linear import own_products
from hfpg.learner import parameter_groups
from hfpg.micro_batches import balance, micro_batches, model_inputs
from hfpg.models import ActorCritic
from hfpg.ops.keyed import permutation
from hfpg.types import TokenLoss
from tests import build, tiny


def gradient_of(actor):
    return torch.cat([p.grad.flatten() for p in actor.parameters() if p.grad is not None])


def plain_backward(actor, rollout, credit):
    """One forward of everything, the definition of the mean, and autograd: no micro-batches, no coefficients."""
    scored = actor(rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids, rollout.completion_mask)
    loss = PPO().loss(scored, rollout, credit).loss
    (loss[rollout.completion_mask].sum() / rollout.completion_mask.sum()).backward()


@pytest.mark.parametrize("aggregation", ["sequence_sum", "token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_gradient_is_the_same_for_every_token_budget(aggregation, kind):
    start = ActorCritic(tiny.model(kind), "shared")
    samples = build.draw(start, count=16)
    assert len(set(samples.completion_mask.sum(1).tolist())) > 2 or kind != "gpt2", "ragged"
    algorithm, found = PPO(), {}
    for budget in (1, 40, 100, 100_000):
        by = build.learner(copy.deepcopy(start), max_tokens_per_micro_batch=budget)
        rollout, credit = build.rollout_of(samples, by)
        metrics, _ = by.gradient(rollout, credit, algorithm.loss, aggregation)
        found[budget] = (gradient_of(by.actor), metrics["loss"])
    whole, loss = found[100_000]
    for budget in (1, 40, 100):
        assert (found[budget][0] - whole).norm() / whole.norm() < 1e-6
        assert found[budget][1] == pytest.approx(loss, rel=1e-5)


def test_gradient_is_that_of_the_plain_padded_formula():
    actor = ActorCritic(tiny.model(), "shared")
    by = build.learner(actor, max_tokens_per_micro_batch=60)
    rollout, credit = build.rollout_of(build.draw(actor, count=16), by)
    by.gradient(rollout, credit, PPO().loss, "token_mean")
    ours = gradient_of(actor)
    actor.zero_grad()
    plain_backward(actor, rollout, credit)
    assert (gradient_of(actor) - ours).norm() / ours.norm() < 1e-6


def test_the_constant_of_an_aggregation_is_the_longest_completion_that_there_can_be():
    """And not the longest that there is: otherwise the step would depend on what was drawn."""
    actor = ActorCritic(tiny.model(), "shared")
    by = build.learner(actor, max_completion_length=48)
    rollout, credit = build.rollout_of(build.draw(actor, count=8), by)
    found = {}
    for aggregation in ("constant", "sequence_sum"):
        by.gradient(rollout, credit, PPO().loss, aggregation)
        found[aggregation] = gradient_of(actor)
        actor.zero_grad()
    torch.testing.assert_close(found["constant"] * 48, found["sequence_sum"], rtol=1e-4, atol=1e-6)


def test_rows_of_weight_zero_have_no_influence():
    actor = ActorCritic(tiny.model())
    by = build.learner(actor)
    rollout, credit = build.rollout_of(build.draw(actor, count=8), by)
    rollout.weights[5:] = 0
    loss = lambda new, rows, c: TokenLoss(-c.advantages * new.logprobs, {})  # noqa: E731
    by.gradient(rollout, credit, loss, "sequence_mean")
    weighted = gradient_of(actor)
    actor.zero_grad()
    keep = torch.arange(5)
    by.gradient(rollout.take(keep), credit.take(keep), loss, "sequence_mean")
    assert (gradient_of(actor) - weighted).norm() / weighted.norm() < 1e-6


def test_optimizer_steps_are_epochs_times_minibatches():
    by = build.learner(ActorCritic(tiny.model(), "shared"))
    rollout, credit = build.rollout_of(build.draw(by.actor, count=12), by)
    seen = []
    by.on_event = seen.append
    metrics = by.optimize(rollout, credit, PPO().loss, aggregation="token_mean", epochs=3, minibatches=4)
    assert metrics["optimizer_steps"] == 12 == seen.count("on_optimizer_step")
    assert metrics["kl_stops"] == metrics["skipped_steps"] == 0


def test_an_update_is_what_it_says_written_out():
    """Of two turns: in every epoch a new order, and for every minibatch an AdamW step on its own clipped gradient."""
    actor = ActorCritic(tiny.model(), "shared")
    settings = dict(seed=5, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-3, max_grad_norm=0.5)
    by = build.learner(copy.deepcopy(actor), **settings)
    rollout, credit = build.rollout_of(build.draw(actor), by)
    optimizer = torch.optim.AdamW(actor.parameters(), lr=1e-3, betas=(0.8, 0.9), eps=1e-3, weight_decay=0)
    for turn in range(2):
        by.optimize(rollout, credit, PPO().loss, aggregation="token_mean", epochs=2, minibatches=3)
        by.end_turn()
        for epoch in range(2):
            for rows in permutation(len(rollout), 5, "minibatch", turn, epoch).tensor_split(3):
                optimizer.zero_grad()
                plain_backward(actor, rollout.take(rows), credit.take(rows))
                torch.nn.utils.clip_grad_norm_(actor.parameters(), 0.5)
                optimizer.step()
    for mine, expected in zip(by.actor.parameters(), actor.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6)


def test_every_epoch_and_every_turn_deals_the_rows_anew():
    by = build.learner(ActorCritic(tiny.model()))
    rollout, credit = build.rollout_of(build.draw(by.actor), by)
    minibatches = [set()]
    by.on_event = lambda event: minibatches.append(set()) if event == "on_optimizer_step" else None

    def loss(new, rows, credit):
        minibatches[-1] |= set(rows.sample_ids.tolist())
        return TokenLoss(-credit.advantages * new.logprobs, {})

    for _ in range(2):
        by.optimize(rollout, credit, loss, aggregation="token_mean", epochs=2, minibatches=2)
        by.end_turn()
    assert all(minibatches[i] | minibatches[i + 1] == set(range(12)) for i in (0, 2, 4, 6))
    assert len({frozenset(rows) for rows in minibatches[:8]}) == 8


def counting_loss(new, rows, credit, *, calls):
    """A loss whose `number` and `kl_to_old` are 1 and 0.25 in the first minibatch, 2 and 0.5 in the second …"""
    calls.append(len(calls) + 1)
    number = torch.full_like(new.logprobs, calls[-1])
    return TokenLoss(-credit.advantages * new.logprobs, {"number": number, "kl_to_old": number / 4})


def test_metrics_are_means_over_the_minibatches_done():
    by = build.learner(ActorCritic(tiny.model()), max_grad_norm=1e-3)
    rollout, credit = build.rollout_of(build.draw(by.actor), by)
    norms, calls, clip = [], [], by.clip
    by.clip = lambda: norms.append(clip()) or norms[-1]
    loss = functools.partial(counting_loss, calls=calls)
    metrics = by.optimize(rollout, credit, loss, aggregation="token_mean", epochs=2, minibatches=3)
    assert calls == [1, 2, 3, 4, 5, 6] and metrics["number"] == pytest.approx(3.5)
    assert metrics["grad_norm"] == pytest.approx(sum(norms) / 6)


def test_the_first_minibatch_above_the_largest_kl_is_refused_and_counts_for_nothing():
    by = build.learner(ActorCritic(tiny.model()))
    rollout, credit = build.rollout_of(build.draw(by.actor), by)
    calls = []
    loss = functools.partial(counting_loss, calls=calls)
    metrics = by.optimize(rollout, credit, loss, aggregation="token_mean", epochs=9, max_kl=0.6)
    assert calls == [1, 2, 3] and metrics["optimizer_steps"] == 2 and metrics["kl_stops"] == 1
    assert metrics["kl_to_old"] == pytest.approx((0.25 + 0.5) / 2)


def test_the_first_log_ratio_is_that_of_the_first_minibatch_whatever_follows():
    by = build.learner(ActorCritic(tiny.model(), "shared"), learning_rate=0.05)
    rollout, credit = build.rollout_of(build.draw(by.actor), by)
    rollout.old_logprobs[0, 0] -= 0.25
    largest = []

    def loss(new, rows, credit):
        largest.append(float((new.logprobs - rows.old_logprobs).detach().abs().max()))
        return PPO().loss(new, rows, credit)

    metrics = by.optimize(rollout, credit, loss, aggregation="token_mean", epochs=4)
    assert metrics["first_log_ratio_max"] == pytest.approx(0.25, abs=1e-5) and max(largest) > 0.5


def test_a_kl_stop_ends_the_update_before_the_step_that_it_refuses():
    by = build.learner(ActorCritic(tiny.model(), "shared"), learning_rate=0.05)
    rollout, credit = build.rollout_of(build.draw(by.actor, count=12), by)
    metrics = by.optimize(rollout, credit, PPO().loss, aggregation="token_mean", epochs=8, max_kl=0.01)
    assert metrics["kl_stops"] == 1 and 1 <= metrics["optimizer_steps"] < 8


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_counted():
    by = build.learner(ActorCritic(tiny.model(), "shared"))
    rollout, credit = build.rollout_of(build.draw(by.actor, count=12), by)
    credit.advantages[3, 0] = float("nan")
    before = copy.deepcopy(by.actor.state_dict())
    metrics = by.optimize(rollout, credit, PPO().loss, aggregation="token_mean")
    assert metrics["skipped_steps"] == 1 and metrics["optimizer_steps"] == 0
    assert all(torch.equal(before[k], v) for k, v in by.actor.state_dict().items())


def test_clipping_limits_the_norm_and_reports_it_before():
    by = build.learner(ActorCritic(tiny.model(), "shared"), max_grad_norm=1e-3)
    rollout, credit = build.rollout_of(build.draw(by.actor, count=12), by)
    by.gradient(rollout, credit, PPO().loss, "token_mean")
    direction = gradient_of(by.actor)
    norm = by.clip()
    assert norm == pytest.approx(float(direction.norm()), rel=1e-5) and norm > 1e-3
    assert float(gradient_of(by.actor).norm()) == pytest.approx(1e-3, rel=1e-3)
    assert torch.nn.functional.cosine_similarity(direction, gradient_of(by.actor), dim=0) > 0.999999


def test_the_value_head_has_its_own_learning_rate_and_biases_no_decay():
    args = TrainConfig(learning_rate=1e-4, value_learning_rate=1e-2, weight_decay=0.1)
    actor = ActorCritic(tiny.model(), "shared")
    groups = parameter_groups(actor, args)
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert len(rates) == len(list(actor.parameters()))
    assert rates[id(actor.value.linear.weight)] == (1e-2, 0.0)
    assert rates[id(actor.policy.transformer.wte.weight)] == (1e-4, 0.1)
    assert rates[id(actor.policy.transformer.ln_f.bias)] == (1e-4, 0.0)


def test_schedule_counts_turns_of_the_page():
    by = build.learner(
        ActorCritic(tiny.model()), lr_scheduler_type="linear", warmup_steps=2, max_steps=10, learning_rate=1.0
    )
    rates = []
    for _ in range(10):
        rates.append(by.learning_rate)
        by.end_turn()
    # the first turn learns already: warm-up goes 1/2, 1; then down to the last turn, which learns too
    assert rates == pytest.approx([1 / 2, 1] + [1 - i / 9 for i in range(1, 9)])
    by.start_schedule(turn=1)
    assert by.turn == 1 and by.learning_rate == pytest.approx(1), "and back again"


def test_a_minibatch_that_nobody_scored_moves_nothing():
    """Without a gradient Adam's momentum would still step."""
    by = build.learner(ActorCritic(tiny.model(), "shared"))
    rollout, credit = build.rollout_of(build.draw(by.actor, count=6), by)
    by.optimize(rollout, credit, PPO().loss, aggregation="token_mean")
    before = copy.deepcopy(by.actor.state_dict())
    unscored = dataclasses.replace(rollout, weights=torch.zeros(6))
    metrics = by.optimize(unscored, credit, PPO().loss, aggregation="token_mean")
    assert metrics["skipped_steps"] == 1 and metrics["optimizer_steps"] == 0
    assert all(torch.equal(before[k], v) for k, v in by.actor.state_dict().items())


def test_bf16_scores_reference_and_policy_alike():
    """In autocast, too, KL at step 0 is exactly 0 and the first ratio 1."""
    Accelerator(cpu=True, mixed_precision="bf16")
    actor = ActorCritic(tiny.model(), "shared")
    by = build.learner(actor, reference=True)
    assert by.accelerator.mixed_precision == "bf16"
    rollout, credit = build.rollout_of(build.draw(actor), by)
    assert torch.equal(rollout.old_logprobs, rollout.ref_logprobs)
    exact = actor.float()
    assert rollout.old_logprobs.dtype == torch.float32 and exact is actor
    metrics = by.optimize(rollout, credit, PPO().loss, aggregation="token_mean")
    assert metrics["first_log_ratio_max"] < 0.05 and metrics["optimizer_steps"] == 1


def head_in_single(actor: ActorCritic, rollout) -> torch.Tensor:
    """log π of the chosen tokens: a trunk in bfloat16, and a head in single precision."""
    layout = actor.layout(rollout.prompt_ids, rollout.prompt_mask, rollout.completion_ids, rollout.completion_mask)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = actor._trunk(actor.policy.base_model, layout, None)[layout.source]
    logits = torch.nn.functional.linear(hidden.float(), actor.policy.get_output_embeddings().weight)
    tokens = rollout.completion_ids[rollout.completion_mask]
    return logits.log_softmax(1).gather(1, tokens[:, None])[:, 0]


@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_under_bf16_the_head_is_in_single_precision(kind: str):
    """In scoring, in training with its gradient, and in sampling; Gemma-2 is scored through its own forward."""
    Accelerator(cpu=True, mixed_precision="bf16")
    by = build.learner(ActorCritic(tiny.model(kind), "shared"), reference=True)
    with by.accelerator.autocast():
        samples = build.draw(by.actor)
    rollout, credit = build.rollout_of(samples, by)
    if kind != "gemma2":  # its logits are capped after the head
        expected = head_in_single(by.actor, rollout)
        torch.testing.assert_close(rollout.old_logprobs[rollout.completion_mask], expected, atol=1e-5, rtol=0)
    heads = []
    head = by.actor.policy.get_output_embeddings()
    head.register_forward_hook(lambda module, args, out: heads.append(out.dtype))
    with by.accelerator.autocast():
        build.draw(by.actor)
    assert set(heads) == {torch.float32}
    metrics = by.optimize(rollout, credit, PPO().loss, aggregation="token_mean", with_kl=True)
    assert metrics["first_log_ratio_max"] < 1e-5 and set(heads) == {torch.float32}


def test_under_bf16_the_gradient_of_the_head_is_in_single_precision():
    Accelerator(cpu=True, mixed_precision="bf16")
    by = build.learner(ActorCritic(tiny.model("llama")))
    rollout, _ = build.rollout_of(build.draw(by.actor), by)
    head = by.actor.policy.get_output_embeddings()
    (expected,) = torch.autograd.grad(head_in_single(by.actor, rollout).sum(), head.weight)
    with own_products(by.actor, by.actor.policy):
        by.model(**model_inputs(rollout, 1.0)).logprobs.sum().backward()
    torch.testing.assert_close(head.weight.grad, expected, atol=1e-4 * float(expected.abs().max()), rtol=0)


def test_micro_batches_cover_every_row_within_the_budget():
    prompt, completion = torch.randint(1, 30, (50,)), torch.randint(0, 20, (50,))
    batches = micro_batches(prompt, completion, 200)
    assert sorted(torch.cat(batches).tolist()) == list(range(50))
    for rows in batches:
        assert len(rows) == 1 or (prompt[rows].max() + completion[rows].max()) * len(rows) <= 200
    assert len(micro_batches(prompt, completion, 1)) == 50


def test_balance_deals_every_row_once_and_evenly():
    lengths = torch.randint(1, 100, (40,))
    dealt = balance(lengths, 3)
    assert sorted(torch.cat(dealt).tolist()) == list(range(40))
    loads = [int(lengths[rows].sum()) for rows in dealt]
    assert max(loads) - min(loads) <= 100
    assert [len(rows) for rows in balance(torch.tensor([5]), 3)] == [1, 0, 0]


@pytest.mark.parametrize("kind", ["gpt2", "gemma2"])
def test_parts_that_are_computed_again_in_the_backward_pass_are_the_same(kind):
    """With a vocabulary above the sizes at which oneDNN and recomputation set in; tiny ones are below all of them."""
    model = tiny.model(kind, vocabulary=50_000)
    by = build.learner(ActorCritic(model), reference=True)
    rollout, credit = build.rollout_of(build.draw(by.actor, count=16, length=24, stop_token_ids=[]), by)
    algorithm = GRPO(kl_estimator="full")
    loss = functools.partial(algorithm.loss, state=algorithm.init())
    found = []
    for budget in (100_000, 60):
        by.args = dataclasses.replace(by.args, max_tokens_per_micro_batch=budget)
        by.actor.zero_grad()
        by.gradient(rollout, credit, loss, "token_mean", with_kl=True)
        found.append(gradient_of(by.actor))
    assert (found[0] - found[1]).norm() / found[1].norm() < 1e-4
