"""TRPO: credit, what it refuses, and a run."""

import functools
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator

from hfpg.algorithms import PPO, RLOO, TRPO
from hfpg.config import ConfigError, TrainConfig
from hfpg.ops.returns import token_rewards
from tests import build
from tests.algorithms.test_reinforce import rollout


def test_without_a_critic_the_credit_is_that_of_rloo():
    rows = rollout(group_ids=torch.tensor([0, 0, 1, 1]), weights=torch.ones(4))
    rewards = token_rewards(rows.scores, rows.completion_mask, rows.old_logprobs - rows.ref_logprobs, 0.1)
    found = TRPO().estimate(rows, rewards, TRPO().init())[0]
    assert torch.equal(found.advantages, RLOO().estimate(rows, rewards, RLOO().init())[0].advantages)
    assert found.returns is None and TRPO().value is None


def test_with_a_critic_it_is_gae():
    rows = rollout()
    rewards = token_rewards(rows.scores, rows.completion_mask)
    algorithm, same = TRPO(critic="separate", lam=0.9), PPO(lam=0.9, whiten_advantages=False)
    found, expected = (a.estimate(rows, rewards, a.init())[0] for a in (algorithm, same))
    assert torch.equal(found.advantages, expected.advantages) and torch.equal(found.returns, expected.returns)
    assert algorithm.value == "separate"


REFUSED = [
    (dict(critic="shared"), "training it moves the policy outside the trust region; use critic='separate'"),
    (dict(num_generations=1), "leaves nothing to compare with; set it to 4, or use critic='separate'"),
    (dict(lam=0.9), "lam=0.9 is the critic's, and critic='none'; use critic='separate'"),
    (dict(entropy_coef=0.01), "use kl_in='reward' and entropy_coef=0"),
    (dict(kl_in="loss", kl_estimator="k2_sequence"), "use kl_in='reward' and entropy_coef=0"),
    (dict(aggregation="token_mean"), "TRPO sums over a completion, as its trust region does; use 'sequence_sum'"),
    (dict(replay=1, off_policy="truncated"), "an average over those that it did; use replay=0, or PPO"),
    (dict(max_kl=0.0), "max_kl=0.0 must be above 0, such as 0.01"),
    (dict(damping=0.0), "damping=0.0 must be above 0"),
    (dict(cg_iterations=0), "cg_iterations=0 must be at least 1"),
    (dict(backtrack=1.0), "backtrack=1.0 must lie between 0 and 1"),
]


@pytest.mark.parametrize(("settings", "sentence"), REFUSED, ids=[next(iter(r[0])) for r in REFUSED])
def test_what_breaks_the_trust_region_is_refused(settings, sentence):
    with pytest.raises(ConfigError) as caught:
        TRPO(**settings)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("critic", ["none", "separate"])
def test_equal_scores_are_no_reason_for_a_step(critic, tmp_path):
    def run(name, score):
        algorithm = TRPO(kl_coef=0.02, num_generations=4, max_kl=0.05, critic=critic)
        given = dict(reward=score, max_steps=1, max_completion_length=12)
        return build.trainer(tmp_path / name, algorithm=algorithm, **given).train()

    still = run("still", lambda completions: [0.0] * len(completions))
    assert still["trust_region_kl"] == still["optimizer_steps"] == 0 and still["grad_norm"] < 1e-5
    assert run("moved", lambda completions: [1e-3 * len(c) for c in completions])["trust_region_kl"] > 0


@pytest.mark.parametrize("name", ["epochs", "minibatches", "clip_range"])
def test_there_is_one_step_and_nothing_to_clip(name):
    with pytest.raises(TypeError, match=name):
        TRPO(**{name: 2})


def test_settings_of_the_run_that_break_it_are_refused_before_the_model_loads(tmp_path):
    with pytest.raises(ConfigError, match="the length of TRPO's step is max_kl; remove it"):
        build.trainer(tmp_path, algorithm=TRPO(), max_grad_norm=0.5)
    with pytest.raises(ConfigError, match="train TRPO with bf16=False"):
        TRPO().check_run(TrainConfig(bf16=True))
    TRPO(critic="separate").check_run(TrainConfig(max_grad_norm=0.5))  # it clips the critic's gradient


def test_bf16_that_the_launcher_asks_for_is_refused_too(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ConfigError, match="train TRPO with bf16=False"):
        build.trainer(tmp_path, algorithm=TRPO())


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_a_sharded_engine_is_refused(engine, tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", property(lambda self: SimpleNamespace(value=engine)))
    with pytest.raises(ConfigError, match=f"{engine} is not supported; hfpg runs one process, or several with DDP"):
        build.trainer(tmp_path, algorithm=TRPO())


def test_a_task_that_is_solved_is_no_error(tmp_path):
    trainer = build.trainer(
        tmp_path, algorithm=TRPO(kl_coef=0.0), reward=lambda completions: [1.0] * len(completions), max_steps=5
    )
    assert trainer.train()["optimizer_steps"] == 0


@pytest.mark.parametrize("settings", [dict(), dict(critic="separate", lam=0.95, num_generations=1, value_epochs=2)])
def test_it_learns_within_its_bound(settings, tmp_path):
    algorithm = TRPO(kl_coef=0.01, max_kl=0.2, **settings)
    trainer = build.trainer(tmp_path, algorithm=algorithm, max_steps=10, prompts_per_step=16)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "score" in row]
    assert sum(r["score"] for r in rows[-3:]) > 1.2 * sum(r["score"] for r in rows[:3])
    assert all(r["trust_region_kl"] <= 0.2 for r in rows)


@pytest.mark.parametrize("settings", [dict(), dict(critic="separate", lam=0.95, num_generations=1)])
def test_a_resumed_run_is_the_unbroken_run_bit_for_bit(settings, tmp_path):
    """Also without a critic, where the optimizer has no state at all."""
    algorithm = TRPO(**settings)
    make = functools.partial(build.trainer, algorithm=algorithm, max_steps=4, save_steps=2)
    whole = make(tmp_path / "a")
    whole.train()
    second = make(tmp_path / "b", resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    second.train()
    pairs = zip(whole.learner.actor.parameters(), second.learner.actor.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
