"""The evaluation of a trainer: held-out prompts, sampled and judged; and the best model by it."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import torch

from hfpg import preflight
from hfpg.checkpoint import put_best
from hfpg.config import require
from hfpg.data import share
from hfpg.report.card import loadable
from hfpg.report.completions import describe_evaluation, shown
from hfpg.report.watch import IN_A_ROW, Column, Watch, seen
from hfpg.rewards.judge import beside


if TYPE_CHECKING:
    from hfpg.trainer import PolicyGradientTrainer


@torch.no_grad()
def evaluate(trainer: PolicyGradientTrainer, dataset: Any) -> dict[str, float]:
    """See `PolicyGradientTrainer.evaluate`, whose body this is."""
    data = trainer.eval_data if dataset is None else trainer.read(dataset, trainer.learner.actor.policy.config)
    require(data is not None, "evaluate needs held-out prompts; give the trainer an eval_dataset")
    assert data is not None
    preflight.check_eval(data, trainer.args, trainer.accelerator.num_processes)
    mine = share(len(data), trainer.accelerator.process_index, trainer.accelerator.num_processes)
    ids = -1 - torch.arange(mine.start, mine.stop)  # negative: never the key of a training sample
    prompts, samples = trainer.sample(data, list(mine), ids)
    before = trainer.collector.said  # of a step that may not be reported yet
    rollout = trainer.rescore(samples, trainer.judge_samples(prompts, samples))
    said, trainer.collector.said = trainer.collector.said, before
    trainer.clock.read()
    trainer.events.fire("on_prediction_step")
    in_order = rollout.take(torch.argsort(rollout.sample_ids, descending=True))
    rows = shown(in_order, trainer.processing_class)
    found = describe_evaluation(rollout, said["by_function"], rows)
    found["dropped"] = len(said["errors"]) / max(said["rows"], 1)
    found |= beside(found, said["metrics"])
    metrics = {f"eval_{name}": value for name, value in found.items()}
    if dataset is not None:  # callbacks that stop, the record and the card are about the run's own prompts
        return metrics
    told = {"step": trainer.state.global_step, "metrics": metrics, "shown": [*map(list, rows)]}
    trainer.evaluations.append(told)
    trainer.run.first_evaluation = trainer.evaluations[0]
    ours = trainer.claimed or not trainer.occupied  # before `train`, a folder that holds a run is only looked at
    if ours:
        trainer.recorder.metrics(trainer.state.global_step, metrics)
    trainer.events.evaluated(metrics)
    if ours and trainer.args.keep_best_by is not None:
        scores = zip(in_order.scores.tolist(), in_order.weights.tolist(), strict=True)
        proxy = [score if weight else None for score, weight in scores]
        gold = said["by_function"].get(trainer.args.keep_best_by.removeprefix("eval_scores/"), [])
        _keep_best(trainer, metrics, trainer.args.keep_best_by, proxy, gold)
    return metrics


def _keep_best(
    trainer: PolicyGradientTrainer, metrics: dict[str, float], name: str, proxy: Column, gold: Column
) -> None:
    """Keep the model that is best by a metric which training does not see, and say when the two part."""
    unheard = metrics["eval_dropped"] > trainer.args.max_dropped or metrics["eval_unscored"] == 1
    if unheard or not math.isfinite(metrics.get(name, math.nan)):
        trainer.terminal.say(f"this evaluation says nothing of {name}: nothing was scored, or logged, under it")
        return
    watch, best = seen(Watch.resumed(trainer.run.watch, name), trainer.state.global_step, metrics[name], proxy, gold)
    if best:
        place = trainer.output_dir / "best"  # a kill in the middle leaves the best so far
        whole = trainer.save_model(place.with_name("best.tmp"), repo_id=loadable(place))
        trainer.on_main(lambda: put_best(whole, place, trainer.state.global_step))
    trainer.run.watch = dataclasses.asdict(watch)
    enough = 0 < trainer.args.stop_overoptimized <= watch.falling
    if enough or watch.falling >= IN_A_ROW:
        trainer.terminal.say(
            f"eval_score rose to {metrics['eval_score']:+.3f} and {name} fell to {metrics[name]:+.3f}, beyond "
            f"chance and in {watch.falling} evaluations in a row: the policy is learning the judge's weaknesses. "
            f"The best by {name} ({watch.best:+.3f}, step {watch.best_step}) is in "
            f"{trainer.readable(trainer.output_dir / 'best')}; a larger kl_coef holds it nearer to the reference"
        )
    if enough:
        trainer.control.should_training_stop = True
