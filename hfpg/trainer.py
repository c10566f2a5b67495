"""PolicyGradientTrainer: the page. `train` reads as the method; the verbs that it calls are public."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hfpg import hub, preflight
from hfpg.checkpoint import RunState, find_checkpoint, load_checkpoint, rotate, save_checkpoint
from hfpg.config import TrainConfig, require
from hfpg.data import PromptData, decode_completions, order, share
from hfpg.distributed import gather_list, gather_rows, launch, raise_together
from hfpg.events import Events
from hfpg.generation.hf import HFGenerator
from hfpg.learner import Learner
from hfpg.models import ActorCritic, Reference, save_actor_critic
from hfpg.ops.returns import token_rewards
from hfpg.pretrained import is_peft, load_policy
from hfpg.report.card import CardFacts, model_card
from hfpg.report.metrics import describe, distinct_2, explained_variance, top_bigram_share
from hfpg.report.recorder import Recorder, versions
from hfpg.report.terminal import Terminal
from hfpg.rewards import Judge
from hfpg.rewards.judge import Log
from hfpg.types import Rollout, Samples, Scores, Text


logger = logging.getLogger(__name__)


class PolicyGradientTrainer:
    """Trains a causal LM by policy gradients on what reward functions say of its own completions.

    Args:
        model: Hub id, folder, PreTrainedModel or PeftModel (the latter two are trained in place).
        algorithm: a policy-gradient method, such as `PPO(kl_coef=0.05)` from `hfpg.algorithms`.
        reward_funcs: callable, "file.py:name", "package.module:name", Hub id or folder of a classifier, or a list.
        train_dataset: `datasets.Dataset` or list of dicts with a prompt column; other columns reach the rewards.
        eval_dataset: held-out prompts for `evaluate`.
        args: settings of the run.
        processing_class: tokenizer of the policy; default: the one saved with the model.
        ref_model: what KL is measured against; default: the model exactly as it was passed.
        peft_config: wrap the model in an adapter and train only that.
        reward_processing_classes: tokenizers of classifiers given as modules; default: each one's own.
        callbacks: transformers.TrainerCallback classes or instances.
        generator: `__call__(policy, prompts) -> Samples`; default: transformers `generate`, keyed.
    Raises:
        ConfigError: anything wrong with settings, data, rewards or model, as far as possible before the model loads.
    """

    def __init__(
        self,
        model: Any,
        algorithm: Any,
        reward_funcs: Any,
        train_dataset: Any,
        eval_dataset: Any = None,
        args: TrainConfig | None = None,
        processing_class: Any = None,
        ref_model: Any = None,
        peft_config: Any = None,
        reward_processing_classes: Any = None,
        callbacks: Sequence[TrainerCallback | type[TrainerCallback]] | None = None,
        generator: Any = None,
    ):
        args = TrainConfig() if args is None else args
        preflight.check_namespace(algorithm)
        self.accelerator = launch(args)
        preflight.check_batch(args, algorithm, self.accelerator.num_processes)
        if args.push_to_hub:
            preflight.check_hub(args, self.accelerator)
        config = preflight.load_config(model, args)
        self.processing_class = preflight.load_tokenizer(model, processing_class, args)
        self.train_data = self._data(train_dataset, args, config)
        preflight.check_data(self.train_data, args)
        self.eval_data = None if eval_dataset is None else self._data(eval_dataset, args, config)
        preflight.check_eval(self.eval_data, self.accelerator.num_processes)
        self.judge = Judge(reward_funcs, args.reward_weights, reward_processing_classes, self.accelerator.device)
        preflight.dry_call(self.judge, self.train_data, self.processing_class)
        self.output_dir = preflight.prepare_output_dir(args, algorithm, model, self.accelerator)
        self.args = args = dataclasses.replace(args, output_dir=str(self.output_dir))
        find_checkpoint(args.resume_from_checkpoint, self.output_dir)  # refuses a path that is no checkpoint

        load: dict[str, Any] = dict(revision=args.model_revision, trust_remote_code=args.trust_remote_code)
        policy = load_policy(model, peft_config=peft_config, **load).to(self.accelerator.device)
        actor = ActorCritic(policy, algorithm.value)
        preflight.check_vocabulary(self.processing_class, actor.vocabulary)
        self.reference = Reference(actor, ref_model, **load) if algorithm.kl_coef > 0 else None
        self.algorithm = algorithm
        self.algorithm_state = algorithm.init()
        self.learner = Learner(actor, self.accelerator, args, self.reference, on_event=self._event)
        self.generator = generator or HFGenerator(
            self.processing_class,
            seed=args.seed,
            max_completion_length=args.max_completion_length,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            stop_token_ids=args.stop_token_ids,
            stop_strings=args.stop_strings,
            generation_kwargs=args.generation_kwargs,
            max_tokens=4 * args.max_tokens_per_micro_batch,
        )
        self.events = Events(
            args,
            callbacks,
            model=policy,
            processing_class=self.processing_class,
            learner=self.learner,
            main=self.accelerator.is_main_process,
        )
        self.run = RunState()
        self.model_name = (
            model if isinstance(model, str) else getattr(config, "_name_or_path", "") or type(policy).__name__
        )
        self.recorder = Recorder(self.output_dir, self.accelerator, trackers=args.report_to != ["none"])
        self.terminal = Terminal(args.max_steps, plain=args.disable_tqdm, quiet=not self.accelerator.is_main_process)
        self.evaluations: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}
        self._timer: dict[str, float] = {}
        self.seconds = 0.0  # spent in the loop
        self._logged: dict[str, float] = {}
        self._saved_step = -1
        self._updating = False

    def _data(self, dataset: Any, args: TrainConfig, config: Any) -> PromptData:
        return PromptData(
            dataset,
            self.processing_class,
            prompt_column=args.prompt_column,
            max_completion_length=args.max_completion_length,
            context=preflight.context_length(config),
            overlong=args.overlong_prompts,
        )

    # ── the page ───────────────────────────────────────────────────────────────────────────────────────────────────

    def train(self, resume_from_checkpoint: str | bool | None = None) -> dict[str, float]:
        """Turn the page until `max_steps`; returns the last step's metrics.

        Args:
            resume_from_checkpoint: True: the newest checkpoint of output_dir; or a path; default: as `args` says.
        """
        args, metrics = self.args, {}
        self._begin(resume_from_checkpoint)
        with self._nothing_lost():
            while self.state.global_step < args.max_steps and not self.control.should_training_stop:
                self.events.begin_step(self.epoch)
                samples, scores = self.collect()  # act and judge
                rollout = self.rescore(samples, scores)  # old and reference log-probs, values; all rows on every rank
                metrics = self.step(rollout)  # credit and update
                if self.events.end_step(self.epoch):  # a callback ends the epoch
                    self.run.position += -self.run.position % len(self.train_data)
                self.report(scores, rollout, metrics)
                self.evaluate_if_due()
                self.checkpoint_if_due()
        self._end()
        return metrics

    def step(self, rollout: Rollout) -> dict[str, float]:
        """Credit and update: token rewards, advantages, optimizer steps. Changes the policy."""
        with self._timed("update"):
            log_ratio = None if rollout.ref_logprobs is None else rollout.old_logprobs - rollout.ref_logprobs
            rewards = token_rewards(rollout.scores, rollout.completion_mask, log_ratio, self.kl_coef)
            estimates, state = self.algorithm.estimate(rollout, rewards, self.algorithm_state)
            self._updating = True
            metrics, self.algorithm_state = self.algorithm.update(self.learner, rollout, estimates, state)
            metrics["learning_rate"] = self.learner.learning_rate
            self.learner.end_turn()
            self._updating = False
        if estimates.returns is not None:
            metrics["explained_variance"] = explained_variance(rollout, estimates)
        return metrics

    def collect(self) -> tuple[Samples, Scores]:
        """This rank's samples of the next prompts, and what the judge says of them."""
        count, per_prompt = self.args.prompts_per_step, self.algorithm.num_generations
        rows = order(self.run.position, count, len(self.train_data), self.args.seed)
        mine = share(count, self.accelerator.process_index, self.accelerator.num_processes)
        first = self.run.samples_drawn
        ids = torch.arange(first + mine.start * per_prompt, first + mine.stop * per_prompt)
        samples, texts, columns = self.sample(self.train_data, [rows[i] for i in mine], ids, per_prompt)
        scores = self.judge_samples(samples, texts, columns)
        self.run.position += count
        self.run.samples_drawn += count * per_prompt
        return samples, scores

    def sample(
        self, data: PromptData, rows: Sequence[int], sample_ids: torch.Tensor, per_prompt: int = 1
    ) -> tuple[Samples, list[Text], dict[str, list]]:
        """Draw `per_prompt` completions of each of the given rows; returns samples, prompt texts and columns."""
        with self._timed("sample"), self.accelerator.autocast():
            prompts = data.rows(rows, sample_ids, per_prompt, self.accelerator.device)
            return self.generator(self.learner.actor.policy, prompts), prompts.texts, prompts.columns

    def judge_samples(self, samples: Samples, texts: list[Text], columns: dict[str, list]) -> Scores:
        """Scores of samples. An error on one rank is raised on all of them."""
        with self._timed("judge"):
            ids, mask = samples.completion_ids.cpu(), samples.completion_mask.cpu()
            completions = decode_completions(self.processing_class, ids, mask, texts)
            tokens = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
            log, scores, error = Log(), None, None
            try:
                scores = self.judge(texts, completions, tokens, columns, self.state, log)
            except Exception as failure:  # told to every rank before it is raised
                error = failure
            raise_together(self.accelerator, error)
            assert scores is not None  # or the error above was raised
            self._logged = {name: sum(values) / len(values) for name, values in log.metrics.items()}
            return scores.to(self.accelerator.device)

    def rescore(self, samples: Samples, scores: Scores) -> Rollout:
        """The Rollout: old and reference log-probs, entropy and values by the forward that trains, on every rank."""
        with self._timed("rescore"):
            old, spread, ref, values = self.learner.score(samples)
            mine = Rollout(
                **{f.name: getattr(samples, f.name) for f in dataclasses.fields(samples)},
                scores=scores.scores,
                weights=scores.weights,
                old_logprobs=old,
                entropy=spread,
                ref_logprobs=ref,
                values=values,
            )
            return gather_rows(self.accelerator, mine)

    @torch.no_grad()
    def evaluate(self, dataset: Any = None) -> dict[str, float]:
        """One completion of each held-out prompt, with the same random numbers at every call and for every seed.

        Returns `eval_*` metrics: those of a rollout (see docs/glossary.md), `eval_distinct_2` (token bigrams) and
        `eval_top_bigram_share` (share of texts with the most frequent word bigram).
        """
        data = self.eval_data if dataset is None else self._data(dataset, self.args, self.learner.actor.policy.config)
        require(data is not None, "evaluate needs held-out prompts; give the trainer an eval_dataset")
        assert data is not None
        mine = share(len(data), self.accelerator.process_index, self.accelerator.num_processes)
        ids = -1 - torch.arange(mine.start, mine.stop)  # negative: never the key of a training sample
        samples, texts, columns = self.sample(data, list(mine), ids)
        scores = self.judge_samples(samples, texts, columns)
        rollout = self.rescore(samples, scores)
        by_function = {n: gather_list(self.accelerator, v) for n, v in scores.by_function.items()}
        shown = self._texts(rollout.take(torch.argsort(rollout.sample_ids, descending=True)))
        found = describe(rollout, by_function)
        found["distinct_2"] = distinct_2(
            [row[keep].tolist() for row, keep in zip(rollout.completion_ids, rollout.completion_mask, strict=True)]
        )
        found["top_bigram_share"] = top_bigram_share([completion for _, completion, _ in shown])[1]
        metrics = {f"eval_{name}": value for name, value in found.items()}
        self.evaluations.append({"step": self.state.global_step, "metrics": metrics, "shown": shown})
        self.recorder.metrics(self.state.global_step, metrics)
        self.events.evaluated(metrics)
        return metrics

    # ── watching ───────────────────────────────────────────────────────────────────────────────────────────────────

    def report(self, scores: Scores, rollout: Rollout, metrics: dict[str, float]) -> None:
        """Log the step and show it; now and then show completions."""
        step = self.state.global_step
        by_function = {n: gather_list(self.accelerator, v) for n, v in scores.by_function.items()}
        tokens = int(rollout.completion_mask.sum())
        self.state.num_input_tokens_seen += tokens
        seconds = sum(self._timer.values())
        self.seconds += seconds
        times = {f"seconds/{name}": value for name, value in self._timer.items()}
        self._timer = {}
        metrics.update(describe(rollout, by_function), **self._logged, **times)
        metrics.update(kl_coef=self.kl_coef, epoch=self.epoch)
        metrics.update(num_tokens=self.state.num_input_tokens_seen, tokens_per_second=tokens / max(seconds, 1e-9))
        self.terminal.step(step, metrics)
        if self.control.should_log:
            self.recorder.metrics(step, metrics)
            self.events.logged(metrics)
        if self.args.completions_steps and step % self.args.completions_steps == 0:
            self._show_completions(step, scores, rollout)

    def _show_completions(self, step: int, scores: Scores, rollout: Rollout) -> None:
        rows = self._texts(rollout)
        extra = {name: gather_list(self.accelerator, values) for name, values in scores.extra.items()}
        self.recorder.completions(
            [
                {"step": step, "prompt": prompt, "completion": completion, "score": score}
                | {name: values[i] for name, values in extra.items()}
                for i, (prompt, completion, score) in enumerate(rows)
            ]
        )
        if self.args.num_completions_to_print:
            shown = rows[:: max(1, len(rows) // self.args.num_completions_to_print)]
            self.terminal.completions(f"step {step}", shown[: self.args.num_completions_to_print])

    def _texts(self, rollout: Rollout) -> list[tuple[str, str, float]]:
        """(prompt, completion, score) of every row, decoded."""

        def decode(ids: torch.Tensor, mask: torch.Tensor) -> list[str]:
            rows = [row[keep].tolist() for row, keep in zip(ids.cpu(), mask.cpu(), strict=True)]
            return self.processing_class.batch_decode(rows, skip_special_tokens=True)

        prompts = decode(rollout.prompt_ids, rollout.prompt_mask)
        completions = decode(rollout.completion_ids, rollout.completion_mask)
        return list(zip(prompts, completions, rollout.scores.tolist(), strict=True))

    def evaluate_if_due(self) -> None:
        """Evaluate when a callback or `eval_steps` asks for it."""
        if self.control.should_evaluate and self.eval_data is not None:
            metrics = self.evaluate()
            self._timer = {}
            self.terminal.say(f"evaluation at step {self.state.global_step}: score {metrics['eval_score']:+.3f}")

    # ── keeping ────────────────────────────────────────────────────────────────────────────────────────────────────

    def checkpoint_if_due(self) -> None:
        """Save when a callback or `save_steps` asks for it, and at the last step."""
        done = self.state.global_step >= self.args.max_steps or self.control.should_training_stop
        if self.control.should_save or done:
            self.save_checkpoint()

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add a transformers callback."""
        self.events.add(callback)

    def save_checkpoint(self) -> None:
        """Write checkpoint-N now."""
        if self.accelerator.is_main_process and self._saved_step != self.state.global_step:
            self._write_checkpoint()
        self._saved_step = self.state.global_step
        self.accelerator.wait_for_everyone()
        self.events.fire("on_save")

    def _write_checkpoint(self) -> Path:
        self.run.algorithm = dataclasses.asdict(self.algorithm_state)
        config = {**dataclasses.asdict(self.algorithm), **self.args.to_dict()}
        path = save_checkpoint(self.output_dir, self.learner, self.processing_class, self.state, self.run, config)
        rotate(self.output_dir, self.args.save_total_limit)
        return path

    def save_model(self, output_dir: str | Path | None = None, *, repo_id: str | None = None) -> Path:
        """A plain Hugging Face folder of the policy (or adapter), its tokenizer, the value head, and a model card.

        Default: the run's output_dir. It loads with `AutoModelForCausalLM.from_pretrained` and `pipeline`.
        """
        folder = self.output_dir if output_dir is None else Path(output_dir)
        if self.accelerator.is_main_process:
            save_actor_critic(self.learner.actor, folder)
            self.processing_class.save_pretrained(folder)
            (folder / "README.md").write_text(self.model_card(repo_id), encoding="utf-8")
        self.accelerator.wait_for_everyone()
        return folder

    def model_card(self, repo_id: str | None = None) -> str:
        """The card, written from what was measured: the first and the last evaluation, and the run's settings."""
        first, last = (self.evaluations[i]["metrics"] if self.evaluations else {} for i in (0, -1))
        found = versions()
        return model_card(
            CardFacts(
                model_name=repo_id or self.output_dir.name,
                base_model=None if Path(self.model_name).exists() else self.model_name,
                is_adapter=is_peft(self.learner.actor.policy),
                algorithm=type(self.algorithm).__name__,
                algorithm_fields=dataclasses.asdict(self.algorithm),
                rewards=self.judge.names,
                steps=self.state.global_step,
                seed=self.args.seed,
                metrics={name: (first[name], last[name]) for name in last if len(self.evaluations) > 1},
                eval_prompts=None if self.eval_data is None else len(self.eval_data),
                config=self.args.to_dict(),
                versions=found,
                hfpg_version=found["hfpg"],
                command=" ".join(sys.argv),
                seconds=self.seconds,
                value_head=self.learner.actor.value_kind,
            )
        )

    def push_to_hub(
        self, repo_id: str | None = None, *, private: bool | None = None, revision: str | None = None
    ) -> str:
        """Save the model and push it in one commit; returns the address. What is pushed: see `hfpg.hub`.

        Raises:
            HubError: no login, a bad name, a Hub that does not answer. The saved folder is intact; push again later.
        """
        repo = repo_id or self.args.hub_model_id
        require(repo is not None, "push_to_hub needs a repository, such as trainer.push_to_hub('me/gpt2-positive')")
        assert repo is not None
        folder = self.save_model(self.output_dir / "final", repo_id=repo)
        self.events.fire("on_push_begin")
        private = self.args.hub_private_repo if private is None else private
        url, error = "", None
        if self.accelerator.is_main_process:
            try:
                url = hub.push_folder(folder, repo, private=private, revision=revision)
            except hub.HubError as failure:
                error = failure
        raise_together(self.accelerator, error)
        return url

    def summary(self, saved: Path, shown: int = 6) -> None:
        """Show the same prompts at the first and the last evaluation, the gain, and how to load what was saved."""
        self.terminal.summary(self.evaluations[0], self.evaluations[-1], str(saved), str(self.output_dir), shown)

    # ── around the loop ────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def state(self) -> Any:
        """transformers.TrainerState: `global_step` counts turns of the page."""
        return self.events.state

    @property
    def control(self) -> Any:
        """transformers.TrainerControl, as the callbacks have set it."""
        return self.events.control

    @property
    def epoch(self) -> float:
        """How often the stream of prompts has gone through the data set."""
        return self.run.position / len(self.train_data)

    @property
    def kl_coef(self) -> float:
        """β now."""
        return float(self.algorithm_state.kl_coef)

    def _event(self, name: str) -> None:
        self.events.fire(name)

    def _begin(self, resume: str | bool | None) -> None:
        path = find_checkpoint(self.args.resume_from_checkpoint if resume is None else resume, self.output_dir)
        if path is not None:
            self.events.state, self.run = load_checkpoint(path, self.learner)
            self.algorithm_state = dataclasses.replace(self.algorithm.init(), **self.run.algorithm)
            self.recorder.rewind(self.state.global_step)
            self._saved_step = self.state.global_step
        if self.recorder.trackers:
            self.accelerator.init_trackers(self.args.run_name or self.output_dir.name)
        self.facts.setdefault("model", self.model_name)
        self.recorder.run_file(
            {
                "seed": self.args.seed,
                "algorithm": {"name": type(self.algorithm).__name__, **dataclasses.asdict(self.algorithm)},
                "config": self.args.to_dict(),
                "rewards": self.judge.names,
                "processes": self.accelerator.num_processes,
                "threads": torch.get_num_threads(),
                "device": str(self.accelerator.device),
                "resumed_from": None if path is None else path.name,
                **self.facts,
            }
        )
        self.events.begin_training(self.args.max_steps)
        if self.args.eval_on_start and self.eval_data is not None and self.state.global_step == 0:
            self.evaluate()
        self._timer = {}
        self.terminal.start(self.state.global_step)

    def _end(self) -> None:
        self.terminal.stop()
        self.events.end_training()
        if self.recorder.trackers:
            self.accelerator.end_training()
        if self.args.push_to_hub:
            url = self.push_to_hub()
            self.terminal.say(f"pushed to {url}")

    @contextlib.contextmanager
    def _nothing_lost(self) -> Iterator[None]:
        """Save what has been trained before an error or Ctrl-C ends the run."""
        try:
            yield
        except BaseException:
            self.terminal.stop()
            unsaved = self.state.global_step > max(self._saved_step, 0)
            if self.accelerator.is_main_process and (unsaved or self._updating):
                if self._updating:  # between optimizer steps: no exact place to resume from, but the weights are kept
                    save_actor_critic(self.learner.actor, self.output_dir / "interrupted")
                    where = self.output_dir / "interrupted"
                else:
                    where = self._write_checkpoint()
                self.terminal.say(f"stopped at step {self.state.global_step}; what was trained is saved in {where}")
            raise

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._timer[name] = self._timer.get(name, 0.0) + time.perf_counter() - start
