"""The judge that training never saw: best kept, over-optimisation said, the run ended when asked."""

import pytest
import torch

from hfpg import ConfigError
from hfpg.models import load_actor_critic
from hfpg.report.watch import Watch, seen
from tests import build, tiny


def test_best_and_falling():
    watch, kept = Watch(), []
    for step, (proxy, gold) in enumerate([(0, 0), (1, 2), (2, 1), (3, 0.5), (2.5, 0.1), (4, 3)]):
        watch, best = seen(watch, step, proxy, gold)
        kept.append((best, watch.falling))
    assert kept == [(True, 0), (True, 0), (False, 1), (False, 2), (False, 0), (True, 0)]
    assert (watch.best, watch.best_step) == (3, 5)


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
    said = capsys.readouterr().out.replace("\n", " ")
    assert said.count("learning the judge's weaknesses") == 3 and "(+2.000, step 2) is in" in said


def test_it_stops_when_asked_and_remembers_across_a_resume(tmp_path):
    trainer = make(tmp_path, stop_overoptimized=2, save_steps=1)
    trainer.train()
    assert trainer.state.global_step == 4
    again = make(tmp_path, resume_from_checkpoint="True", save_steps=1)
    again._begin(None)
    assert again.run.watch["best"] == 2.0 and again.run.watch["falling"] == 2


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"keep_best_by": "eval_gold"}, "keep_best_by='eval_gold' is no metric of an evaluation; there are"),
        ({"keep_best_by": None, "stop_overoptimized": 2}, "name it with keep_best_by"),
        ({"eval_dataset": None, "eval_steps": 0, "eval_on_start": False}, "keep_best_by need held-out prompts"),
    ],
)
def test_what_cannot_be_watched_is_refused(settings, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        make(tmp_path, **settings).train()


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
