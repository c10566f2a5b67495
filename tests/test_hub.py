"""Push and pull of a policy: what travels, what never does, and what the user is told when the Hub says no."""

import hashlib
import json
import logging
import socket
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from hfpg import hub as hfpg_hub
from hfpg.hub import HubError, check_login, check_repo_id, files_to_push, pull, push_folder
from tests.hub_server import HubServer


SECRET = "hf_" + "aB3" * 10
WHOLE = {
    "README.md": b"---\nlibrary_name: transformers\n---\n# card\n",
    "chat_template.jinja": b"{{ messages }}",
    "config.json": b"{}",
    "generation_config.json": b"{}",
    "hfpg.json": b'{"format": 1}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "value_model/config.json": b"{}",
}
WEIGHTS = ("model.safetensors", "value_head.safetensors", "value_model/model.safetensors")
LOCAL = (
    "run.json",
    "metrics.jsonl",
    "training_args.bin",
    "optimizer.pt",
    ".env",
    "notes.md",
    "value_model/notes.md",
    "value_model/README.md",
    "checkpoint-4/model.safetensors",
    "completions/step.parquet",
)


def safetensors(metadata: str = "") -> bytes:
    """A file of one tensor, as the format has it: length of the header, header, data."""
    tensor = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    header = json.dumps({"__metadata__": {"note": metadata}, "w": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(8)


def fill(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def fingerprint(folder: Path) -> dict[str, str]:
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubServer() as server:
        server.use_here(monkeypatch, tmp_path / "home")
        yield server


@pytest.fixture
def saved(tmp_path):
    """A folder as `save_model` leaves it, amid the other files of a run."""
    weights = {name: safetensors(metadata=name) for name in WEIGHTS}
    return fill(tmp_path / "saved", WHOLE | weights | dict.fromkeys(LOCAL, b"private " + SECRET.encode()))


@pytest.mark.parametrize("bad", ["", "a/b/c", "me/..", "me/a--b", "-me/x", "me/x y", "me/x.git", "me/", "x" * 97])
def test_a_bad_id_is_refused_without_a_request(hub, saved, bad):
    for refused in (check_repo_id, check_login, lambda repo_id: push_folder(saved, repo_id)):
        with pytest.raises(HubError, match="is not a Hub repository id, such as 'me/gpt2-positive'"):
            refused(bad)
    assert hub.log == []


def test_login_gives_the_full_id(hub):
    hub.account["orgs"] = [{"name": "Lab"}]
    assert check_login("policy") == "tester/policy"
    assert check_login("tester/policy") == "tester/policy"
    assert check_login("lab/policy") == "lab/policy"
    with pytest.raises(HubError, match="'tester' may write to Lab, tester, not to 'other'; try 'tester/policy'"):
        check_login("other/policy")


def test_login_needs_a_token_that_may_write(hub, monkeypatch):
    hub.account["auth"] = {"accessToken": {"role": "read"}}
    with pytest.raises(HubError, match="the token of 'tester' may only read.*write role"):
        check_login("tester/policy")
    monkeypatch.setenv("HF_TOKEN", SECRET)
    with pytest.raises(HubError, match="refused the token.*hf auth login.*HF_TOKEN") as caught:
        check_login("tester/policy")
    assert SECRET not in str(caught.value)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="nobody is logged in.*hf auth login.*HF_TOKEN"):
        check_login("tester/policy")


def test_login_does_not_wait_for_a_hub_that_is_down_or_silent(monkeypatch, tmp_path):
    with HubServer() as server:
        server.use_here(monkeypatch, tmp_path)
    with pytest.raises(HubError, match="cannot be reached at http://127.0.0.1.*hf auth login.*HF_TOKEN"):
        check_login("tester/policy")
    monkeypatch.setattr(hfpg_hub, "WHOAMI_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(HubError, match="cannot be reached.*no answer within 0.2 s.*hf auth login"):
            check_login("tester/policy")


def test_only_files_of_known_names_travel_and_in_one_commit(hub, saved):
    before = fingerprint(saved)
    assert push_folder(saved, "policy", commit_message="PPO, 100 steps") == f"{hub.url}/tester/policy"
    sent = sorted([*WHOLE, *WEIGHTS])
    assert sorted(files_to_push(saved)) == sent
    assert hub.files("tester/policy") == sorted([".gitattributes", *sent])
    assert list(hub.repos["tester/policy"].titles.values()) == ["initial commit", "PPO, 100 steps"]
    assert fingerprint(saved) == before


def test_a_second_push_of_the_same_folder_changes_nothing(hub, saved):
    push_folder(saved, "tester/policy")
    push_folder(saved, "tester/policy")
    assert hub.calls("/commit/") == [200]


def test_weights_of_an_earlier_push_do_not_stay_beside_new_ones(hub, saved, tmp_path):
    push_folder(saved, "tester/policy")
    others = ["figure.svg", "model-old/1-of-2.safetensors"]
    for name in others:
        HfApi().upload_file(path_or_fileobj=b"not ours", path_in_repo=name, repo_id="tester/policy")
    adapter = {"adapter_model.safetensors": safetensors(), "adapter_config.json": b"{}"}
    push_folder(fill(tmp_path / "adapter", adapter), "tester/policy")
    tokenizer = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    kept = [".gitattributes", "README.md", "hfpg.json", *tokenizer, *others]
    assert hub.files("tester/policy") == sorted([*kept, *adapter])
    assert hub.calls("/commit/") == [200] * 4


def test_a_new_revision_becomes_a_branch(hub, saved):
    assert push_folder(saved, "tester/policy", revision="step-100") == f"{hub.url}/tester/policy/tree/step-100"
    assert hub.files("tester/policy") == [".gitattributes"]
    assert "model.safetensors" in hub.files("tester/policy", "step-100")
    assert (pull("tester/policy", revision="step-100") / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("private", "said", "level"),
    [(None, "PUBLIC, anyone can read it", logging.WARNING)]
    + [(False, "PUBLIC, anyone can read it", logging.INFO), (True, "PRIVATE", logging.INFO)],
)
def test_it_says_who_can_read_the_repository(hub, saved, caplog, private, said, level):
    caplog.set_level(logging.INFO, logger="hfpg.hub")
    push_folder(saved, "tester/policy", private=private)
    assert hub.repos["tester/policy"].private is bool(private)
    [record] = [record for record in caplog.records if record.name == "hfpg.hub"]
    assert record.levelno == level and f"{hub.url}/tester/policy ({said})" in record.message
    assert hub.token not in caplog.text


def test_a_push_that_must_be_private_does_not_go_to_a_public_repository(hub, saved):
    HfApi().create_repo("tester/policy")
    with pytest.raises(HubError, match="private=True, but 'tester/policy' exists and is public: nothing was sent"):
        push_folder(saved, "tester/policy", private=True)
    assert hub.files("tester/policy") == [".gitattributes"] and hub.objects == {}


@pytest.mark.parametrize("secret", [SECRET, "hf_oauth_" + "x" * 30])
@pytest.mark.parametrize("name", ["README.md", "tokenizer_config.json", "value_model/config.json"])
def test_an_access_token_is_never_sent(hub, saved, name, secret):
    fill(saved, {name: b'{"token": "' + secret.encode() + b'"}'})
    with pytest.raises(HubError, match=f"{name} has what looks like a Hub access token") as caught:
        push_folder(saved, "tester/policy")
    assert secret not in str(caught.value) and hub.log == []


def test_an_access_token_in_the_header_of_the_weights_is_found(hub, saved):
    fill(saved, {"model.safetensors": safetensors(metadata=SECRET)})
    with pytest.raises(HubError, match="model.safetensors has what looks like a Hub access token"):
        push_folder(saved, "tester/policy")


@pytest.mark.parametrize("name", ["model.safetensors", "README.md", "value_model"])
def test_a_symbolic_link_is_refused(hub, saved, tmp_path, name):
    moved = tmp_path / "elsewhere"
    (saved / name).rename(moved)
    (saved / name).symlink_to(moved)
    with pytest.raises(HubError, match=f"{name} is (a symbolic link|not a regular file).*put a copy in its place"):
        push_folder(saved, "tester/policy")
    assert hub.log == []


def test_a_folder_without_weights_is_refused(hub, tmp_path):
    for folder in (tmp_path / "absent", fill(tmp_path / "empty", {"config.json": b"{}"})):
        with pytest.raises(HubError, match="holds no policy.*save_model first"):
            push_folder(folder, "tester/policy")
    assert hub.log == []


@pytest.mark.parametrize(
    ("status", "match", "reason"),
    [
        (401, "/api/repos/create", "refused the token .401; log in with `hf auth login` or set HF_TOKEN"),
        (403, "/commit/", "may not write there .403; use a token with the write role"),
        (500, "/api/repos/create", "the Hub answered 500: simulated 500"),
        (503, "/commit/", "the Hub answered 503: simulated 503"),
        (507, "/verify", "the Hub answered 507"),
    ],
)
def test_after_a_failure_the_folder_is_intact_and_the_named_call_works(hub, saved, status, match, reason, monkeypatch):
    monkeypatch.setattr(hfpg_hub, "RETRY_AFTER", ())
    before = fingerprint(saved)
    hub.fail_next(1, status, match=match)
    with pytest.raises(HubError, match=f"push to 'tester/policy' failed: .*{reason}") as caught:
        push_folder(saved, "tester/policy", private=True)
    assert "the local folder is intact" in str(caught.value) and "\n" not in str(caught.value)
    assert fingerprint(saved) == before
    call = str(caught.value).partition("try again with ")[2]
    assert call == f"hfpg.hub.push_folder({str(saved)!r}, 'tester/policy', private=True)"
    push_folder(saved, "tester/policy", private=True)
    assert "model.safetensors" in hub.files("tester/policy") and hub.repos["tester/policy"].private


@pytest.mark.parametrize(("status", "match"), [(500, "/api/repos/create"), (429, "/commit/"), (503, "/commit/")])
def test_what_passes_by_itself_is_tried_again(hub, saved, status, match, monkeypatch):
    monkeypatch.setattr(hfpg_hub, "RETRY_AFTER", (0.0, 0.0))
    hub.fail_next(2, status, match=match)
    push_folder(saved, "tester/policy")
    assert set(hub.files("tester/policy")) >= set(files_to_push(saved))
    assert hub.calls(match) == [status, status, 200]
    hub.fail_next(3, status, match=match)
    with pytest.raises(HubError, match=f"the Hub answered {status}"):
        push_folder(saved, "tester/another")


def test_a_hub_that_is_broken_is_no_reason_to_log_in(hub):
    hub.fail_next(1, 500, match="whoami")
    with pytest.raises(HubError, match="answered 500.*try again, or train without") as caught:
        check_login("tester/policy")
    assert "hf auth login" not in str(caught.value)


def test_files_of_an_older_tokenizer_do_not_stay_beside_a_new_one(hub, saved):
    push_folder(saved, "tester/policy")
    (saved / "chat_template.jinja").unlink()
    push_folder(saved, "tester/policy")
    assert "chat_template.jinja" not in hub.files("tester/policy")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (saved / name).unlink()
    push_folder(saved, "tester/policy")
    assert "tokenizer.json" in hub.files("tester/policy"), "a folder without a tokenizer says nothing of one"


def test_a_model_with_code_of_its_own_takes_it_along(hub, saved):
    code = {"modeling_my.py": b"from .parts import x\n", "parts.py": b"x = 1\n", "token_my.py": b"", "notes.py": b""}
    fill(saved, code)
    assert "modeling_my.py" not in files_to_push(saved)
    fill(saved, {"config.json": b'{"auto_map": {"AutoConfig": "me/other--notes.C", "AutoModel": "modeling_my.Mine"}}'})
    fill(saved, {"tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["token_my.Slow", null]}}'})
    push_folder(saved, "tester/policy")
    assert {name for name in hub.files("tester/policy") if name.endswith(".py")} == set(code) - {"notes.py"}
    assert (pull("tester/policy") / "parts.py").read_bytes() == b"x = 1\n"


@pytest.mark.parametrize(("base", "warned"), [("me/gpt2", False), ("/scratch/base", True), (None, True)])
def test_an_adapter_of_a_model_that_nobody_has_is_warned_of(hub, saved, base, warned, caplog):
    fill(saved, {"adapter_config.json": json.dumps({"base_model_name_or_path": base}).encode()})
    with caplog.at_level(logging.WARNING, logger="hfpg.hub"):
        push_folder(saved, "tester/policy", private=True)
    assert ("which nobody else has: push the base model" in caplog.text) == warned


def test_a_push_offline_says_so(hub, saved, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="HF_HUB_OFFLINE=1 forbids requests.*intact"):
        push_folder(saved, "tester/policy")
    assert hub.log == []


def test_a_card_that_the_hub_rejects_is_named(hub, saved):
    fill(saved, {"README.md": b"---\nlicense: mit\n"})
    with pytest.raises(HubError, match="Invalid metadata in README.md.*intact"):
        push_folder(saved, "tester/policy")


def test_a_pull_gives_back_what_was_pushed(hub, saved):
    push_folder(saved, "tester/policy", private=True)
    HfApi().upload_file(path_or_fileobj=b"pickle", path_in_repo="pytorch_model.bin", repo_id="tester/policy")
    folder = pull("tester/policy")
    pulled = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert pulled == {name: path.read_bytes() for name, path in files_to_push(saved).items()}


def test_a_local_folder_is_taken_as_it_is(hub, saved):
    assert pull(saved) == saved and pull(str(saved)) == saved
    with pytest.raises(HubError, match="is a local folder and has no revision 'v1'"):
        pull(saved, revision="v1")
    with pytest.raises(HubError, match="there is no folder .*/absent', and .* is not a Hub repository id"):
        pull(saved / "absent")
    assert hub.log == []


def test_a_pull_that_fails_says_why(hub, saved, monkeypatch):
    with pytest.raises(HubError, match="no folder and no Hub repository 'tester/absent', or it is private.*hf auth"):
        pull("tester/absent")
    push_folder(saved, "tester/policy", private=True)
    with pytest.raises(HubError, match="'tester/policy' has no revision 'absent'"):
        pull("tester/policy", revision="absent")
    hub.fail_next(1, 403, match="/revision/main", code="GatedRepo")
    with pytest.raises(HubError, match="'tester/policy' is gated: ask for access on its page"):
        pull("tester/policy")
    hub.fail_next(1, 503, match="/revision/main")
    with pytest.raises(HubError, match="'tester/policy' is not in the cache, and the Hub answered 503"):
        pull("tester/policy")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="no Hub repository 'tester/policy', or it is private"):
        pull("tester/policy")
    HfApi(token=hub.token).create_repo("tester/bare")
    with pytest.raises(HubError, match="'tester/bare' holds no file that hfpg reads"):
        pull("tester/bare")


def test_offline_a_pull_reads_the_cache(hub, saved, monkeypatch):
    push_folder(saved, "tester/policy")
    folder = pull("tester/policy")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    requests = len(hub.log)
    assert pull("tester/policy") == folder
    with pytest.raises(HubError, match="'tester/other' is not in the cache, and HF_HUB_OFFLINE=1 forbids requests"):
        pull("tester/other")
    assert len(hub.log) == requests
