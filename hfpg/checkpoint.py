"""What a run is, saved and loaded.

A checkpoint is a folder `checkpoint-N`: the policy as a plain Hugging Face folder with its tokenizer and value head,
the optimizer's moments as safetensors, and the run's small state as JSON. It holds no random number state (every draw
is keyed) and no pickle. It is written under another name and renamed when whole, so a folder called `checkpoint-N` is
complete; it lists its files with sizes and checksums, so one that was damaged later is known as such.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import TrainerState

from hfpg.config import ConfigError, no_progress_bar, require
from hfpg.fields import resumed_from
from hfpg.integrity import changed_file, file_sums, sealed, unsealed
from hfpg.learner import Learner
from hfpg.models import ActorCritic
from hfpg.pretrained import is_peft
from hfpg.replay import REPLAY_FILE, Replay
from hfpg.saving import load_value_head, save_actor_critic


FORMAT = 1
STATE_FILE = "hfpg_state.json"  # written last: a folder without it is no checkpoint
BEST_FILE = "hfpg_step"  # in `best`: the step whose model it is
OPTIMIZER_FILE = "optimizer.safetensors"
MAY_CHANGE = frozenset(  # every other setting changes what is trained
    """
    output_dir overwrite_output_dir resume_from_checkpoint run_name max_steps
    use_cpu torch_threads max_tokens_per_micro_batch judge_chunks ddp_timeout
    logging_steps completions_steps num_completions_to_print report_to disable_tqdm
    eval_steps eval_on_start keep_best_by stop_overoptimized stop_constant max_dropped
    save_steps save_total_limit push_to_hub hub_model_id hub_private_repo hub_license hub_dataset
    model_revision trust_remote_code reward_funcs
    """.split()  # reward_funcs: a judge that failed may be mended; the trainer says it
)
NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written."""


@dataclasses.dataclass
class RunState:
    """Where a run stands, beside the weights: everything that is not a function of the seed."""

    position: int = 0  # prompts taken from the endless stream
    algorithm: dict[str, Any] = dataclasses.field(default_factory=dict)
    watch: dict[str, Any] = dataclasses.field(default_factory=dict)  # what evaluations have shown; see report/watch.py
    guards: dict[str, Any] = dataclasses.field(default_factory=dict)  # steps in a row; see guards.py
    sampler_gap: float | None = None  # largest relative difference of sampling and scoring, if looked at
    sampler_length: int = 0  # tokens of the longest text in that look
    fisher_trial: int | None = None  # how TRPO's products are made; see natural.py
    first_evaluation: dict[str, Any] | None = None
    last_evaluation: dict[str, Any] | None = None  # after the first
    evaluation_due: bool = False  # the run was stopped before this step's evaluation was done
    seconds: float = dataclasses.field(default=0.0, compare=False)  # spent in the loop


def save_checkpoint(
    folder: Path,
    learner: Learner,
    tokenizer: Any,
    trainer_state: TrainerState,
    run: RunState,
    config: dict[str, Any],
    replay: Replay | None = None,
) -> Path:
    """Write `checkpoint-N` into `folder` and return its path. Call it on one process only.

    Raises:
        CheckpointError: it could not be written (a full disk, say). Nothing half-written
            stays; what was there before does.
    """
    target = folder / f"checkpoint-{trainer_state.global_step}"
    work = target.with_name(target.name + ".tmp")
    shutil.rmtree(work, ignore_errors=True)
    try:
        save_actor_critic(learner.actor, work)
        tokenizer.save_pretrained(work)
        save_file(learner.optimizer_state(), work / OPTIMIZER_FILE)
        if replay is not None and replay.rollouts:
            save_file(replay.state(), work / REPLAY_FILE)
        trainer_state.save_to_json(str(work / "trainer_state.json"))
        state = {"format": FORMAT, "run": dataclasses.asdict(run), "config": config, "files": sums_to_check(work)}
        (work / STATE_FILE).write_text(sealed(state))
        replace_folder(work, target)
    except Exception as error:
        shutil.rmtree(work, ignore_errors=True)
        free = shutil.disk_usage(folder).free // 2**20
        kept = [p.name for p in checkpoints(folder)]
        raise CheckpointError(
            f"{target} could not be written: {error} ({free} MiB are free there); complete checkpoints: "
            f"{kept or 'none'}. Make room, or name another output_dir"
        ) from error
    return target


def replace_folder(whole: Path, target: Path) -> None:
    """Put a folder that is complete in the place of another one, which is removed only then."""
    old = target.with_name(target.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    os.replace(whole, target)
    shutil.rmtree(old, ignore_errors=True)


def sums_to_check(folder: Path) -> dict[str, list[int]]:
    """Sums of the files that a resumed run reads: not the tokenizer's, not the card."""
    names = {"trainer_state.json", "config.json", "adapter_config.json"}
    sums = file_sums(folder)
    return {name: s for name, s in sums.items() if Path(name).name in names or ".safetensors" in name}


def damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint; None: they are those that were written."""
    try:
        written = unsealed((path / STATE_FILE).read_text()).get("files", {})
    except (OSError, ValueError) as error:
        return f"{STATE_FILE} cannot be read: {error}"
    try:
        return changed_file(path, written)
    except OSError as error:  # a bad sector, no right to read
        return f"a file of it cannot be read: {error}"


def undamaged(path: Path, by_name: bool, say: Callable[[str], None]) -> Path:
    """The checkpoint, or where it was not named and is damaged the newest older one beside it that is not.

    Raises:
        ConfigError: a named checkpoint is damaged, or all are.
    """
    wrong = damage(path)
    if wrong is None:
        return path
    older = [p for p in checkpoints(path.parent) if NAME.fullmatch(path.name) and number_of(p) < number_of(path)]
    others = f"older ones are there: {[p.name for p in older]}" if older else "start anew in another output_dir"
    require(not by_name and bool(older), f"the checkpoint {path} is damaged: {wrong}; {others}")
    say(f"warning: the checkpoint {path} is damaged: {wrong}; trying {older[-1].name}")
    return undamaged(older[-1], by_name, say)


def number_of(path: Path) -> int:
    """N of checkpoint-N."""
    return int(path.name.split("-")[1])


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in a folder, oldest first."""
    found = [p for p in folder.glob("checkpoint-*") if NAME.fullmatch(p.name) and (p / STATE_FILE).is_file()]
    return sorted(found, key=number_of)


def set_aside(folder: Path, step: int) -> list[str]:
    """Rename checkpoints beyond `step`: the run goes on from there, and a later "newest" must not find them.

    Returns their new names.
    """
    names = []
    for path in checkpoints(folder):
        if number_of(path) > step:
            aside = path.with_name(f"{path.name}.abandoned")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
            names.append(aside.name)
    return names


def put_best(whole: Path, best: Path, step: int) -> None:
    """The folder of the best model, that of `step`, in the place of the best so far."""
    (whole / BEST_FILE).write_text(str(step))
    replace_folder(whole, best)


def best_fits(best: Path, step: int | None) -> bool:
    """Whether the folder of the best model holds that of `step` (None: there is none yet); if not it is set aside."""
    mark = best / BEST_FILE
    text = mark.read_text(errors="replace") if mark.is_file() else None
    held = text if text is None else int(text) if text.isdecimal() else -1  # a full disk leaves an empty mark
    if held == step or (best.is_dir() and held is None):  # an older hfpg did not say
        return True
    if best.is_dir():
        replace_folder(best, best.with_name(f"{best.name}.abandoned"))
    return False


def rotate(folder: Path, keep: int | None) -> None:
    """Remove the oldest checkpoints beyond `keep`. Only folders that this module wrote are touched."""
    if keep is not None:
        for old in checkpoints(folder)[:-keep]:
            if not old.is_symlink():
                shutil.rmtree(old)


def find_checkpoint(resume: str | bool | None, folder: Path) -> Path | None:
    """The checkpoint to resume from: True or "True" for the newest in `folder`, or a path. None: start fresh.

    Raises:
        ConfigError: a path that is no checkpoint (with what there is).
    """
    resume = resumed_from(resume)
    if resume is None:
        return None
    there = checkpoints(folder)
    if resume == "True":
        return there[-1] if there else None
    path = Path(str(resume))
    require(
        (path / STATE_FILE).is_file(),
        f"resume_from_checkpoint={str(path)!r} is no hfpg checkpoint (no {STATE_FILE}); "
        f"{folder} has {[p.name for p in there] or 'none'}",
    )
    return path


def read_state(path: Path) -> dict[str, Any]:
    """The small state of a checkpoint.

    Raises:
        ConfigError: written by a newer hfpg.
    """
    state = unsealed((path / STATE_FILE).read_text())
    require(
        state["format"] <= FORMAT,
        f"{path} has checkpoint format {state['format']}, this hfpg reads up to {FORMAT}; update hfpg",
    )
    return state


def check_settings(path: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """A run goes on with the settings that it began with; how long it is, watched and kept may change."""
    changed = [
        f"{name}: {saved[name]!r} then, {now[name]!r} now"
        for name in now
        if name in saved and name not in MAY_CHANGE and saved[name] != now[name]
    ]
    require(
        not changed,
        f"{path} was trained with other settings ({'; '.join(changed)}); resume with those, or start a new run from "
        f"its weights with model={str(path)!r}",
    )


def load_checkpoint(path: Path, learner: Learner, config: dict[str, Any]) -> tuple[TrainerState, RunState]:
    """Put weights, value head and optimizer of a checkpoint into `learner`; returns the states saved with them.

    Raises:
        ConfigError: a newer format, or settings other than `config`.
    """
    state = read_state(path)
    check_settings(path, state["config"], config)
    tensors = load_file(path / OPTIMIZER_FILE)
    load_policy_weights(learner.actor, path)
    load_value_head(learner.actor, path)
    trainer_state = TrainerState.load_from_json(str(path / "trainer_state.json"))
    learner.load_optimizer_state(tensors, trainer_state.global_step)
    return trainer_state, RunState(**state["run"])


def load_policy_weights(actor: ActorCritic, path: Path) -> None:
    """Copy the policy (or the adapter) saved in a folder into the one in memory, exactly."""
    policy = actor.policy
    if is_peft(policy):
        from peft import load_peft_weights, set_peft_model_state_dict

        result = set_peft_model_state_dict(policy, load_peft_weights(str(path)), adapter_name=policy.active_adapter)
        trained = {name for name, p in policy.named_parameters() if p.requires_grad}
        missing = [k for k in result.missing_keys if k in trained]
        require(
            not missing and not result.unexpected_keys, f"{path} does not hold this model's adapter: {missing[:2]}"
        )
        return
    # through from_pretrained, which knows how transformers names, ties and shards what it saved
    with no_progress_bar():
        fresh = type(policy).from_pretrained(path, dtype=policy.dtype)
    try:
        policy.load_state_dict(fresh.state_dict())
    except RuntimeError as error:
        raise ConfigError(f"{path} holds another model: {str(error).splitlines()[-1].strip()}") from None
