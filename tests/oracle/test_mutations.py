"""The mutation gate: classic bugs are put into hfpg one by one, and the oracle has to notice each of them.

    pytest tests/oracle/test_mutations.py -s      prints the table: bug → the oracle tests that catch it

A bug is a patch of one function. Each runs only the tests that should catch it; one that still passes fails the gate.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hfpg.fast import head
from hfpg.learner import Learner
from hfpg.ops import baselines, masked, objectives, returns
from hfpg.ops.kl import k3
from tests.oracle import test_exact, test_groups, test_kl, test_trl


Check = Callable[[], None]


def unbiased(baseline: str = "none", kl_coef: float = 0.0, temperature: float = 1.0, kind: str = "gpt2") -> Check:
    """REINFORCE against autograd on J."""
    return functools.partial(test_exact.test_reinforce_is_unbiased, baseline, kl_coef, temperature, kind)


# ── the bugs


def stop_token_out_of_the_loss(patch: pytest.MonkeyPatch) -> None:
    """`ids != pad` as the mask, with pad = EOS."""
    from hfpg import learner

    def trim(rows: Any, plain: Any = learner.trim) -> Any:
        rows = plain(rows)
        return dataclasses.replace(rows, completion_mask=rows.completion_mask & (rows.completion_ids != 0))

    patch.setattr("hfpg.learner.trim", trim)


def value_after_the_token(patch: pytest.MonkeyPatch) -> None:
    """V(s_{t+1}) where V(s_t) belongs."""

    def gae(rewards: Any, values: Any, *rest: Any) -> Any:
        return returns.gae(rewards, torch.cat([values[:, 1:], values[:, -1:]], 1), *rest)

    patch.setattr("hfpg.algorithms.critic.gae", gae)


def no_temperature(patch: pytest.MonkeyPatch) -> None:
    """Scores at τ = 1 what was sampled at another temperature."""
    patch.setattr("hfpg.models.head_scores", lambda h, w, b, y, t, *rest: head.head_scores(h, w, b, y, 1.0, *rest))


def k3_with_the_wrong_sign(patch: pytest.MonkeyPatch) -> None:
    """e^{δ} − 1 − δ in place of e^{−δ} − 1 + δ."""
    patch.setattr("hfpg.algorithms.kl_control.k3", lambda log_ratio: k3(-log_ratio))


def another_epsilon_under_the_spread(patch: pytest.MonkeyPatch) -> None:
    """std + 1e-9, which rounding errors of equal rewards then pass for advantages."""
    patch.setattr("hfpg.algorithms.grpo.STD_EPSILON", 1e-9)


def weight_not_detached(patch: pytest.MonkeyPatch) -> None:
    """CISPO's weight is differentiated through."""

    def cispo(logprobs: Any, log_ratio: Any, advantages: Any, is_cap: float) -> Any:
        return -objectives.ratio(log_ratio).clamp(max=is_cap) * advantages * logprobs

    patch.setattr("hfpg.algorithms.grpo.cispo", cispo)


def mean_with_the_sample_itself(patch: pytest.MonkeyPatch) -> None:
    """RLOO's K / (K − 1) is lost."""
    patch.setattr("hfpg.algorithms.reinforce.leave_one_out", baselines.group_mean)


def mean_of_local_means(patch: pytest.MonkeyPatch) -> None:
    """Denominators of a micro-batch in place of the whole minibatch's."""

    def token_coefficients(mask: Any, weights: Any, *rest: Any) -> Any:
        halves = [masked.token_coefficients(m, w, *rest) for m, w in zip(mask.chunk(2), weights.chunk(2), strict=True)]
        return torch.cat(halves) / 2

    patch.setattr("hfpg.learner.token_coefficients", token_coefficients)


def running_mean_learns_first(patch: pytest.MonkeyPatch) -> None:
    """The batch is in its own baseline."""
    from hfpg.algorithms.reinforce import Reinforce

    plain = Reinforce._baseline

    def baseline(self: Any, rollout: Any, whole: Any, running: Any) -> Any:
        return plain(
            self, rollout, whole, baselines.update_running_mean(running, whole[:, 0], rollout.weights, self.ema_decay)
        )

    patch.setattr("hfpg.algorithms.reinforce.Reinforce._baseline", baseline)


def kl_of_the_own_token_only(patch: pytest.MonkeyPatch) -> None:
    """A token does not answer for the KL of those that follow it."""

    def rewards_to_go(rewards: Any, mask: Any, *rest: Any) -> Any:
        last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
        final = torch.where(last, rewards, 0).sum(1, keepdim=True)
        return torch.where(mask, torch.where(last, 0, rewards) + final, 0)

    patch.setattr("hfpg.algorithms.reinforce.rewards_to_go", rewards_to_go)


def raw_logits_under_top_p(patch: pytest.MonkeyPatch) -> None:
    """Scores over the whole vocabulary what was drawn from the likeliest part of it."""
    plain = head.head_scores
    patch.setattr("hfpg.models.head_scores", lambda h, w, b, y, t, kept, *rest: plain(h, w, b, y, t, None, *rest))


def ratio_from_generate(patch: pytest.MonkeyPatch) -> None:
    """Old log-probs of another forward, in lower precision."""
    plain = Learner.score

    def score(self: Any, *args: Any, **settings: Any) -> Any:
        old = plain(self, *args, **settings)
        return old._replace(logprobs=old.logprobs.bfloat16().to(old.logprobs.dtype))

    patch.setattr("hfpg.learner.Learner.score", score)


def score_on_the_padding(patch: pytest.MonkeyPatch) -> None:
    """The score stands one past the end of short completions, as if the stop token were no action."""

    def token_rewards(scores: Any, mask: Any, *rest: Any) -> Any:
        found = returns.token_rewards(scores, mask, *rest)
        short = mask.sum(1) > 1
        return torch.where(short[:, None] & ~mask.roll(-1, 1), 0, found)

    patch.setattr("hfpg.algorithms.method.token_rewards", token_rewards)


GATE: dict[Callable[[pytest.MonkeyPatch], None], dict[str, Check]] = {
    stop_token_out_of_the_loss: {
        "reinforce = ∇J (GPT-2)": unbiased(),
        "reinforce = ∇J (LSTM)": unbiased(kind="lstm"),
    },
    value_after_the_token: {
        "a2c = ∇J": functools.partial(test_exact.test_a2c_is_unbiased_at_lambda_one_for_any_value_function, "shared"),
        "ppo = ∇J": functools.partial(test_exact.test_ppo_takes_the_policy_gradient_first, 0.0, "shared"),
    },
    no_temperature: {"reinforce = ∇J at τ = 0.7": unbiased(temperature=0.7)},
    k3_with_the_wrong_sign: {
        "k3 = reverse KL": test_kl.test_k2_and_the_exact_kl_per_token_agree_and_k3_is_the_reverse_kl,
        "k3's documented bias": functools.partial(test_kl.test_the_others_in_the_loss_are_other_objectives, "k3"),
    },
    another_epsilon_under_the_spread: {
        "advantages = TRL's": functools.partial(test_trl.test_advantages_loss_and_gradient_are_those_of_trl, "default")
    },
    weight_not_detached: {
        "cispo = reinforce at ratio 1": functools.partial(
            test_exact.test_at_ratio_one_every_surrogate_is_reinforce, "sequence_sum", "gpt2"
        )
    },
    mean_with_the_sample_itself: {
        "rloo = ∇J, pairs": functools.partial(test_groups.test_leave_one_out_is_unbiased, "gpt2", 2, 0.0),
        "rloo = covariance": test_groups.test_rloo_is_the_sample_covariance_of_return_and_score_function,
    },
    mean_of_local_means: {"aggregations": test_exact.test_the_other_aggregations_are_what_is_documented},
    running_mean_learns_first: {
        "ema = ∇J, pairs": functools.partial(
            test_groups.test_the_running_mean_is_unbiased_because_it_serves_before_it_learns, 2
        )
    },
    kl_of_the_own_token_only: {"reinforce with KL = ∇J": unbiased(kl_coef=0.3)},
    raw_logits_under_top_p: {"top-p = ∇J": test_exact.test_under_top_p_the_policy_is_what_was_sampled_from},
    ratio_from_generate: {
        "ppo = ∇J": functools.partial(test_exact.test_ppo_takes_the_policy_gradient_first, 0.0, "shared"),
    },
    score_on_the_padding: {"reinforce = ∇J": unbiased()},
}


@pytest.fixture(scope="module")
def table():
    """The rows, printed when the last bug has been tried."""
    rows: list[str] = []
    yield rows
    print("\n\nbug → the oracle tests that catch it\n" + "\n".join(rows))


def passes(check: Check) -> bool:
    """Whether an oracle test holds."""
    try:
        check()
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize("bug", GATE, ids=lambda bug: bug.__name__)
def test_every_bug_is_caught(bug, monkeypatch, table):
    checks = GATE[bug]
    assert all(passes(check) for check in checks.values()), "a test of the oracle fails without any bug"
    bug(monkeypatch)
    caught = [name for name, check in checks.items() if not passes(check)]
    table.append(f"{bug.__name__.replace('_', ' '):36} → {', '.join(caught) or 'NOTHING'}")
    assert len(caught) == len(checks), f"{bug.__name__} passes {sorted(set(checks) - set(caught))}"
