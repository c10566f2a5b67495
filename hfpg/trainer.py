"""PolicyGradientTrainer: the page. `train` reads as the method; the verbs that it calls are public."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from hfpg import evaluation, hub, preflight, session
from hfpg.arguments import check_arguments, named_or_made
from hfpg.checkpoint import CheckpointError, RunState
from hfpg.collector import Collector
from hfpg.config import TrainConfig, require
from hfpg.data import PromptData, step_ends
from hfpg.distributed import launch, raise_together, same_everywhere
from hfpg.events import Events
from hfpg.fast.kernels import check_liger, use_liger
from hfpg.files import in_place_of
from hfpg.frozen import freeze_below
from hfpg.generation.hf import HFGenerator
from hfpg.guards import Guards
from hfpg.interrupt import Interrupt
from hfpg.learner import Learner
from hfpg.models import ActorCritic, Reference
from hfpg.origin import origin
from hfpg.pretrained import base_of_adapter, causal_lm, is_peft, load_config, load_policy
from hfpg.replay import Replay
from hfpg.report.card import CardFacts, loadable, model_card, readable
from hfpg.report.clock import Clock
from hfpg.report.command import command_line
from hfpg.report.completions import Shown, records, shown
from hfpg.report.floor import Floor
from hfpg.report.metrics import describe, explained_variance
from hfpg.report.recorder import Recorder, versions
from hfpg.report.terminal import Terminal, signed
from hfpg.rescorer import Rescorer
from hfpg.resume import evaluation_due, write_checkpoint
from hfpg.rewards import Judge
from hfpg.rewards.judge import beside
from hfpg.saving import find_value_head, load_value_head, save_actor_critic
from hfpg.text_config import context_length
from hfpg.types import Prompts, Rollout, Samples, Scores


logger = logging.getLogger(__name__)

MOST_FAILED_SAVES = 3  # in a row, before a run ends


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
        self.here = Path.cwd()
        args = check_arguments(algorithm, args, callbacks, peft_config, generator)
        model, ref_model = named_or_made(model), named_or_made(ref_model, "ref_model", optional=True)
        self.accelerator = launch(args)
        self.algorithm, self.args = algorithm, args
        self._check_settings()
        self._pretrained: dict[str, Any] = dict(revision=args.model_revision, trust_remote_code=args.trust_remote_code)
        self._read_data(model, processing_class, train_dataset, eval_dataset)
        self._meet_judge(reward_funcs, reward_processing_classes)
        require(ref_model is None or algorithm.kl_coef > 0, "ref_model is given, but kl_coef=0 never asks it anything")
        with self._choose_folder(model):
            actor = self._load(model, peft_config)
            self.reference = Reference(actor, ref_model, self.output_dir) if algorithm.kl_coef > 0 else None
            self.origin = origin(actor.policy, self.reference, self.train_data.encoded, self.judge.names)
            self.algorithm_state, self.run = algorithm.init(), RunState()
            self._connect(actor, generator, callbacks)
        self.evaluations: list[dict[str, Any]] = []  # the first one, and those since the run was resumed
        self.saved_step: float = -1  # infinite while a checkpoint is loaded
        self.unrecorded: tuple[Rollout, dict[str, float]] | None = None  # a step that no file tells of yet
        self.claimed = False  # the run's folder is ours to write in: fresh, or resumed
        self.updating = False
        self.failed_saves = 0  # in a row

    # ── the page ───────────────────────────────────────────────────────────────────────────────────────────────────

    def train(self, resume_from_checkpoint: str | bool | None = None) -> dict[str, float]:
        """Turn the page until `max_steps`; returns the last step's metrics.

        Args:
            resume_from_checkpoint: True: the newest checkpoint of output_dir; or a path; default: as `args` says.
        """
        args, metrics = self.args, {}
        alone = preflight.alone(self.output_dir, self.accelerator)
        with alone, self.interrupt.saving_first(partial(session.save_before_the_end, self)):
            session.begin(self, resume_from_checkpoint)
            while self.state.global_step < args.max_steps and not self.control.should_training_stop:
                self.events.begin_step(self.epoch)
                samples, scores = self.collect()  # act and judge
                rollout = self.rescore(samples, scores)  # old and reference log-probs, values; all rows on every rank
                with self.interrupt.held():  # a signal waits for the end of an update
                    metrics = self.step(rollout)  # credit and update
                    self.end_turn(rollout, metrics)
                self.evaluate_if_due()
                self.checkpoint_if_due()
        session.end(self, stepped=bool(metrics))
        return metrics

    def step(self, rollout: Rollout) -> dict[str, float]:
        """Credit and update: token rewards, advantages, optimizer steps. Changes the policy; one turn is done."""
        kl_coef = self.kl_coef
        together, seen = self._with_stored(rollout)
        with self.clock.phase("update"):
            longest = self.args.max_completion_length
            used, rewards, state = self.algorithm.rewards(together, self.algorithm_state, longest)
            estimates, state = self.algorithm.estimate(used, rewards, state)
            self.updating = True
            metrics, self.algorithm_state = self.algorithm.update(self.learner, used, estimates, state)
            metrics |= {"learning_rate": self.learner.learning_rate, "kl_coef": kl_coef} | seen
            self.learner.end_turn()
            self.state.global_step += 1
            self.run.position += self.collector.taken
            self.replay.turn(rollout)
            self.updating, self.unrecorded = False, (rollout, metrics)
        if estimates.returns is not None:
            metrics["explained_variance"] = explained_variance(used, estimates)
        left_out = bool(rollout.weights.any()) and not bool(used.weights.any())  # all scores equal: nothing to learn
        failed = metrics.get("skipped_steps", 0.0) or metrics.get("kl_stops", 0.0)
        self.guards.update(bool(failed) and not metrics["optimizer_steps"] and not left_out)
        return metrics

    def _with_stored(self, rollout: Rollout) -> tuple[Rollout, dict[str, float]]:
        """The rollout, with what μ said of it where the algorithm corrects for μ, and with stored rollouts."""
        if getattr(self.algorithm, "off_policy", "none") == "none":
            return rollout, {}
        rollout = dataclasses.replace(rollout, behaviour_logprobs=rollout.sampler_logprobs)
        together, metrics = self.replay.add_to(rollout, self.rescorer.again)
        return together, metrics

    def collect(self) -> tuple[Samples, Scores]:
        """This rank's samples of the next prompts, and what the judge says of them. The same again until `step`."""
        return self.collector.collect(self.train_data, self.run.position, self.state.global_step)

    def sample(
        self, data: PromptData, rows: Sequence[int], sample_ids: torch.Tensor, per_prompt: int = 1
    ) -> tuple[Prompts, Samples]:
        """Draw `per_prompt` completions of each of the given rows, by this rank."""
        return self.collector.sample(data, rows, sample_ids, per_prompt)

    def judge_samples(self, prompts: Prompts, samples: Samples) -> Scores:
        """Scores of this rank's samples. An error on one rank is raised on all of them."""
        return self.collector.judge_samples(prompts, samples)

    def rescore(self, samples: Samples, scores: Scores) -> Rollout:
        """The Rollout: old and reference log-probs, entropy and values, on every rank; see `hfpg.rescorer`."""
        rollout = self.rescorer.rollout(samples, scores)
        self.guards.policy(rollout)
        return rollout

    def evaluate(self, dataset: Any = None) -> dict[str, float]:
        """One completion of each held-out prompt, with the same random numbers at every call and for every seed.

        Returns `eval_*` metrics: those of a rollout (see docs/glossary.md), `eval_distinct_2` (token bigrams) and
        `eval_top_bigram_share` (share of texts with the most frequent word bigram). Of another `dataset` than the
        run's own they are returned and nothing else: not recorded, and no callback hears of them.
        """
        return evaluation.evaluate(self, dataset)

    # ── watching ───────────────────────────────────────────────────────────────────────────────────────────────────

    def end_turn(self, rollout: Rollout, metrics: dict[str, float]) -> None:
        """Callbacks hear that the step is done; then it is reported."""
        try:
            self.events.end_step(self.epoch)
        finally:
            if self.control.should_epoch_stop:  # a callback ends the epoch: on to the next
                self.run.position += -self.run.position % len(self.train_data)
        self.report(rollout, metrics)

    def report(self, rollout: Rollout, metrics: dict[str, float]) -> None:
        """Log the step and show it; now and then show completions. Adds what it finds to `metrics`."""
        rows = self.record(rollout, metrics)
        step, count = self.state.global_step, self.args.num_completions_to_print
        self.guards.first_scores(rollout, self.processing_class)
        if self.control.should_log or self.terminal.live is not None:
            self.terminal.step(step, metrics)
        if self.control.should_log:
            self.events.fire("on_log", logs=metrics)
        if rows and count:
            self.terminal.completions(f"step {step}", rows[:: max(1, len(rows) // count)][:count])
        self.guards.scores(self.collector.said)
        self.guards.changes()

    def record(self, rollout: Rollout, metrics: dict[str, float]) -> list[Shown]:
        """Add what the step was like to `metrics` and write it down, before any code of others may fail.

        Returns the completions where they are due.
        """
        step = self.state.global_step
        tokens = int(rollout.completion_mask.sum())
        self.state.num_input_tokens_seen += tokens
        times = self.clock.read()
        seconds = sum(times.values())
        self.run.seconds += seconds
        metrics.update(describe(rollout, self.collector.said["by_function"]))
        metrics.update({f"seconds/{name}": value for name, value in times.items()})
        metrics["dropped"] = len(self.collector.said["errors"]) / max(self.collector.said["rows"], 1)
        metrics.update(self.floor.metrics(rollout, seconds))
        metrics["epoch"] = self.epoch
        metrics.update(num_tokens=self.state.num_input_tokens_seen, tokens_per_second=tokens / max(seconds, 1e-9))
        metrics.update(beside(metrics, self.collector.said["metrics"]))
        self.unrecorded, rows = None, []  # what fails from here on is not written twice
        if self.control.should_log:
            self.events.log(metrics)
        if self.args.completions_steps and step % self.args.completions_steps == 0:
            rows = shown(rollout, self.processing_class)
            self.recorder.completions(records(step, rows, self.collector.said["extra"]))
        if self.control.should_log:
            self.recorder.metrics(step, metrics)
        return rows

    def evaluate_if_due(self) -> None:
        """Evaluate when a callback or `eval_steps` asks for it."""
        self.events.agree()
        self.run.evaluation_due = evaluation_due(self)
        if self.run.evaluation_due:
            metrics = self.evaluate()
            self.run.evaluation_due = False
            self.terminal.say(
                f"evaluation at step {self.state.global_step}: score {signed(metrics['eval_score'], '+.3f')}"
            )

    # ── keeping ────────────────────────────────────────────────────────────────────────────────────────────────────

    def checkpoint_if_due(self) -> None:
        """Save when a callback or `save_steps` asks for it, and at the last step.

        What cannot be written (a full disk) is tried again at the next steps; MOST_FAILED_SAVES of them end the run.
        """
        self.events.agree()
        done = self.state.global_step >= self.args.max_steps or self.control.should_training_stop
        if self.control.should_save or self.failed_saves or done:
            try:
                self.save_checkpoint()
            except CheckpointError as error:
                self.failed_saves += 1
                if done or self.failed_saves == MOST_FAILED_SAVES:
                    raise
                self.terminal.say(f"warning: step {self.state.global_step} is not saved, the next one may be: {error}")
        self.events.agree()

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        """Add a transformers callback."""
        self.events.add(callback)

    def save_checkpoint(self) -> None:
        """Write checkpoint-N now.

        Raises:
            CheckpointError: it could not be written, on every rank.
        """
        if self.saved_step != self.state.global_step:
            failed = same_everywhere(self.accelerator, [self.on_main(self._write_checkpoint)])[0]
            if failed is not None:
                raise failed
        self.saved_step, self.failed_saves = self.state.global_step, 0
        self.events.fire("on_save")

    def _write_checkpoint(self) -> CheckpointError | None:
        try:
            write_checkpoint(self)
        except CheckpointError as error:
            return error
        return None

    def on_main(self, do: Callable[[], Any]) -> Any:
        """Run something on the main process; the others wait, and its error is raised on all of them."""
        result, error = None, None
        if self.accelerator.is_main_process:
            try:
                result = do()
            except Exception as failure:  # told to every rank before it is raised
                error = failure
        raise_together(self.accelerator, error)
        return result

    def save_model(
        self, output_dir: str | Path | None = None, *, repo_id: str | None = None, revision: str | None = None
    ) -> Path:
        """A plain Hugging Face folder of the policy (or adapter), its tokenizer, the value head, and a model card.

        Default: the run's output_dir. It loads with `AutoModelForCausalLM.from_pretrained` and `pipeline`. The card
        tells how to load it from the folder, or from the repository (and branch) that is named. An earlier save in
        the folder is replaced, whatever its kind.

        Raises:
            ConfigError: an adapter would take the place of its base model.
        """
        folder = self.output_dir if output_dir is None else Path(output_dir)
        base = base_of_adapter(self.learner.actor.policy)
        require(
            base is None or Path(base).resolve() != folder.resolve(),
            f"output_dir={str(folder)!r} holds the base model, without which the adapter is nothing; name another "
            "folder",
        )

        def write() -> None:
            with in_place_of(folder, hub.HUB_FILES) as new:
                save_actor_critic(self.learner.actor, new)
                self.processing_class.save_pretrained(new)
                card = self.model_card(repo_id or loadable(folder), revision)
                (new / "README.md").write_text(card, encoding="utf-8")

        self.on_main(write)
        return folder

    def model_card(self, repo_id: str | None = None, revision: str | None = None) -> str:
        """The card, written from what was measured: the first and the last evaluation, and the run's settings."""
        measured = len(self.evaluations) > 1 and self.evaluations[0]["step"] == 0
        first, last = (self.evaluations[i]["metrics"] if measured else {} for i in (0, -1))
        found = versions()
        return model_card(
            CardFacts(
                model_name=repo_id or loadable(self.output_dir),
                revision=revision,
                needs_hfpg=type(causal_lm(self.learner.actor.policy)).__module__.startswith("hfpg."),
                base_model=self.base_model,
                is_chat=not isinstance(self.train_data.prompts[0], str),
                is_adapter=is_peft(self.learner.actor.policy),
                algorithm=type(self.algorithm).__name__,
                algorithm_fields=dataclasses.asdict(self.algorithm),
                rewards=[n for n, w in zip(self.judge.names, self.judge.weights, strict=True) if w],
                steps=self.state.global_step,
                seed=self.args.seed,
                dataset=self.args.hub_dataset,
                license=self.args.hub_license,
                metrics={name: (first[name], last[name]) for name in last if name in first},
                eval_prompts=None if self.eval_data is None else len(self.eval_data),
                config=self.args.to_dict(),
                versions=found,
                hfpg_version=found["hfpg"],
                command=command_line(),
                seconds=self.run.seconds,
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
        branch = None if revision == "main" else revision
        folder = self.save_model(self.output_dir / "final", repo_id=repo, revision=branch)
        self.events.fire("on_push_begin")
        private = self.args.hub_private_repo if private is None else private

        def push() -> str:
            if "/" not in repo:  # the card has to name whose it is
                card = self.model_card(hub.check_login(repo), branch)
                (folder / "README.md").write_text(card, encoding="utf-8")
            return hub.push_folder(folder, repo, private=private, revision=revision)

        return self.on_main(push) or ""

    def summary(self, saved: Path, prompts: int = 6) -> None:
        """Show the same prompts at the first and the last evaluation, the gain, and how to load what was saved."""
        count = len(self.evaluations)
        require(count > 1, f"summary compares two evaluations; there are {count}: evaluate before and after train()")
        where = self.readable(saved), self.readable(self.output_dir)
        self.terminal.summary(self.evaluations[0], self.evaluations[-1], *where, prompts)

    # ── before the loop: what can be refused is refused before the model loads ─────────────────────────────────────

    def _check_settings(self) -> None:
        args, algorithm = self.args, self.algorithm
        preflight.check_batch(args, algorithm, self.accelerator.num_processes)
        if hasattr(algorithm, "check_run"):
            algorithm.check_run(dataclasses.replace(args, bf16=self.accelerator.mixed_precision == "bf16"))
        if args.push_to_hub:
            preflight.check_hub(args, self.accelerator)

    def _read_data(self, model: Any, processing_class: Any, train_dataset: Any, eval_dataset: Any) -> None:
        config = load_config(model, **self._pretrained)
        if self.args.use_liger_kernel:
            check_liger(config, self.accelerator.device)
        self.processing_class = preflight.load_tokenizer(model, processing_class, self.args)
        self.train_data = self.read(train_dataset, config)
        preflight.check_data(self.train_data, self.args)
        self.eval_data = None if eval_dataset is None else self.read(eval_dataset, config)
        preflight.check_eval(self.eval_data, self.args, self.accelerator.num_processes)

    def read(self, dataset: Any, config: Any) -> PromptData:
        """Rows as prompts of this run, for a model of this configuration."""
        return PromptData(
            dataset,
            self.processing_class,
            prompt_column=self.args.prompt_column,
            max_completion_length=self.args.max_completion_length,
            context=context_length(config),
            overlong=self.args.overlong_prompts,
        )

    def _meet_judge(self, reward_funcs: Any, reward_processing_classes: Any) -> None:
        args, marker = self.args, self.args.step_marker
        self.judge = Judge(
            reward_funcs,
            args.reward_weights,
            reward_processing_classes,
            self.accelerator.device,
            on_error=args.reward_on_error,
            step_ends=None if marker is None else partial(step_ends, self.processing_class, marker),
        )
        said = preflight.dry_calls(self.judge, self.train_data, self.eval_data, self.processing_class)
        preflight.check_keep_best(args, self.algorithm, self.judge, said.logged)
        if getattr(self.algorithm, "extra_baseline", None) == "input":
            preflight.check_input_baseline(self.judge, self.train_data)

    def _choose_folder(self, model: Any) -> Any:  # a context: the checks that follow
        args, self.model_name = self.args, preflight.name_of(model)
        self.base_model = preflight.base_of(model)  # while a relative folder still is one
        wanted = args, self.algorithm, self.model_name, self.accelerator
        self.output_dir, made = preflight.prepare_output_dir(*wanted, self.here)
        self.occupied = bool(preflight.left_by_a_run(self.output_dir))
        self.named_dir = args.output_dir
        self.args = dataclasses.replace(args, output_dir=self.readable(self.output_dir))
        return preflight.folder_on_trial(made)

    def _load(self, model: Any, peft_config: Any) -> ActorCritic:
        args, value = self.args, self.algorithm.value
        policy = load_policy(model, peft_config=peft_config, **self._pretrained).to(self.accelerator.device)
        if getattr(peft_config, "lora_dropout", 0.0):
            logger.warning(
                "lora_dropout=%s does nothing here: what was sampled is what is trained, so dropout stays off",
                peft_config.lora_dropout,
            )
        if args.use_liger_kernel:
            use_liger(policy)
        if args.trainable_layers is not None:
            freeze_below(policy, args.trainable_layers)
        actor = ActorCritic(policy, value)
        own_stops = getattr(causal_lm(policy).generation_config, "eos_token_id", None)
        preflight.check_vocabulary(self.processing_class, actor.vocabulary, args.stop_token_ids, own_stops)
        self.value_head_from = find_value_head(model, value, args.model_revision)
        if self.value_head_from is not None:
            load_value_head(actor, self.value_head_from)
        return actor

    def _connect(self, actor: ActorCritic, generator: Any, callbacks: Any) -> None:
        """Make the parts of the page, each with what it needs of the others."""
        args, algorithm, tokenizer = self.args, self.algorithm, self.processing_class
        self.learner = Learner(actor, self.accelerator, args, self.reference, on_event=self._event)
        self.clock = Clock()
        generator = generator or self._sampler(actor)
        preflight.check_generator(generator, algorithm)
        self.collector = Collector(
            self.learner, algorithm, generator, self.judge, tokenizer, self.clock, lambda: self.state
        )
        self.events = Events(args, callbacks, model=actor.policy, processing_class=tokenizer, learner=self.learner)
        self.accelerator.project_configuration.set_directories(str(self.output_dir))
        self.recorder = Recorder(self.output_dir, self.accelerator, args.run_name or self.output_dir.name)
        self.terminal = Terminal(args.max_steps, plain=args.disable_tqdm, quiet=not self.accelerator.is_main_process)
        say = self.terminal.say
        self.rescorer = Rescorer(self.learner, algorithm, lambda: self.generator, self.clock, lambda: self.run, say)
        self.floor = Floor(actor, self.accelerator, getattr(algorithm, "epochs", 1), self.reference is not None)
        self.interrupt = Interrupt(say)
        self.replay = Replay(getattr(algorithm, "replay", 0), say)
        scoring = [name for name, weight in zip(self.judge.names, self.judge.weights, strict=True) if weight]
        self.guards = Guards(args.stop_constant, scoring, say)

    def _sampler(self, actor: ActorCritic) -> HFGenerator:
        args = self.args
        return HFGenerator(
            self.processing_class,
            seed=args.seed,
            max_completion_length=args.max_completion_length,
            temperature=args.temperature,
            top_k=args.top_k,
            top_p=args.top_p,
            stop_token_ids=args.stop_token_ids,
            stop_strings=args.stop_strings,
            generation_kwargs=args.generation_kwargs,
            # a token's keys and values take less than a sixteenth of what its training does
            max_tokens=(4 if self.accelerator.device.type == "cpu" else 16) * args.max_tokens_per_micro_batch,
            value_head=actor.value if actor.value_kind == "shared" else None,
        )

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
    def generator(self) -> Any:
        """What draws completions: `__call__(policy, prompts) -> Samples`."""
        return self.collector.generator

    @generator.setter
    def generator(self, generator: Any) -> None:
        """Draw with another one from now on."""
        self.collector.generator = generator
        self.run.sampler_gap = None  # nobody has compared this one with scoring

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

    def readable(self, folder: Path) -> str:
        """A folder as a person who started the run would write it."""
        return readable(folder, self.here)
