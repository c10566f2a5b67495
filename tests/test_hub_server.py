"""The stand-in Hub against the real client: what these tests accept is what the push and pull tests may rely on."""

import hashlib
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub_server import HubServer


ROOT = Path(__file__).parents[1]


@pytest.fixture
def hub(request, monkeypatch, tmp_path):
    with HubServer(lfs=getattr(request, "param", True)) as server:
        server.use_here(monkeypatch, tmp_path / "home")
        yield server


@pytest.fixture
def api(hub):
    return HfApi()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "folder"
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("hello\n")
    (folder / "empty.txt").touch()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# card\n")
    (folder / "model.safetensors").write_bytes(os.urandom(300_000))
    (folder / "sub" / "deep" / "b.bin").write_bytes(os.urandom(1000))
    return folder


def fetch(url: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, dict, bytes]:
    request = urllib.request.Request(url, body, headers, method=method)
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, dict(response.headers), response.read()
    except urllib.error.HTTPError as error:
        return error.code, dict(error.headers), error.read()


@pytest.mark.parametrize("hub", [True, False], ids=["lfs", "regular"], indirect=True)
def test_a_folder_makes_the_round_trip_and_is_not_sent_twice(hub, api, folder):
    api.create_repo("tester/m")
    first = api.upload_folder(repo_id="tester/m", folder_path=folder)
    assert bool(hub.calls("/lfs/", "PUT")) == hub.lfs
    snapshot = Path(api.snapshot_download("tester/m"))
    for path in (p for p in folder.rglob("*") if p.is_file()):
        assert (snapshot / path.relative_to(folder)).read_bytes() == path.read_bytes()
    commits = hub.calls("/commit/")
    assert api.upload_folder(repo_id="tester/m", folder_path=folder).oid == first.oid
    assert hub.calls("/commit/") == commits == [200]


def test_repositories_are_created_once(hub, api):
    assert api.create_repo("short").repo_id == "tester/short"
    assert api.create_repo("tester/short", exist_ok=True).repo_id == "tester/short"
    with pytest.raises(HfHubHTTPError) as caught:
        api.create_repo("tester/short")
    assert caught.value.response.status_code == 409
    api.create_repo("tester/hidden", private=True)
    assert api.model_info("tester/hidden").private and not api.model_info("tester/short").private


def test_listings(hub, api, folder):
    api.create_repo("tester/m")
    api.upload_folder(repo_id="tester/m", folder_path=folder)
    root = {".gitattributes", "README.md", "a.txt", "empty.txt", "model.safetensors"}
    assert {node.path for node in api.list_repo_tree("tester/m")} == root | {"sub"}
    everything = {node.path for node in api.list_repo_tree("tester/m", recursive=True)}
    assert everything == root | {"sub", "sub/deep", "sub/deep/b.bin"}
    assert {node.path for node in api.list_repo_tree("tester/m", "sub")} == {"sub/deep"}
    assert [info.path for info in api.get_paths_info("tester/m", ["a.txt", "absent"])] == ["a.txt"]
    assert [branch.name for branch in api.list_repo_refs("tester/m").branches] == ["main"]
    assert api.model_info("tester/m").sha == api.list_repo_refs("tester/m").branches[0].target_commit


def test_a_commit_adds_and_deletes_on_its_own_branch(hub, api, folder):
    api.create_repo("tester/m")
    api.upload_folder(repo_id="tester/m", folder_path=folder)
    api.create_branch("tester/m", branch="dev")
    operations = [
        CommitOperationAdd("new.txt", b"new"),
        CommitOperationDelete("a.txt"),
        CommitOperationDelete("sub/", is_folder=True),
    ]
    api.create_commit("tester/m", operations, commit_message="tidy", revision="dev")
    assert hub.files("tester/m", "dev") == [
        ".gitattributes",
        "README.md",
        "empty.txt",
        "model.safetensors",
        "new.txt",
    ]
    assert "a.txt" in hub.files("tester/m", "main")


def test_a_failed_operation_leaves_the_branch_where_it_was(hub, api):
    api.create_repo("tester/m")
    operations = [CommitOperationAdd("new.txt", b"new"), CommitOperationDelete("absent.txt")]
    with pytest.raises(EntryNotFoundError):
        api.create_commit("tester/m", operations, commit_message="half")
    assert hub.files("tester/m") == [".gitattributes"]


def test_errors_reach_the_client_as_its_own_classes(hub, api):
    api.create_repo("tester/hidden", private=True)
    with pytest.raises(RepositoryNotFoundError) as missing:
        api.model_info("tester/absent")
    with pytest.raises(RepositoryNotFoundError) as hidden:
        HfApi(token=False).model_info("tester/hidden")
    assert (missing.value.response.status_code, hidden.value.response.status_code) == (404, 401)
    with pytest.raises(RevisionNotFoundError):
        api.model_info("tester/hidden", revision="absent")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("tester/hidden", "absent")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as refused:
        HfApi(token="hf_wrong").create_repo("tester/x")
    assert refused.value.response.status_code == 401
    with pytest.raises(ValueError, match="front matter"):
        api.upload_file(path_or_fileobj=b"---\nlicense: mit\n", path_in_repo="README.md", repo_id="tester/hidden")


def test_planned_failures_happen_once_and_only_where_planned(hub, api):
    api.create_repo("tester/m")
    hub.fail_next(2, 500, match="/api/models/")
    hub.fail_next(1, 403, match="whoami", code="GatedRepo")
    for _ in range(2):
        with pytest.raises(HfHubHTTPError, match="simulated 500"):
            api.model_info("tester/m")
    with pytest.raises(GatedRepoError):
        api.whoami()
    assert api.model_info("tester/m").id == "tester/m"
    assert api.whoami()["name"] == HubServer.USER


def test_an_lfs_object_must_have_the_hash_that_it_is_stored_under(hub, api):
    good = hashlib.sha256(b"data").hexdigest()
    assert fetch(f"{hub.url}/lfs/{'0' * 64}", "PUT", b"data")[0] == 400
    assert fetch(f"{hub.url}/lfs/{good}", "PUT", b"data")[0] == 200
    assert list(hub.objects) == [good]
    api.create_repo("tester/m")
    entry = {"path": "x.bin", "algo": "sha256", "oid": "1" * 64, "size": 4}
    lines = [{"key": "header", "value": {"summary": "x"}}, {"key": "lfsFile", "value": entry}]
    body = "\n".join(map(json.dumps, lines)).encode()
    url = f"{hub.url}/api/models/tester/m/commit/main"
    status, headers, _ = fetch(url, "POST", body, Authorization=f"Bearer {hub.token}")
    assert status == 400 and "never uploaded" in headers["X-Error-Message"]


@pytest.mark.parametrize(
    ("wanted", "status", "part"),
    [("bytes=0-3", 206, slice(0, 4)), ("bytes=5-", 206, slice(5, None)), ("bytes=-2", 206, slice(-2, None))]
    + [("bytes=2-99", 206, slice(2, None)), ("", 200, slice(None)), ("bytes=10-", 416, None)],
)
def test_a_download_can_start_anywhere(hub, api, wanted, status, part):
    api.create_repo("tester/m")
    api.upload_file(path_or_fileobj=b"0123456789", path_in_repo="x.bin", repo_id="tester/m")
    got, headers, body = fetch(f"{hub.url}/tester/m/resolve/main/x.bin", Range=wanted)
    assert got == status
    if part is not None:
        assert body == b"0123456789"[part] and int(headers["Content-Length"]) == len(body)
    head, headers, body = fetch(f"{hub.url}/tester/m/resolve/main/x.bin", "HEAD")
    assert (head, headers["Content-Length"], body) == (200, "10", b"")
    assert headers["X-Repo-Commit"] == api.model_info("tester/m").sha


GPT2_ROUND_TRIP = """
import sys
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel
from hfpg.hub import pull, push_folder

torch.set_num_threads(1)
torch.manual_seed(0)
config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
model = GPT2LMHeadModel(config)
model.save_pretrained(sys.argv[1])
push_folder(sys.argv[1], "tester/tiny-gpt2", private=True)
for source in ("tester/tiny-gpt2", pull("tester/tiny-gpt2")):
    loaded = AutoModelForCausalLM.from_pretrained(source)
    pairs = zip(model.state_dict().items(), loaded.state_dict().items(), strict=True)
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
print("bit-equal")
"""


def test_a_gpt2_is_pushed_and_loaded_by_its_name_bit_for_bit(tmp_path):
    with HubServer() as hub:
        run = subprocess.run(
            [sys.executable, "-c", GPT2_ROUND_TRIP, str(tmp_path / "saved")],
            env={**os.environ, **hub.env(tmp_path / "home"), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == 0, run.stderr
        assert run.stdout.splitlines()[-1] == "bit-equal"
        assert hub.files("tester/tiny-gpt2") == [
            ".gitattributes",
            "config.json",
            "generation_config.json",
            "model.safetensors",
        ]
        assert hub.repos["tester/tiny-gpt2"].private and hub.tree("tester/tiny-gpt2")["model.safetensors"].lfs
        assert hub.token not in run.stdout + run.stderr
        assert [row for row in hub.log if row[2] >= 500] == []
