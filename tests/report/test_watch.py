"""The judge that training never saw: best kept, over-optimisation said, the run ended when asked."""

import dataclasses
import json
import math
from statistics import fmean

import pytest
import torch

from hfpg import ConfigError, session
from hfpg.algorithms import PPO, Reinforce
from hfpg.config import GuardStop, one_sentence
from hfpg.report.watch import IN_A_ROW, Watch, constant, seen, standard_errors
from hfpg.saving import load_actor_critic
from tests import build, tiny


def watched(evaluations):
    """(best, falling) after each of the evaluations, which are (proxy, gold), per prompt."""
    watch, kept = Watch(), []
    for step, (proxy, gold) in enumerate(evaluations):
        watch, best = seen(watch, step, fmean(gold), proxy, gold)
        kept.append((best, watch.falling))
    return watch, kept


def test_best_and_falling():
    pairs = [(0, 0), (1, 2), (2, 1), (3, 0.5), (0.5, 0.1), (4, 1), (4, 3)]
    watch, kept = watched([([p] * 4, [g] * 4) for p, g in pairs])
    assert kept == [(True, 0), (True, 0), (False, 1), (False, 2), (False, 0), (False, 1), (True, 0)]
    assert (watch.best, watch.best_step, watch.best_gold) == (3, 6, [3] * 4)


def test_the_difference_is_counted_in_paired_standard_errors():
    then = torch.randn(50, generator=torch.Generator().manual_seed(0)).tolist()
    noise = torch.randn(50, generator=torch.Generator().manual_seed(1)).tolist()
    now = [t - 0.5 + 0.1 * e for t, e in zip(then, noise, strict=True)]
    d = torch.tensor(now, dtype=torch.float64) - torch.tensor(then, dtype=torch.float64)
    assert standard_errors(now, then) == pytest.approx(float(d.mean() / (d.std() / math.sqrt(50)))) and d.mean() < 0
    assert standard_errors([2.0, None, 2.0, 2.0], [1.0, 5.0, None, 1.0]) == math.inf
    assert standard_errors([1.0, None], [0.0, 0.0]) == standard_errors(now, now) == standard_errors(now, []) == 0.0


def noise(seed, drift=0.0, prompts=64, evaluations=20, turn=5):
    """A proxy that rises; a gold judge of which each evaluation is a fresh draw, and that falls after the turn."""
    draw = torch.Generator().manual_seed(seed)
    between = torch.randn(prompts, generator=draw)
    for t in range(evaluations):
        gold = between + torch.randn(prompts, generator=draw) - drift * max(0, t - turn)
        yield (between + 0.2 * t).tolist(), gold.tolist()


def test_noise_does_not_fire_and_a_real_turn_does():
    """Twenty evaluations of 64 prompts; the best of them is the luckiest, and everything after it is lower."""
    silent = [max(falling for _, falling in watched(noise(seed))[1]) for seed in range(100)]
    assert sum(f >= IN_A_ROW for f in silent) <= 5 and sum(f >= 1 for f in silent) <= 30
    turned = [[falling for _, falling in watched(noise(seed, drift=0.2))[1]] for seed in range(100)]
    first = [next((t for t, f in enumerate(falling) if f >= IN_A_ROW), 99) for falling in turned]
    assert max(first) <= 14 and all(falling[-1] > 3 for falling in turned)
    both_fall = [([-p for p in proxy], gold) for proxy, gold in noise(0, drift=0.2)]
    assert (
        max(falling for _, falling in watched(both_fall)[1]) == 0
    )  # a policy that just grows worse is another matter


def test_the_watch_survives_json_and_older_checkpoints():
    watch, _ = watched([([0.0, None], [1.0, 2.0])])
    watch = dataclasses.replace(watch, name="eval_scores/gold")
    saved = json.loads(json.dumps(dataclasses.asdict(watch)))
    assert Watch.resumed(saved, "eval_scores/gold") == watch
    assert Watch.resumed(saved, "eval_length") == Watch("eval_length")
    older = {"name": "g", "best": 2.0, "best_step": 7, "proxy": 1.0, "gold": 0.5, "falling": 0}
    resumed = Watch.resumed(older, "g")
    assert (resumed.best, resumed.best_step) == (2.0, 7)
    assert seen(resumed, 8, 1.0, [9.0] * 3, [1.0] * 3)[0].falling == 0  # nothing to compare with: no evidence


def rising_then_falling():
    """A proxy that rises by the clock and a gold judge that turns."""
    golds = iter([0.0, 1.0, 2.0, 1.0, 0.5, 0.2])
    proxies = iter(range(1000))

    def proxy(completions):
        return [float(next(proxies))] * len(completions)

    def gold(completions, trainer_state):
        return [next(golds) if len(completions) == 5 else 0.0] * len(completions)

    return [proxy, gold]


def make(folder, **settings):
    options = dict(reward_weights=[1.0, 0.0], max_steps=5, eval_steps=1, eval_on_start=True)
    options |= dict(keep_best_by="eval_scores/gold", eval_dataset=tiny.rows(5), disable_tqdm=True)
    return build.trainer(folder, reward=rising_then_falling(), **(options | settings))


def test_the_best_by_the_gold_judge_is_kept_and_the_parting_is_said(tmp_path, capsys):
    trainer, states = make(tmp_path), []
    plain = trainer.evaluate
    trainer.evaluate = lambda *a: (states.append([p.clone() for p in trainer.learner.actor.parameters()]), plain(*a))[
        1
    ]
    trainer.train()
    assert trainer.run.watch["best"] == 2.0 and trainer.run.watch["best_step"] == 2
    kept = load_actor_critic(tmp_path / "best")
    pairs = list(zip(kept.parameters(), states[2], strict=True))
    assert all(torch.equal(a, b) for a, b in pairs) and not (tmp_path / "best.tmp").exists()
    assert "best.tmp" not in (tmp_path / "best" / "README.md").read_text(), "the card names the folder that it is in"
    said = capsys.readouterr().out.replace("\n", " ")
    assert said.count("learning the judge's weaknesses") == 2 and "(+2.000, step 2) is in" in said
    assert "gold fell to +0.500, beyond chance and in 2 evaluations in a row" in said


def test_noise_neither_warns_nor_stops(tmp_path, capsys):
    """The proxy rises at every evaluation; what the gold judge says is a fresh draw."""
    clock, draw = iter(range(1000)), torch.Generator().manual_seed(0)

    def proxy(completions):
        return [float(next(clock))] * len(completions)

    def gold(completions):
        return torch.randn(len(completions), generator=draw)

    trainer = build.trainer(
        tmp_path,
        reward=[proxy, gold],
        reward_weights=[1.0, 0.0],
        max_steps=8,
        eval_steps=1,
        keep_best_by="eval_scores/gold",
        stop_overoptimized=1,
        eval_dataset=tiny.rows(20),
    )
    trainer.train()
    scores = [row["eval_scores/gold"] for row in trainer.state.log_history if "eval_score" in row]
    assert len(scores) == 8 and max(scores) == trainer.run.watch["best"] > scores[-1]
    assert trainer.state.global_step == 8 and "weaknesses" not in capsys.readouterr().out


def test_it_stops_when_asked_and_remembers_across_a_resume(tmp_path):
    trainer = make(tmp_path, stop_overoptimized=2, save_steps=1)
    trainer.train()
    assert trainer.state.global_step == 4
    again = make(tmp_path, resume_from_checkpoint="True", save_steps=1)
    session.begin(again, None)
    assert again.run.watch["best"] == 2.0 and again.run.watch["falling"] == 2


SCHEDULE = "keep_best_by='eval_scores/gold' keeps the best of the evaluations during training, and eval_steps=%s sched"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"keep_best_by": "eval_scores/glod"},
            "keep_best_by='eval_scores/glod' is no metric of an evaluation; did you mean 'eval_scores/gold'?; there "
            "are ['eval_scores/proxy', 'eval_scores/gold', 'eval_score', ",
        ),
        (
            {"keep_best_by": "scores/gold"},
            "is no metric of an evaluation; did you mean 'eval_scores/gold'?; there are",
        ),
        (
            {"keep_best_by": "eval_kl_to_ref", "algorithm": PPO(kl_coef=0.0)},
            "keep_best_by='eval_kl_to_ref' is no metric of an evaluation; did you mean 'eval_score'?; there are",
        ),
        ({"keep_best_by": None, "stop_overoptimized": 2}, "name it with keep_best_by, such as 'eval_scores/judge_b'"),
        (
            {"keep_best_by": "eval_length", "stop_overoptimized": 2},
            "keep_best_by='eval_length' is no judge's; use one of ['eval_scores/proxy', 'eval_scores/gold'], such as",
        ),
        (
            {"eval_dataset": None},
            "eval_steps and eval_on_start and keep_best_by need held-out prompts; give an eval_d",
        ),
        ({"eval_steps": 0}, f"{SCHEDULE % 0}ules none in max_steps=5; set eval_steps, such as 1"),
        (
            {"eval_steps": 0, "eval_dataset": None},
            f"{SCHEDULE % 0}ules none in max_steps=5; set eval_steps, such as 1",
        ),
        ({"eval_steps": 60, "max_steps": 50}, f"{SCHEDULE % 60}ules none in max_steps=50; set eval_steps, such as 5"),
    ],
)
def test_what_cannot_be_watched_is_refused_before_the_model_loads(settings, sentence, tmp_path, monkeypatch):
    monkeypatch.setattr("hfpg.trainer.load_policy", lambda *a, **k: pytest.fail("the model was loaded"))
    with pytest.raises(ConfigError) as caught:
        make(tmp_path / "run", **settings)
    assert sentence in str(caught.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("algorithm", [PPO(kl_coef=0.05), Reinforce(kl_coef=0.0)])
def test_the_names_that_keep_best_by_may_have_are_those_of_an_evaluation(algorithm, tmp_path):
    def gold(completions, log_metric):
        log_metric("share", 0.5)
        log_metric("score", 0.5)  # hfpg's own: it stands as logged/score
        return [0.0] * len(completions)

    settings = dict(reward=[tiny.count_a, gold], eval_dataset=tiny.rows(5), algorithm=algorithm, eval_steps=1)
    with pytest.raises(ConfigError) as caught:
        build.trainer(tmp_path / "a", keep_best_by="none of these", **settings)
    listed = str(caught.value).split("there are ")[1].split("]")[0].strip("[").replace("'", "").split(", ")
    found = build.trainer(tmp_path / "b", keep_best_by="eval_share", **settings).evaluate()
    assert set(listed) == found.keys() - {"eval_sampler_gap"}  # of the sampler, and not always there
    assert "eval_logged/score" in found and found["eval_score"] != 0.5


def test_a_metric_that_is_not_logged_every_time_keeps_what_is_best_so_far(tmp_path, capsys):
    calls = []

    def gold(completions, log_metric):
        calls.append(1)
        if len(completions) != 5 or len(calls) < 5:
            log_metric("share", 0.5)
        return [0.0] * len(completions)

    settings = dict(reward=gold, eval_dataset=tiny.rows(5), eval_steps=1, keep_best_by="eval_share", max_steps=3)
    trainer = build.trainer(tmp_path, **settings)
    trainer.train()
    assert trainer.run.watch["best_step"] == 1
    said = "this evaluation says nothing of eval_share: nothing was scored, or logged, under it"
    assert capsys.readouterr().out.count(said) == 2


def test_a_finished_runs_best_survives_an_evaluation_that_forgot_to_resume(tmp_path):
    make(tmp_path).train()
    files = {path: path.read_bytes() for path in [tmp_path / "best" / "model.safetensors", tmp_path / "metrics.jsonl"]}
    again = make(tmp_path)
    again.evaluate()
    with pytest.raises(ConfigError, match="holds a run already"):
        again.train()
    assert all(path.read_bytes() == content for path, content in files.items())


def test_an_evaluation_that_nobody_scored_is_no_best(tmp_path, capsys):
    calls = []

    def gold(completions):
        calls.append(len(completions))
        return [None if len(completions) == 5 and calls.count(5) > 1 else -5.0] * len(completions)

    settings = dict(reward=gold, reward_weights=None, keep_best_by="eval_scores/gold", max_steps=2)
    trainer = build.trainer(
        tmp_path, eval_steps=1, eval_on_start=True, eval_dataset=tiny.rows(5), disable_tqdm=True, **settings
    )
    trainer.train()
    assert trainer.run.watch["best"] == -5.0 and trainer.run.watch["best_step"] == 0
    assert "this evaluation says nothing of eval_scores/gold" in capsys.readouterr().out


def test_another_metric_begins_anew(tmp_path):
    make(tmp_path, max_steps=2, save_steps=1).train()
    more = make(tmp_path, max_steps=3, save_steps=1, resume_from_checkpoint="True", keep_best_by="eval_length")
    more.train()
    assert more.run.watch["name"] == "eval_length" and more.run.watch["best"] > 3


# ── scores that tell nothing apart


def test_constant_counts_the_steps_in_which_a_function_tells_nothing_apart():
    found, seen_so_far = {}, []
    for column in ([1, 1], [2, None, 2], [2, 3], [0, 0], [5], [0, 0], [None, None]):
        found = constant(found, {"f": column, "g": [1.0, 2.0]})
        seen_so_far.append(found.get("f"))
    assert seen_so_far == [(1, 1), (2, 2), None, (0, 1), None, (0, 1), None]


def flat(completions):
    return [0.5] * len(completions)


def test_a_constant_reward_is_said_once_with_its_name_and_value(tmp_path, capsys):
    def saturating(completions, trainer_state):
        ended = trainer_state.global_step >= 4
        return [1.0 if ended else float(len(c)) for c in completions]

    build.trainer(tmp_path, reward=[flat, saturating, tiny.count_a], max_steps=8).train()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert said == [
        f"warning: reward function '{name}' gave every completion {value}, 3 steps in a row: nothing can be learnt "
        "from it"
        for name, value in (("flat", 0.5), ("saturating", 1))
    ]


def test_stop_constant_ends_the_run_saved_and_with_status_3(tmp_path, capsys):
    trainer = build.trainer(
        tmp_path, reward=[flat, tiny.count_a], reward_weights=[1.0, 0.0], max_steps=9, stop_constant=4
    )
    with pytest.raises(SystemExit) as stopped, one_sentence():
        trainer.train()
    assert stopped.value.code == 3 and trainer.state.global_step == 4
    assert (tmp_path / "checkpoint-4" / "hfpg_state.json").is_file()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    out, error = capsys.readouterr()
    assert error == (
        "error: stop_constant=4 steps in a row taught nothing: reward function 'flat' gave every completion 0.5. Look "
        "at the judge with `hfpg reward check`, or sample more widely (temperature, num_generations)\n"
    )
    assert "what was trained is saved: resume_from_checkpoint=True goes on from" in out.replace("\n", " ")


def test_the_steps_in_a_row_that_a_guard_counts_are_counted_on_in_a_resumed_run(tmp_path):
    setup = dict(reward=[flat], max_steps=9, stop_constant=4, save_steps=1)
    with pytest.raises(GuardStop):
        build.trainer(tmp_path, **setup).train()
    resumed = build.trainer(tmp_path, **setup)
    with pytest.raises(GuardStop):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4

    nothing = dict(reward=lambda completions: [None] * len(completions), max_steps=9, save_steps=1)
    with pytest.raises(GuardStop):
        build.trainer(tmp_path / "b", **nothing).train()
    resumed = build.trainer(tmp_path / "b", **nothing)
    with pytest.raises(GuardStop):
        resumed.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-2"))
    assert resumed.state.global_step == 3


def test_stop_constant_goes_on_while_any_function_that_scores_tells_apart(tmp_path):
    build.trainer(tmp_path, reward=[flat, tiny.count_a], max_steps=5, stop_constant=2).train()
    with pytest.raises(ConfigError, match="stop_constant=-1 must be 0 .off. or more"):
        build.trainer(tmp_path / "b", stop_constant=-1)


def test_a_run_in_which_nothing_is_scored_ends_by_a_guard_too(tmp_path):
    trainer = build.trainer(tmp_path, reward=lambda completions: [None] * len(completions), max_steps=9)
    with pytest.raises(GuardStop, match="3 steps in a row changed nothing"):
        trainer.train()
    assert (tmp_path / "checkpoint-3" / "hfpg_state.json").is_file()
