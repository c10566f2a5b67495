"""Act and judge: this rank's samples of the next prompts, and what the reward functions say of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch

from hfpg import preflight
from hfpg.config import GuardStop, require
from hfpg.data import PromptData, decode_completions, order, share
from hfpg.distributed import gather_list, raise_together
from hfpg.learner import Learner
from hfpg.ops.baselines import equal_in_group
from hfpg.report.clock import Clock
from hfpg.rewards import Judge
from hfpg.rewards.judge import Heard, Log, merge_rounds, merge_said
from hfpg.types import Prompts, Samples, Scores, Text, join, plain_text


@contextmanager
def giving_up(judge: ThreadPoolExecutor) -> Iterator[None]:
    """After an exception nothing more is judged than what is in hand: a run that ends has to be saved soon."""
    try:
        yield
    except BaseException:
        judge.shutdown(wait=False, cancel_futures=True)
        raise


def check_samples(samples: Samples, prompts: Prompts, generator: Any) -> Samples:
    """The samples, if they are what a generator has to return (docs/extending.md).

    Raises:
        ConfigError: rows in another order or number, tensors of different shapes, a mask that does not begin with the
            first column: a return is read there, and a completion without a token has nowhere to put its score.
    """
    name = f"generator {getattr(generator, '__name__', type(generator).__name__)}"
    ids, mask = samples.completion_ids, samples.completion_mask
    asked, given = prompts.sample_ids.tolist(), samples.sample_ids.tolist()
    require(
        asked == given and prompts.group_ids.tolist() == samples.group_ids.tolist(),
        f"{name} returned samples {given[:4]}… of the {len(asked)} asked for, {asked[:4]}…; return one sample per row "
        "of the prompts, in their order, with their sample_ids and group_ids",
    )
    shapes = [tuple(x.shape) for x in (mask, samples.sampler_logprobs) if x is not None and x.shape != ids.shape]
    require(
        not shapes and mask.dtype == torch.bool and len(ids) == len(asked),
        f"{name} returned completion_ids of shape {tuple(ids.shape)} with a {mask.dtype} completion_mask of shape "
        f"{tuple(mask.shape)}; masks are bool, and they and sampler_logprobs have the shape of the ids, [B, C]",
    )
    begins = mask[:, 0] if mask.shape[1] else torch.zeros_like(samples.finished)
    bad = (~begins).nonzero()[:, 0].tolist()
    require(
        not bad,
        f"{name} returned {len(bad)} of {len(asked)} completions, rows {bad[:4]}, whose completion_mask is False in "
        "the first column; a completion begins there and has at least one token, its stop token",
    )
    return samples


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
        self.said: dict[str, Any] = {}  # what every rank's judge said beside the scores

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
                    missing = self.args.prompts_per_step - self._informative(join(scores), join(samples))
        self.said = merge_rounds(said)
        self._check_dropped()
        return join(samples), join(scores)

    def _check_dropped(self) -> None:
        """End the run when failures have dropped too many completions; the trainer saves before it does."""
        errors, rows = self.said["errors"], self.said["rows"]
        if len(errors) > self.args.max_dropped * rows:
            raise GuardStop(
                f"{len(errors)} of {rows} completions of this step were dropped, more than max_dropped="
                f"{self.args.max_dropped} allows; the first: {errors[0]}"
            )

    def _draw(self, data: PromptData, position: int, count: int, number: int) -> tuple[Samples, Scores]:
        """Samples and scores of `count` prompts of the stream; `number` counts the rounds of the run."""
        per_prompt = self.algorithm.num_generations
        rows = order(position, count, len(data), self.args.seed)
        mine = share(count, self.accelerator.process_index, self.accelerator.num_processes)
        idle = len(mine) == 0  # fewer prompts than ranks: all of them have to take part, so this one draws in vain
        mine = range(1) if idle else mine
        first = number * self.args.prompts_per_step  # sample ids are unique in a run, whatever epochs were cut short
        ids = torch.arange((first + mine.start) * per_prompt, (first + mine.stop) * per_prompt)
        prompts, samples, scores = self._act_and_judge(data, [rows[i] for i in mine], ids, heard=not idle)
        kept = torch.arange(0 if idle else len(samples))
        return samples.take(kept), self._with_baseline(prompts, scores).take(kept)

    def _act_and_judge(
        self, data: PromptData, rows: Sequence[int], sample_ids: torch.Tensor, heard: bool
    ) -> tuple[Prompts, Samples, Scores]:
        """Sample and judge in `judge_chunks` parts of whole prompts: one is judged while the next is sampled."""
        per_prompt = self.algorithm.num_generations
        parts = torch.arange(len(rows)).tensor_split(min(self.args.judge_chunks, len(rows)))
        drawn: list[tuple[Prompts, Samples]] = []
        with ThreadPoolExecutor(1) as judge, giving_up(judge):
            said = []
            for part in parts:
                ids = sample_ids.view(-1, per_prompt)[part].flatten()
                drawn.append(self.sample(data, [rows[i] for i in part.tolist()], ids, per_prompt))
                preflight.check_behaviour(drawn[-1][1], self.algorithm)
                said.append(judge.submit(self._score, *drawn[-1]) if len(parts) > 1 else drawn[-1])
            answers = [(lambda of=of: of.result() if isinstance(of, Future) else self._score(*of)) for of in said]
            scores = self._settled(answers, heard)
        return join([p for p, _ in drawn]), join([s for _, s in drawn]), scores

    def _informative(self, rows: Scores, samples: Samples) -> int:
        """Prompts, over all ranks, whose completions that count do not all score the same."""
        groups, weights = samples.group_ids, rows.weights
        if getattr(self.algorithm, "truncation", "terminal") == "mask":
            weights = torch.where(samples.finished, weights, 0)
        uneven = groups[~equal_in_group(rows.scores, weights, groups)]
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
                samples = check_samples(self.generator.greedy(self.learner.actor.policy, one), one, self.generator)
            finished, lengths = samples.finished, samples.completion_mask.sum(1)
            judged = self._unheard(one.texts, *self._decoded(one, samples), one.columns)
        else:
            texts: list[Text] = [plain_text(text) for text in one.texts]
            tokens = [row[keep].tolist() for row, keep in zip(one.ids, one.mask, strict=True)]
            judged = self._unheard([""] * len(one), texts, tokens, one.columns)
        found = torch.where(judged.weights > 0, judged.scores, torch.nan)

        def spread(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.repeat_interleave(per_prompt)

        return dataclasses.replace(
            scores,
            baseline_scores=spread(found),
            baseline_finished=spread(finished),
            baseline_lengths=spread(lengths),
        )

    def _unheard(
        self, prompts: list[Text], completions: list[Text], tokens: list[list[int]], columns: dict[str, list]
    ) -> Scores:
        """Scores for a baseline: they enter no metric."""
        said = self.said
        found = self._settled(
            [lambda: (self.judge(prompts, completions, tokens, columns, self.trainer_state()), Log())]
        )
        self.said = said
        return found.to(self.accelerator.device)

    def sample(
        self, data: PromptData, rows: Sequence[int], sample_ids: torch.Tensor, per_prompt: int = 1
    ) -> tuple[Prompts, Samples]:
        """Draw `per_prompt` completions of each of the given rows, by this rank."""
        with self.clock.phase("sample"), self.accelerator.autocast():
            prompts = data.rows(rows, sample_ids, per_prompt, self.accelerator.device)
            return prompts, check_samples(self.generator(self.learner.actor.policy, prompts), prompts, self.generator)

    def judge_samples(self, prompts: Prompts, samples: Samples) -> Scores:
        """Scores of this rank's samples; what else the judge says is kept in `said`."""
        return self._settled([lambda: self._score(prompts, samples)])

    def _settled(self, answers: Sequence[Callable[[], tuple[Scores, Log]]], heard: bool = True) -> Scores:
        """The answers' scores, in order. An error on one rank is raised on all of them; `said` holds every rank's."""
        found, error = [], None
        with self.clock.phase("judge"):
            try:
                found = [answer() for answer in answers]
            except Exception as failure:  # told to every rank before it is raised
                error = failure
            raise_together(self.accelerator, error)
        said = [Heard(len(s.scores), s.by_function, s.extra, log.metrics, log.errors) for s, log in found]
        self.said = merge_said(gather_list(self.accelerator, said if heard else []))
        return join([scores for scores, _ in found])

    def _score(self, prompts: Prompts, samples: Samples) -> tuple[Scores, Log]:
        """What the reward functions say of this rank's samples. No collective in here: it may run in a thread."""
        log, mask = Log(), samples.completion_mask
        scores = self.judge(
            prompts.texts, *self._decoded(prompts, samples), prompts.columns, self.trainer_state(), log
        ).to(self.accelerator.device)
        assert scores.token_scores is not None
        flat = [row[:length] for row, length in zip(scores.token_scores, mask.sum(1).tolist(), strict=True)]
        placed = torch.zeros(mask.shape, device=mask.device).masked_scatter(mask, torch.cat(flat))
        return dataclasses.replace(scores, token_scores=placed), log

    def _decoded(self, prompts: Prompts, samples: Samples) -> tuple[list[Text], list[list[int]]]:
        ids, mask = samples.completion_ids.cpu(), samples.completion_mask.cpu()
        completions = decode_completions(self.tokenizer, samples, prompts.texts)
        return completions, [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
