"""A policy and its value head as a folder: a plain Hugging Face model, with the head and what kind it is beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.utils import cached_file

from hfpg.config import no_progress_bar, require
from hfpg.models import ActorCritic, ValueKind
from hfpg.pretrained import causal_lm, is_peft, load_policy


HEAD_FILE = "value_head.safetensors"
TRUNK_FOLDER = "value_model"
ABOUT_FILE = "hfpg.json"


def save_actor_critic(actor: ActorCritic, folder: str | Path) -> None:
    """The policy as a plain Hugging Face folder, the value head beside it, and hfpg.json that says which kind."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with no_progress_bar():
        _save_policy(actor.policy, folder)
    (folder / ABOUT_FILE).write_text(json.dumps({"format": 1, "value": actor.value_kind}) + "\n")
    if actor.value is not None:
        save_file(_contiguous(actor.value.linear.state_dict()), folder / HEAD_FILE)
        if actor.value.trunk is not None:
            (folder / TRUNK_FOLDER).mkdir(exist_ok=True)
            save_file(_contiguous(actor.value.trunk.state_dict()), folder / TRUNK_FOLDER / "model.safetensors")


def _save_policy(policy: Any, folder: Path) -> None:
    """A folder that loads by its own name; peft would put an adapter with a name into a folder of that name inside."""
    if not is_peft(policy):
        policy.save_pretrained(folder)
        return
    name = policy.active_adapter
    policy.save_pretrained(folder, selected_adapters=[name])
    if name != "default":
        for path in (folder / name).iterdir():
            path.replace(folder / path.name)
        (folder / name).rmdir()


def load_actor_critic(path: str | Path, *, trust_remote_code: bool = False) -> ActorCritic:
    """The policy and value head of a folder that hfpg saved. For a Hub id, give `hfpg.hub.pull(id)`.

    A folder without a value head gives an ActorCritic without one.
    """
    path = Path(path)
    about = path / ABOUT_FILE
    kind = json.loads(about.read_text())["value"] if about.exists() else None
    actor = ActorCritic(load_policy(str(path), trust_remote_code=trust_remote_code), kind)
    load_value_head(actor, path)
    return actor


def find_value_head(model: Any, kind: ValueKind | None, revision: str = "main") -> Path | None:
    """The folder of a value head of this kind that was saved with a model (Hub id or folder), or None."""
    if kind is None or not isinstance(model, str):
        return None
    names = [ABOUT_FILE, HEAD_FILE] + ([f"{TRUNK_FOLDER}/model.safetensors"] if kind == "separate" else [])
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")}
    found = [cached_file(model, name, revision=revision, **quiet) for name in names]
    if any(path is None for path in found) or json.loads(Path(found[0]).read_text())["value"] != kind:
        return None
    return Path(found[0]).parent


def load_value_head(actor: ActorCritic, folder: str | Path) -> None:
    """Fill the value head (and its trunk) of `actor` from a folder made by `save_actor_critic`."""
    if actor.value is None:
        return
    folder = Path(folder)
    require(
        (folder / HEAD_FILE).exists(),
        f"{folder} holds no {HEAD_FILE}; it was saved without a value head, so start the algorithm with a fresh one",
    )
    actor.value.linear.load_state_dict(load_file(folder / HEAD_FILE))
    if actor.value.trunk is not None:
        trunk = actor.value.trunk
        trunk.load_state_dict(load_file(folder / TRUNK_FOLDER / "model.safetensors"))
        own, frozen = dict(trunk.named_parameters()), causal_lm(actor.policy).base_model.named_parameters()
        pairs = [(own.get(name), p) for name, p in frozen if not p.requires_grad]
        actor.value.shares_frozen = all(mine is not None and torch.equal(mine, p) for mine, p in pairs)


def _contiguous(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone().contiguous() for name, tensor in state.items()}
