"""Push a trained policy (weights or adapter, value head, tokenizer, card) to the Hugging Face Hub, and pull it back.

Log in with `hf auth login` or `HF_TOKEN`: no function here takes, prints or stores a token, and none sends telemetry.
A push sends files of known names only, in one commit, after a search for access tokens in them.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id
from transformers.dynamic_module_utils import get_relative_import_files

from hfpg.config import SECRET, ConfigError


logger = logging.getLogger(__name__)

T = TypeVar("T")

MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "adapter_config.json",
    "adapter_model.safetensors",
)
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
VALUE_FILES = ("value_head.safetensors", *(f"value_model/{name}" for name in MODEL_FILES))
HUB_FILES = (*MODEL_FILES, *TOKENIZER_FILES, *VALUE_FILES, "hfpg.json", "README.md")
"""Names of the files that travel. `*` does not cross a folder. run.json, checkpoints, logs and pickles stay here."""

POLICY_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "adapter_model.safetensors")
LOGIN = "log in with `hf auth login` or set HF_TOKEN"
WHOAMI_SECONDS = 30.0
RETRY_AFTER = (2.0, 10.0, 30.0)
"""Seconds before a push that failed for a moment (a dropped connection, 429, 5xx) is tried again."""


class HubError(ConfigError):
    """The Hub, or a folder on its way to the Hub, is not as it must be: what was seen, the rule, what to do."""


def check_repo_id(repo_id: str) -> None:
    """Checks a repository id by the Hub's own rule, without a request.

    Args:
        repo_id: `user/name`, or `name` for a repository of the user who is logged in.

    Raises:
        HubError: the id breaks the rule.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        rule = str(error).replace("\n", " ")
        raise HubError(f"{repo_id!r} is not a Hub repository id, such as 'me/gpt2-positive': {rule}") from error


def check_login(repo_id: str) -> str:
    """Checks before a training run that its result can be pushed: the id, the token, the right to write there.

    Args:
        repo_id: where the result is to go, `user/name` or `name`.

    Returns:
        The full id, `user/name`.

    Raises:
        HubError: the id breaks the Hub's rule; there is no token, or the Hub refuses it; the Hub cannot be reached;
            the token may only read; the namespace is neither the user's nor one of the user's organizations.
    """
    check_repo_id(repo_id)
    try:
        account = _within(WHOAMI_SECONDS, HfApi().whoami)
    except Exception as error:
        reason = _reason(error)
        busy = isinstance(error, HfHubHTTPError) and _passes(error)
        hint = "or" if LOGIN in reason else "try again, or" if busy else f"{LOGIN}, or"
        raise HubError(f"cannot push to {repo_id!r}: {reason}; {hint} train without push_to_hub") from error
    user = account["name"]
    if account.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise HubError(f"cannot push to {repo_id!r}: the token of {user!r} may only read; {LOGIN} with the write role")
    namespace, _, name = repo_id.rpartition("/")
    spaces = {space.casefold(): space for space in [user, *(org["name"] for org in account.get("orgs", []))]}
    if namespace and namespace.casefold() not in spaces:
        raise HubError(
            f"cannot push to {repo_id!r}: {user!r} may write to {', '.join(sorted(spaces.values()))}, not to "
            f"{namespace!r}; try '{user}/{name}'"
        )
    return f"{namespace or user}/{name}"


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a policy trained with hfpg",
) -> str:
    """Pushes a saved policy to the Hub in one commit and logs whether the repository is public or private.

    The repository, and the branch if `revision` names a new one, are created when they do not exist. Weights of an
    earlier push that are no longer in the folder (shards, an old value head) are removed by the same commit, and so
    are files of its tokenizer where the folder has one. What fails for a moment is tried again, three times.

    Args:
        folder: what `save_model` wrote; of it only `HUB_FILES` are sent, and the Python files of a model that has
            its code in the folder (those that `auto_map` in config.json names, and what they import).
        repo_id: `user/name` or `name`.
        private: makes a new repository private. None: the Hub's default, public unless an organization says otherwise.
        revision: branch to push to; default `main`.
        commit_message: title of the commit.

    Returns:
        Address of the repository, or of the branch if `revision` is given.

    Raises:
        HubError: the id breaks the Hub's rule; the folder has no weights, a symbolic link or an access token in it;
            `private=True` but the repository exists and is public; the Hub refused, failed or could not be reached
            (the folder is untouched and the message holds the call that tries again).
    """
    check_repo_id(repo_id)
    files = files_to_push(folder)
    _say_if_nobody_has_the_base(files)
    try:
        return _patiently(lambda: _push(files, repo_id, private, revision, commit_message))
    except HubError:
        raise
    except Exception as error:  # whatever it was: after hours of training the user must hear that nothing is lost
        options = [f"{k}={v!r}" for k, v in (("private", private), ("revision", revision)) if v is not None]
        call = f"hfpg.hub.push_folder({', '.join([repr(str(folder)), repr(repo_id), *options])})"
        raise HubError(
            f"push to {repo_id!r} failed: {_reason(error)}; the local folder is intact, try again with {call}"
        ) from error


def files_to_push(folder: str | Path) -> dict[str, Path]:
    """The files of a folder that a push sends: those named in `HUB_FILES`, free of links and access tokens.

    Args:
        folder: what `save_model` wrote.

    Returns:
        Local file by path in the repository.

    Raises:
        HubError: there is no such folder or it holds no weights; a file or folder to send is a symbolic link; a file
            has an access token in it.
    """
    root = Path(folder)
    files: dict[str, Path] = {}
    for name in ("", *sorted({pattern.rpartition("/")[0] for pattern in HUB_FILES if "/" in pattern})):
        directory = root / name
        if name and directory.is_symlink():
            raise HubError(f"{directory} is a symbolic link: a push sends only real files; put a copy in its place")
        for path in sorted(directory.iterdir()) if directory.is_dir() else []:
            path_in_repo = path.relative_to(root).as_posix()
            if _named(path_in_repo, HUB_FILES):
                _check_file(path)
                files[path_in_repo] = path
    for path in _own_code(root):
        _check_file(path)
        files[path.name] = path
    if not any(_named(path, POLICY_WEIGHTS) for path in files):
        raise HubError(f"{str(folder)!r} holds no policy: none of {', '.join(POLICY_WEIGHTS)}; call save_model first")
    return files


def pull(repo_id_or_folder: str | Path, revision: str | None = None) -> Path:
    """The folder of a saved policy: a local one as it is, else a snapshot from the Hub (or from the cache, offline).

    Args:
        repo_id_or_folder: a local folder, or a repository id; of a repository only `HUB_FILES` and Python
            files are downloaded (nothing here runs them).
        revision: branch, tag or commit; only with a repository.

    Returns:
        The folder.

    Raises:
        HubError: there is neither such a folder nor such a repository or revision; it is gated or private; the Hub
            cannot be reached and the repository is not in the cache; the repository has no file that hfpg reads.
    """
    source = str(repo_id_or_folder)
    folder = Path(source).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise HubError(f"{source!r} is a local folder and has no revision {revision!r}; leave the revision out")
        return folder
    try:
        check_repo_id(source)
    except HubError as error:
        raise HubError(f"there is no folder {source!r}, and {error}") from error
    try:
        snapshot = Path(HfApi().snapshot_download(source, revision=revision, allow_patterns=[*HUB_FILES, "*.py"]))
    except Exception as error:
        raise HubError(_why_not_pulled(source, revision, error)) from error
    if not snapshot.is_dir():
        raise HubError(f"the repository {source!r} holds no file that hfpg reads, such as config.json")
    return snapshot


def _push(
    files: dict[str, Path], repo_id: str, private: bool | None, revision: str | None, commit_message: str
) -> str:
    """Creates what is missing, then sends everything in one commit.

    `create_commit` and not `upload_folder`: with Xet the latter commits a large upload in parts, and a reader would
    see half a model between them.
    """
    api = HfApi()
    url = api.create_repo(repo_id, private=private, exist_ok=True)
    full_id = url.repo_id
    if revision is not None and revision != "main":
        api.create_branch(full_id, branch=revision, exist_ok=True)
    info = api.model_info(full_id, revision=revision)
    if private and not info.private:
        raise HubError(
            f"private=True, but {full_id!r} exists and is public: nothing was sent; make it private in its settings "
            "or choose another name"
        )
    there = [sibling.rfilename for sibling in info.siblings or []]
    ours = (*MODEL_FILES, *VALUE_FILES)
    if any(_named(path, TOKENIZER_FILES) for path in files):  # an older chat template beside it would be used
        ours += TOKENIZER_FILES
    stale = [path for path in there if path not in files and _named(path, ours)]
    operations: list[Any] = [CommitOperationDelete(path) for path in stale]
    operations += [CommitOperationAdd(path_in_repo, str(path)) for path_in_repo, path in files.items()]
    api.create_commit(full_id, operations, commit_message=commit_message, revision=revision)
    address = str(url) if revision is None else f"{url}/tree/{quote(revision, safe='')}"
    _say_who_can_read(address, bool(info.private), private, len(files), stale)
    return address


def _say_who_can_read(address: str, is_private: bool, asked: bool | None, sent: int, removed: Sequence[str]) -> None:
    """Logs what was pushed. A repository that is public without having been asked to be is worth a warning."""
    level = logging.WARNING if not is_private and asked is None else logging.INFO
    who = "PRIVATE" if is_private else "PUBLIC, anyone can read it"
    gone = f"; removed stale {', '.join(removed)}" if removed else ""
    logger.log(level, "pushed %d files to %s (%s)%s", sent, address, who, gone)


def _named(path: str, patterns: Sequence[str]) -> bool:
    """Whether a path in the repository has one of these names; unlike fnmatch alone, `*` stays within a folder."""
    return any(fnmatchcase(path, pattern) and path.count("/") == pattern.count("/") for pattern in patterns)


def _check_file(path: Path) -> None:
    """Refuses a file that is a link or holds an access token."""
    if path.is_symlink() or not path.is_file():
        raise HubError(f"{path} is not a regular file: a push sends only real files; put a copy in its place")
    with path.open("rb") as file:
        if path.suffix == ".safetensors":  # text in such a file stands in its header, whose length comes first
            content = file.read(int.from_bytes(file.read(8), "little") if path.stat().st_size > 8 else 0)
        else:
            content = file.read()
    if SECRET.search(content.decode("utf-8", "replace")):
        raise HubError(f"{path} has what looks like a Hub access token (hf_...) in it; remove it and push again")


def _own_code(folder: Path) -> list[Path]:
    """The Python files beside a model's config that hold its classes, or its tokenizer's, and what these import."""
    found: set[Path] = set()
    for name in ("config.json", "tokenizer_config.json"):
        classes = _json(folder / name).get("auto_map") or {}
        for reference in classes.values() if isinstance(classes, dict) else [classes]:
            for where in reference if isinstance(reference, list) else [reference]:
                module = folder / f"{str(where).partition('.')[0]}.py"
                if module.is_file():  # "repository--module.Class" is code of another repository
                    found |= {module, *map(Path, get_relative_import_files(module))}
    return sorted(path for path in found if path.parent == folder and path.is_file())


def _say_if_nobody_has_the_base(files: dict[str, Path]) -> None:
    """Warn of an adapter whose base model is a folder, or was made in memory: nobody else can load it."""
    if "adapter_config.json" not in files:
        return
    base = _json(files["adapter_config.json"]).get("base_model_name_or_path")
    try:
        check_repo_id(str(base or "/"))
        there = not Path(str(base)).exists()
    except HubError:
        there = False
    if not there:
        logger.warning(
            "this adapter's base model is %r, which nobody else has: push the base model and write its repository "
            "into base_model_name_or_path of adapter_config.json, or push the merged model (merge_and_unload)",
            base,
        )


def _json(path: Path) -> dict[str, Any]:
    """A file's JSON object; an empty one where there is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _patiently(call: Callable[[], T]) -> T:
    """Result of `call`, which may be repeated: what passes by itself is waited for."""
    for seconds in RETRY_AFTER:
        try:
            return call()
        except Exception as error:
            if not _passes(error):
                raise
            logger.warning("%s; trying again in %g s", _reason(error), seconds)
        time.sleep(seconds)
    return call()


def _passes(error: BaseException) -> bool:
    """Whether an error may be gone at the next try: no answer, or one that says that the Hub is busy or broken."""
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in (408, 429) or error.response.status_code >= 500
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        return _passes(error.__cause__)
    offline = isinstance(error, OfflineModeIsEnabled | LocalTokenNotFoundError | FileNotFoundError | PermissionError)
    return not offline and (isinstance(error, OSError) or type(error).__module__.startswith("httpx"))


def _within(seconds: float, call: Callable[[], T]) -> T:
    """Result of `call`, or TimeoutError: the Hub client itself would wait for a silent server without end."""
    results: list[T] = []
    errors: list[Exception] = []

    def work() -> None:
        try:
            results.append(call())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


def _reason(error: BaseException) -> str:
    """What went wrong in a request, in a clause without line breaks or tokens."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # the client's wrapper for a failed upload
        return _reason(error.__cause__)
    if isinstance(error, LocalTokenNotFoundError):
        return f"nobody is logged in ({LOGIN})"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE=1 forbids requests (unset it)"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return f"the Hub refused the token (401; {LOGIN})"
        if status == 403:
            return "the token may not write there (403; use a token with the write role)"
        return f"the Hub answered {status}: {_one_line(error.server_message or error.response.reason_phrase)}"
    text = f"{type(error).__name__}: {_one_line(str(error))}"
    if isinstance(error, OSError) or type(error).__module__.startswith("httpx"):
        return f"the Hub cannot be reached at {constants.ENDPOINT} ({text})"
    return text


def _why_not_pulled(repo_id: str, revision: str | None, error: Exception) -> str:
    """The sentence for a failed download."""
    if isinstance(error, GatedRepoError):
        return f"{repo_id!r} is gated: ask for access on its page, then {LOGIN}"
    if isinstance(error, RevisionNotFoundError):
        return f"{repo_id!r} has no revision {revision!r}; name a branch, a tag or a commit that it has"
    if isinstance(error, RepositoryNotFoundError):
        return f"there is no folder and no Hub repository {repo_id!r}, or it is private: check the name, or {LOGIN}"
    if isinstance(error, LocalEntryNotFoundError) and error.__cause__ is not None:
        return f"{repo_id!r} is not in the cache, and {_reason(error.__cause__)}"
    return f"cannot download {repo_id!r}: {_reason(error)}"


def _one_line(text: str) -> str:
    """The first line with text in it, at most 200 characters, with anything that looks like a token struck out."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")
    return SECRET.sub("hf_***", line)[:200]
