"""Act and judge: this rank's samples of the next prompts, and what the reward functions say of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from hfpg import preflight
from hfpg.data import PromptData, decode_completions, order, plain_text, share
from hfpg.distributed import gather_list, raise_together
from hfpg.learner import Learner
from hfpg.ops.baselines import equal_in_group
from hfpg.report.clock import Clock
from hfpg.rewards import Judge
from hfpg.rewards.judge import Log, merge_rounds, merge_said
from hfpg.types import Prompts, Samples, Scores, Text, join


class Collector:
    """Draws completions and has them scored.

    Args:
        learner: its policy acts; its accelerator says which share of the prompts is this rank's.
        algorithm: says how many samples a prompt gets, and which extra scores its baseline needs.
        generator: `__call__(policy, prompts) -> Samples`.
        judge: the reward functions.
        tokenizer: decodes completions for them.
        clock: counts the seconds of `sample` and `judge`.
        trainer_state: what reward functions get as `trainer_state`.
    """

    def __init__(
        self,
        learner: Learner,
        algorithm: Any,
        generator: Any,
        judge: Judge,
        tokenizer: Any,
        clock: Clock,
        trainer_state: Callable[[], Any],
    ):
        self.learner, self.algorithm, self.generator, self.judge = learner, algorithm, generator, judge
        self.tokenizer, self.clock, self.trainer_state = tokenizer, clock, trainer_state
        self.accelerator, self.args = learner.accelerator, learner.args
        self.rounds = 1 + getattr(algorithm, "resample_rounds", 0)
        self.taken = self.args.prompts_per_step  # prompts of the stream that the step in hand has used
        self.said: dict[str, dict[str, Any]] = {}  # what every rank's judge said beside the scores

    def collect(self, data: PromptData, position: int, step: int) -> tuple[Samples, Scores]:
        """Samples and scores of the prompts at `position` of the stream; pure but for `taken` and `said`.

        An algorithm with `resample_rounds` gets more prompts in place of those whose completions all score the same.
        """
        samples: list[Samples] = []
        scores: list[Scores] = []
        said, missing, self.taken = [], self.args.prompts_per_step, 0
        for number in range(self.rounds):
            if missing > 0:
                drawn = self._draw(data, position + self.taken, missing, step * self.rounds + number)
                samples.append(drawn[0])
                scores.append(drawn[1])
                said.append(self.said)
                self.taken += missing
                if number + 1 < self.rounds:
                    missing = self.args.prompts_per_step - self._informative(join(scores), join(samples).group_ids)
        self.said = merge_rounds(said)
        return join(samples), join(scores)

    def _draw(self, data: PromptData, position: int, count: int, number: int) -> tuple[Samples, Scores]:
        """Samples and scores of `count` prompts of the stream; `number` counts the rounds of the run."""
        per_prompt = self.algorithm.num_generations
        rows = order(position, count, len(data), self.args.seed)
        mine = share(count, self.accelerator.process_index, self.accelerator.num_processes)
        idle = len(mine) == 0  # fewer prompts than ranks: all of them have to take part, so this one draws in vain
        mine = range(1) if idle else mine
        first = number * self.args.prompts_per_step  # sample ids are unique in a run, whatever epochs were cut short
        ids = torch.arange((first + mine.start) * per_prompt, (first + mine.stop) * per_prompt)
        prompts, samples = self.sample(data, [rows[i] for i in mine], ids, per_prompt)
        preflight.check_behaviour(samples, self.algorithm)
        scores = self._with_baseline(prompts, self.judge_samples(prompts, samples, heard=not idle))
        kept = torch.arange(0 if idle else len(samples))
        return samples.take(kept), scores.take(kept)

    def _informative(self, rows: Scores, groups: torch.Tensor) -> int:
        """Prompts, over all ranks, whose completions do not all score the same."""
        uneven = groups[~equal_in_group(rows.scores, rows.weights, groups)]
        return sum(gather_list(self.accelerator, [len(uneven.unique())]))

    def _with_baseline(self, prompts: Prompts, scores: Scores) -> Scores:
        """With the scores that the algorithm's baseline asks for: of greedy completions, or of the prompts."""
        kind, per_prompt = getattr(self.algorithm, "extra_baseline", None), self.algorithm.num_generations
        if kind is None:
            return scores
        one = prompts.take(torch.arange(0, len(prompts), per_prompt))
        finished = lengths = None
        if kind == "greedy":
            with self.clock.phase("sample"), self.accelerator.autocast():
                samples = self.generator.greedy(self.learner.actor.policy, one)
            finished, lengths = samples.finished, samples.completion_mask.sum(1)
            judged = self._judge(one.texts, *self._decoded(one, samples), one.columns, Log())
        else:
            texts: list[Text] = [plain_text(text) for text in one.texts]
            tokens = [row[keep].tolist() for row, keep in zip(one.ids, one.mask, strict=True)]
            judged = self._judge([""] * len(one), texts, tokens, one.columns, Log())
        found = torch.where(judged.weights > 0, judged.scores, torch.nan)

        def spread(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.repeat_interleave(per_prompt)

        return dataclasses.replace(
            scores,
            baseline_scores=spread(found),
            baseline_finished=spread(finished),
            baseline_lengths=spread(lengths),
        )

    def sample(
        self, data: PromptData, rows: Sequence[int], sample_ids: torch.Tensor, per_prompt: int = 1
    ) -> tuple[Prompts, Samples]:
        """Draw `per_prompt` completions of each of the given rows, by this rank."""
        with self.clock.phase("sample"), self.accelerator.autocast():
            prompts = data.rows(rows, sample_ids, per_prompt, self.accelerator.device)
            return prompts, self.generator(self.learner.actor.policy, prompts)

    def judge_samples(self, prompts: Prompts, samples: Samples, heard: bool = True) -> Scores:
        """Scores of this rank's samples, kept in `said` if `heard`. An error on one rank is raised on all of them."""
        log = Log()
        scores = self._judge(prompts.texts, *self._decoded(prompts, samples), prompts.columns, log)
        said = [(len(samples), scores.by_function, scores.extra, log.metrics)]
        self.said = merge_said(gather_list(self.accelerator, said if heard else []))
        return scores

    def _decoded(self, prompts: Prompts, samples: Samples) -> tuple[list[Text], list[list[int]]]:
        ids, mask = samples.completion_ids.cpu(), samples.completion_mask.cpu()
        completions = decode_completions(self.tokenizer, ids, mask, prompts.texts)
        return completions, [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]

    def _judge(
        self, prompts: list[Text], completions: list[Text], tokens: list[list[int]], columns: dict[str, list], log: Log
    ) -> Scores:
        """What the reward functions say; an error on one rank is raised on all of them."""
        with self.clock.phase("judge"):
            scores, error = None, None
            try:
                scores = self.judge(prompts, completions, tokens, columns, self.trainer_state(), log)
            except Exception as failure:  # told to every rank before it is raised
                error = failure
            raise_together(self.accelerator, error)
            assert scores is not None  # or the error above was raised
            return scores.to(self.accelerator.device)
