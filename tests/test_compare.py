"""Methods side by side: the noise is that of the gradients training uses, and measuring leaves a run as it was."""

import dataclasses
import math

import pytest
import torch

from hfpg.algorithms import A2C, GRPO, PPO, RLOO, TRPO, Reinforce, ReMax
from hfpg.compare import check_comparison, compare, gradient_noise, heading
from hfpg.config import ConfigError, TrainConfig
from tests import tiny
from tests.build import trainer


@pytest.mark.parametrize("baseline", ["none", "greedy", "group"])
def test_measuring_changes_nothing_that_training_does(tmp_path, baseline):
    method = Reinforce(baseline=baseline, num_generations=4 if baseline == "group" else 1, kl_coef=0.0)
    runs = [trainer(tmp_path / name, model=tiny.model("lstm"), algorithm=method) for name in ("plain", "measured")]
    noise, _ = gradient_noise(runs[1], repeats=3)
    assert noise > 0
    for run in runs:
        run.train()
    for plain, measured in zip(*(run.learner.actor.parameters() for run in runs), strict=True):
        assert torch.equal(plain, measured)


def test_a_value_head_learns_while_the_policy_stays(tmp_path):
    run = trainer(tmp_path, model=tiny.model("lstm"), algorithm=Reinforce(baseline="value", kl_coef=0.0))
    gradient_noise(run, repeats=2)
    for now, start in zip(run.learner.actor.policy.parameters(), tiny.model("lstm").parameters(), strict=True):
        assert torch.equal(now, start)
    assert run.learner.actor.value.linear.weight.abs().max() > 0


def test_every_rollout_is_a_new_one(tmp_path, monkeypatch):
    """Keys that come again would give the same tokens again, and too small a variance."""
    run, keys = trainer(tmp_path, model=tiny.model("lstm"), algorithm=Reinforce(kl_coef=0.0)), []
    collect = run.collect
    monkeypatch.setattr(run, "collect", lambda: keys.append((drawn := collect())[0].sample_ids) or drawn)
    gradient_noise(run, repeats=3, warm_up=2)
    assert len(torch.cat(keys).unique()) == 5 * 8
    run.train()
    assert len(torch.cat(keys).unique()) == (5 + 2) * 8


def test_the_numbers_are_those_of_the_gradients(tmp_path, monkeypatch):
    """Whatever the gradients are: the same as from all of them at once."""
    g = torch.Generator().manual_seed(0)
    drawn = torch.randn(6, 50, generator=g, dtype=torch.float64) + 2
    found = iter(drawn)
    monkeypatch.setattr("hfpg.compare._policy_gradient", lambda *given: next(found))
    noise, norm = gradient_noise(trainer(tmp_path, algorithm=Reinforce(kl_coef=0.0)), repeats=6, warm_up=0)
    variance = drawn.var(0).sum()
    square = drawn.mean(0).square().sum() - variance / 6
    assert noise == pytest.approx(float(variance / square)) and norm == pytest.approx(float(square.sqrt()))


def test_gradients_that_cancel_are_nothing_but_noise(tmp_path, monkeypatch):
    drawn = iter([torch.ones(3).double(), -torch.ones(3).double()])
    monkeypatch.setattr("hfpg.compare._policy_gradient", lambda *given: next(drawn))
    found = gradient_noise(trainer(tmp_path, algorithm=Reinforce(kl_coef=0.0)), repeats=2, warm_up=0)
    assert found == (math.inf, 0.0)


def test_more_samples_are_less_noise(tmp_path):
    """tr Cov falls as 1 / B and E g stays: four times the batch has about a quarter of the noise."""
    small, large = (
        gradient_noise(trainer(tmp_path / str(rows), algorithm=RLOO(num_generations=2), prompts_per_step=rows), 24)
        for rows in (8, 32)
    )
    assert 0.1 < large[0] / small[0] < 0.6
    assert large[1] == pytest.approx(small[1], rel=0.4)


METHODS = [
    RLOO(num_generations=2, entropy_coef=0.01),
    ReMax(),
    GRPO(num_generations=4, kl_coef=0.1),
    GRPO(num_generations=4, kl_coef=0.1, kl_estimator="full"),
    A2C(),
    PPO(value="separate"),
    TRPO(critic="separate"),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: type(method).__name__)
def test_every_kind_of_method_can_be_measured(tmp_path, method):
    run = trainer(tmp_path, algorithm=method)
    before = [p.clone() for p in run.learner.actor.policy.parameters()]
    noise, norm = gradient_noise(run, repeats=2, warm_up=1)
    assert noise > 0 and norm >= 0
    if method.value != "shared":
        assert all(map(torch.equal, run.learner.actor.policy.parameters(), before))
    assert all(p.grad is None or not p.grad.any() for p in run.learner.actor.parameters())


def test_an_adapter_is_all_that_is_measured(tmp_path):
    from peft import LoraConfig

    adapter = LoraConfig(r=2, target_modules=["c_attn"], init_lora_weights=False)
    run = trainer(tmp_path, algorithm=RLOO(num_generations=2), peft_config=adapter)
    noise, norm = gradient_noise(run, repeats=3, warm_up=0)
    assert noise > 0 and norm > 0


def test_the_value_error_has_no_part_in_it(tmp_path):
    """V is on the policy's trunk here; how much its error weighs changes nothing."""
    light, heavy = (trainer(tmp_path / str(c), algorithm=A2C(value_coef=c)) for c in (0.1, 10.0))
    for run in (light, heavy):
        torch.nn.init.ones_(run.learner.actor.value.linear.weight)  # at 0 its error would reach no trunk
    assert gradient_noise(light, repeats=2, warm_up=0) == gradient_noise(heavy, repeats=2, warm_up=0)


def test_one_gradient_has_no_noise(tmp_path):
    with pytest.raises(ConfigError, match="repeats=1 must be at least 2: one gradient has no covariance"):
        gradient_noise(trainer(tmp_path), repeats=1)


def config(tmp_path, **changes):
    args = trainer(tmp_path / "config").args
    return dataclasses.replace(args, output_dir=None, max_steps=1, **changes)


def test_methods_start_from_the_same_policy_with_as_many_completions(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, args = tiny.model("lstm"), config(tmp_path, prompts_per_step=8)
    methods = [Reinforce(kl_coef=0.0), Reinforce(kl_coef=0.0, baseline="none"), GRPO(num_generations=4, kl_coef=0.0)]
    data = tiny.rows(), tiny.rows(12)
    runs = list(compare(model, methods, tiny.count_a, *data, args, tiny.tokenizer(), repeats=2))
    assert [run.method for run in runs] == methods
    assert len({run.before["eval_score"] for run in runs}) == 1 and runs[0].after != runs[0].before
    assert [run.trainer.args.prompts_per_step for run in runs] == [8, 8, 2]
    for now, start in zip(model.parameters(), tiny.model("lstm").parameters(), strict=True):
        assert torch.equal(now, start)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config"], "without output_dir nothing is kept"
    assert capsys.readouterr().out == "", "whoever compares prints"
    columns = [line.split()[0] for line in (heading("score"), *(run.line("eval_score") for run in runs))]
    assert columns == ["method", methods[0].baseline, "none", "GRPO"]
    assert f"{runs[0].before['eval_score']:.2f} → {runs[0].after['eval_score']:.2f}" in runs[0].line("eval_score")
    runs[-1].show(3)
    assert "The same prompts, before and after" in capsys.readouterr().out


def test_each_run_has_a_folder_of_its_own(tmp_path):
    args = dataclasses.replace(config(tmp_path), output_dir=str(tmp_path / "out"))
    twice = [Reinforce(kl_coef=0.0, baseline="none")] * 2
    runs = list(compare(tiny.model(), twice, tiny.count_a, tiny.rows(), tiny.rows(8), args, tiny.tokenizer(), 2))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0-none", "1-none"]
    assert runs[0].after == runs[1].after
    with pytest.raises(ConfigError, match="/0-none' holds a run already; continue it with resume_from_checkpoint"):
        check_comparison(twice, args, 2)
    for settings in (dict(overwrite_output_dir=True), dict(resume_from_checkpoint="True"), dict(output_dir=None)):
        check_comparison(twice, dataclasses.replace(args, **settings), 2)


def test_completions_that_make_no_whole_groups_are_refused_before_anything_runs(tmp_path):
    made = compare(tiny.model(), [GRPO(num_generations=3)], tiny.count_a, [], [], config(tmp_path), tiny.tokenizer())
    with pytest.raises(ConfigError) as caught:
        next(made)
    assert str(caught.value) == (
        "prompts_per_step=8 completions are no whole groups of num_generations=3; use a multiple of it, such as 6"
    )


def test_what_cannot_be_compared_is_known_before_any_work():
    """The recipe asks before it learns its texts."""
    args = TrainConfig(prompts_per_step=6)
    with pytest.raises(ConfigError, match="no whole groups of num_generations=4"):
        check_comparison([RLOO(num_generations=4)], args, 16)
    with pytest.raises(ConfigError, match="repeats=1 must be at least 2"):
        check_comparison([], args, 1)
