"""Checks before any work: everything that can be refused is refused before the model is loaded."""

from __future__ import annotations

import copy
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import FileLock, Timeout
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hfpg import embedded, hub
from hfpg.checkpoint import checkpoints, find_checkpoint
from hfpg.config import ConfigError, TrainConfig, nearest, require
from hfpg.data import PromptData, read_chat_template
from hfpg.distributed import raise_together
from hfpg.fields import first_line, resumed_from
from hfpg.rewards import Judge, RewardError
from hfpg.rewards.judge import DryCall, beside
from hfpg.types import Samples, plain_text


logger = logging.getLogger(__name__)

OURS = ("run.json", "metrics.jsonl", "completions.jsonl", "final", "interrupted", "best")  # beside the checkpoints
EVALUATED = "score score_std entropy length finished unscored dropped distinct_2 top_bigram_share".split()
"""What every evaluation measures, beside the reward functions."""


def check_batch(args: TrainConfig, algorithm: Any, processes: int) -> None:
    """The arithmetic of a step."""
    rows, minibatches = args.prompts_per_step * algorithm.num_generations, getattr(algorithm, "minibatches", 1)
    works = [n for n in range(1, rows + 1) if rows % n == 0]
    near = sorted(sorted(works, key=lambda n: abs(n - minibatches))[:2])
    require(
        rows % minibatches == 0,
        f"minibatches={minibatches} does not divide the {rows} rollouts of a step ({args.prompts_per_step} "
        f"prompts × {algorithm.num_generations} samples); try {' or '.join(map(str, near))}",
    )
    require(
        args.prompts_per_step >= processes,
        f"prompts_per_step={args.prompts_per_step} leaves some of the {processes} processes without a prompt; use at "
        f"least {processes}",
    )


def check_data(data: PromptData, args: TrainConfig) -> None:
    """A data set must hold one step's prompts."""
    require(
        len(data) >= args.prompts_per_step,
        f"the data set has {len(data)} prompts and a step takes prompts_per_step={args.prompts_per_step}; set it to "
        f"{len(data)} or less",
    )


def check_eval(data: PromptData | None, args: TrainConfig, processes: int) -> None:
    """Evaluations that are asked for need prompts; every process evaluates at least one."""
    asked = [name for name in ("eval_steps", "eval_on_start", "keep_best_by") if getattr(args, name)]
    require(data is not None or not asked, f"{' and '.join(asked)} need held-out prompts; give an eval_dataset")
    require(
        data is None or len(data) >= processes,
        f"eval_dataset has fewer prompts than the {processes} processes; give at least {processes}",
    )


def check_hub(args: TrainConfig, accelerator: Accelerator) -> None:
    """The login and the repository's name, before training and not after it."""
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            hub.check_login(str(args.hub_model_id))
        except hub.HubError as failure:
            error = failure
    raise_together(accelerator, error)


def slug(name: str) -> str:
    """A model's or algorithm's name as part of a folder name."""
    return re.sub(r"[^a-z0-9]+", "-", Path(name).name.lower()).strip("-") or "model"


def prepare_output_dir(
    args: TrainConfig, algorithm: Any, model_name: str, accelerator: Accelerator, here: Path
) -> tuple[Path, list[Path]]:
    """The run's folder, made and proven writable, and the folders made for it; all ranks get the main process's.

    It is the whole path, from the working folder `here` on: a reward function may change that later.
    What an earlier run left there stays until `clear_folder`. Raises ConfigError for a folder that is a file or cannot
    be written, a checkpoint to resume from that is none, and for the newest checkpoint of a folder that is not named.
    """
    chosen: list[Any] = [None]
    if accelerator.is_main_process:
        try:
            chosen = [_output_dir(args, algorithm, model_name, here)]
        except ConfigError as error:
            chosen = [error]
    broadcast_object_list(chosen)
    if isinstance(chosen[0], ConfigError):
        raise chosen[0]
    folder, made = chosen[0]
    return folder, made


def _output_dir(args: TrainConfig, algorithm: Any, model_name: str, here: Path) -> tuple[Path, list[Path]]:
    refuse_newest_of_nothing(args.resume_from_checkpoint, args.output_dir)
    if args.output_dir is None:
        base = here / "runs" / f"{slug(type(algorithm).__name__)}-{slug(model_name)}"
        folder, number = base, 1
        while folder.exists():
            number += 1
            folder = base.with_name(f"{base.name}-{number}")
    else:
        folder = here / args.output_dir
    try:
        require(not folder.is_file(), f"output_dir={str(folder)!r} is a file; name a folder")
        broken = folder.is_symlink() and not folder.exists()
        require(not broken, f"output_dir={str(folder)!r} is a link to nothing; remove it, or name a folder")
        find_checkpoint(args.resume_from_checkpoint, folder)  # refuses a path that is no checkpoint
        made = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"output_dir={str(folder)!r} cannot be written: {error.strerror}") from None
    return folder, made


def refuse_newest_of_nothing(resume: str | bool | None, output_dir: str | None) -> None:
    """Raise ConfigError where the newest checkpoint of the run's folder is asked for, and the folder is a new one."""
    require(
        resumed_from(resume) != "True" or output_dir is not None,
        "resume_from_checkpoint=True goes on from the newest checkpoint of output_dir, and none is given: the run "
        "would start again in a new folder; set output_dir to that of the run, such as 'runs/ppo-gpt2'",
    )


@contextmanager
def folder_on_trial(made: list[Path]) -> Iterator[None]:
    """The last checks of a run: where it is refused, folders made for it go again."""
    try:
        yield
    except BaseException:
        with suppress(OSError):  # something is in them
            for path in made:
                path.rmdir()
        raise


def left_by_a_run(folder: Path) -> list[Path]:
    """What a run keeps in its folder, and is there."""
    aside = [path for path in folder.glob("*.abandoned") if path.is_dir()]  # the run went on from an earlier step
    return [*checkpoints(folder), *(folder / name for name in OURS if (folder / name).exists()), *aside]


def refuse_taken(args: TrainConfig, output_dir: str | None = None) -> None:
    """Raise ConfigError where a new run would find another one in its folder: a recipe with work before it asks first.

    `output_dir`: the folder, where it is not the one of the settings.
    """
    folder = Path(output_dir or args.output_dir or "")
    if folder != Path() and args.resume_from_checkpoint is None:
        _check_free(folder, bool(left_by_a_run(folder)), args.overwrite_output_dir)


def _check_free(folder: Path, occupied: bool, overwrite: bool) -> None:
    require(
        overwrite or not occupied,
        f"output_dir={str(folder)!r} holds a run already; continue it with resume_from_checkpoint=True, choose "
        "another folder, or remove it with overwrite_output_dir=True",
    )


def clear_folder(folder: Path, occupied: bool, overwrite: bool) -> None:
    """A new run must not be mixed into another one's folder: what that left there is removed if it may be.

    `occupied`: it held a run when the trainer was made; another one may have begun since.
    """
    occupied = occupied or (folder / "run.json").exists()
    _check_free(folder, occupied, overwrite)
    for path in left_by_a_run(folder) if occupied else ():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def alone(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """No other process trains in the folder meanwhile: a job that was submitted twice would write over its own files.

    Raises:
        ConfigError: one does.
    """
    lock, error = FileLock(folder / "run.lock"), None
    if accelerator.is_main_process:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            error = ConfigError(
                f"another process trains in output_dir={str(folder)!r}; wait for its end, or name another folder"
            )
        except (OSError, NotImplementedError) as failure:  # a file system without locks
            logger.warning("%s cannot be locked (%s): see to it that no other process trains there", folder, failure)
    raise_together(accelerator, error)
    try:
        yield
    finally:
        lock.release()


def name_of(model: Any) -> str:
    """What a model is called: its Hub id or folder, or the class of one made in memory."""
    if model == embedded.MODEL:
        return embedded.NAME
    return model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or type(model).__name__


def base_of(model: Any) -> str | None:
    """The Hub id that the model came from; None for a folder and for a model made in memory."""
    name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
    return None if not name or Path(name).exists() else name


def load_tokenizer(model: Any, given: Any, args: TrainConfig) -> Any:
    """The policy's tokenizer: the one given, or the one saved with the model; with the chat template of `args`."""
    tokenizer = given
    if tokenizer is None:
        source = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "")
        require(bool(source), "the model was made in memory; give its tokenizer as processing_class")
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                source, revision=args.model_revision, trust_remote_code=args.trust_remote_code
            )
        except Exception as error:  # a file that was copied half raises whatever its reader stumbles over
            raise ConfigError(
                f"cannot load the tokenizer of {source!r}: {first_line(error)}; give processing_class"
            ) from error
        require(
            len(tokenizer) > len(set(tokenizer.all_special_ids)),
            f"{source!r} has no tokenizer (transformers makes an empty {type(tokenizer).__name__}); save one there "
            "with tokenizer.save_pretrained, or give processing_class",
        )
    require(
        isinstance(tokenizer, PreTrainedTokenizerBase),
        f"processing_class is a {type(tokenizer).__name__}; hfpg trains text models and needs a tokenizer",
    )
    if args.chat_template is not None:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = read_chat_template(args.chat_template)
    return tokenizer


def check_vocabulary(tokenizer: Any, vocabulary: int, stop_token_ids: list[int] | None, own: Any = None) -> None:
    """Every token of the tokenizer must have an embedding, and every stop token must be one.

    `own`: the ids that the model's generation config stops at, where `stop_token_ids` is None.
    """
    beyond = [i for i in stop_token_ids or [] if not 0 <= i < vocabulary]
    require(not beyond, f"stop_token_ids has {beyond}; the model's tokens are 0 to {vocabulary - 1}")
    theirs = [own] if isinstance(own, int) else list(own or [])
    never = [] if stop_token_ids is not None else [i for i in theirs if not 0 <= i < vocabulary]
    end = getattr(tokenizer, "eos_token_id", None)
    require(
        not never or len(never) < len(theirs),
        f"the model's generation config ends texts at {never}, and its tokens are 0 to {vocabulary - 1}; say where "
        f"they end with stop_token_ids, such as [{0 if end is None else end}]",
    )
    require(
        len(tokenizer) <= vocabulary,
        f"the tokenizer has {len(tokenizer)} tokens and the model {vocabulary} embeddings; use the model's own "
        "tokenizer, or resize the model with model.resize_token_embeddings(len(tokenizer))",
    )


def dry_call(judge: Judge, data: PromptData, tokenizer: Any, dataset: str = "data set") -> DryCall:
    """Call the reward functions on two rows of the data set with made-up completions; warn of hidden randomness."""
    rows = [0, len(data) - 1]
    ids = tokenizer(["good", "a fine answer"], add_special_tokens=False).input_ids
    columns = {name: [values[i] for i in rows] for name, values in data.columns.items()}
    said = judge.dry_call([data.prompts[i] for i in rows], [list(i) for i in ids], columns, dataset)
    for name in said.unsteady:
        logger.warning(
            "reward function %r scored the same completions differently when it was asked again: a resumed run is not "
            "the unbroken one, and no baseline takes such noise away; give it a seed",
            name,
        )
    return said


def dry_calls(judge: Judge, train: PromptData, held_out: PromptData | None, tokenizer: Any) -> DryCall:
    """The dry call on the training rows, and on held-out ones whose columns are others."""
    said = dry_call(judge, train, tokenizer)
    if held_out is not None and held_out.columns.keys() != train.columns.keys():
        dry_call(judge, held_out, tokenizer, "eval data set")
    return said


def check_keep_best(args: TrainConfig, algorithm: Any, judge: Judge, logged: list[str]) -> None:
    """`keep_best_by` must be what evaluations measure: `logged` are the names that log_metric has had so far."""
    if args.keep_best_by is None:
        return
    judges = [f"eval_scores/{name}" for name in judge.names]
    own = [*(f"scores/{name}" for name in judge.names), *EVALUATED, *(["kl_to_ref"] if algorithm.kl_coef > 0 else [])]
    known = [f"eval_{name}" for name in (*own, *beside(own, dict.fromkeys(logged)))]
    name = args.keep_best_by
    require(
        name in known,
        f"keep_best_by={name!r} is no metric of an evaluation{nearest(name, known)}; there are {known} (and what "
        "log_metric gets in every call, also the dry call before training)",
    )
    require(
        args.stop_overoptimized == 0 or name in judges,
        f"stop_overoptimized={args.stop_overoptimized} compares the scores of held-out prompts, and keep_best_by="
        f"{name!r} is no judge's; use one of {judges}, such as a function of weight 0",
    )


def check_generator(generator: Any, algorithm: Any) -> None:
    """A generator of one's own must give what the algorithm's baseline needs."""
    require(
        getattr(algorithm, "extra_baseline", None) != "greedy" or hasattr(generator, "greedy"),
        f"baseline='greedy' needs greedy completions, and {type(generator).__name__} has no method "
        "greedy(policy, prompts); add one, or use baseline='ema'",
    )


def check_behaviour(samples: Samples, algorithm: Any) -> None:
    """Off-policy weights need to know the policy that drew the tokens."""
    how = getattr(algorithm, "off_policy", "none")
    require(
        how == "none" or samples.sampler_logprobs is not None,
        f"off_policy={how!r} corrects for the policy that drew the tokens, and the generator gave no "
        "sampler_logprobs; return them with the samples, or use off_policy='none'",
    )


def check_input_baseline(judge: Judge, data: PromptData) -> None:
    """baseline='input': the judge must be able to score a prompt alone, `prompts=[""], completions=[prompt text]`."""
    rows = [0, len(data) - 1]
    texts = [plain_text(data.prompts[i]) for i in rows]
    columns = {name: [values[i] for i in rows] for name, values in data.columns.items()}
    advice = (
        "baseline='input' takes the score of the prompt itself; use baseline='ema', or a judge that scores any text"
    )
    try:
        scores = judge(["", ""], list(texts), [data.encoded[i] for i in rows], columns)
    except RewardError as error:
        raise ConfigError(f"{error}; {advice}") from error
    require(bool(scores.weights.any()), f"no reward function scores a prompt (all abstained); {advice}")
