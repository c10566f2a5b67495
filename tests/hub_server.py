"""A Hugging Face Hub on loopback, for tests: the real `huggingface_hub` client pushes to it and pulls from it.

    with HubServer() as hub:
        subprocess.run([sys.executable, script], env={**os.environ, **hub.env(tmp_path)})
        assert hub.files("tester/policy") == [".gitattributes", "config.json", "model.safetensors"]

It knows model repositories only, keeps them in memory, and speaks the plain LFS protocol but not Xet: the client needs
`HF_HUB_DISABLE_XET=1`, which `env` sets. `huggingface_hub` reads `HF_ENDPOINT` when it is imported, hence the
subprocess.
"""

import base64
import dataclasses
import fnmatch
import hashlib
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


GITATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.bin filter=lfs diff=lfs merge=lfs -text\n"
LFS_PATTERNS = ("*.safetensors", "*.bin")


class Refused(Exception):
    """A request that the Hub answers with an error status.

    Args:
        status: HTTP status.
        message: goes to the `X-Error-Message` header and to the body.
        code: the `X-Error-Code` from which the client chooses its exception class.
        extra: more fields of the body.
    """

    def __init__(self, status: int, message: str, code: str | None = None, **extra: str) -> None:
        super().__init__(message)
        self.status, self.code, self.body = status, code, {"error": message, **extra}
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


@dataclasses.dataclass(frozen=True)
class Blob:
    """One version of one file, known by the two names that git and git-lfs give it."""

    data: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        spec = "https://git-lfs.github.com/spec/v1"
        return f"version {spec}\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def git_oid(self) -> str:
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        """What the client compares with its own hash to skip files that have not changed."""
        return self.sha256 if self.lfs else self.git_oid


Tree = dict[str, Blob]


@dataclasses.dataclass
class Repo:
    """A model repository: immutable commits, and branches that point at them."""

    private: bool
    commits: dict[str, Tree] = dataclasses.field(default_factory=dict)
    titles: dict[str, str] = dataclasses.field(default_factory=dict)
    branches: dict[str, str] = dataclasses.field(default_factory=dict)

    def commit(self, branch: str, tree: Tree, title: str) -> str:
        """Adds a commit to a branch and returns its sha."""
        names = [(path, blob.git_oid) for path, blob in sorted(tree.items())]
        sha = hashlib.sha1(json.dumps([len(self.commits), title, names]).encode()).hexdigest()
        self.commits[sha], self.titles[sha], self.branches[branch] = tree, title, sha
        return sha

    def resolve(self, revision: str) -> str:
        """The sha of a branch name or of a sha. Raises `Refused` (404) for any other name."""
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha


class HubServer:
    """The server and its state; a context manager.

    Args:
        token: the one access token that is accepted; its owner is `USER`.
        lfs: False stores every file as a regular one, so that a client with Xet enabled can push too.

    Attributes:
        url: what `HF_ENDPOINT` has to be.
        log: (method, path, status) of each request so far.
        repos: the repositories by id.
        objects: the bodies of LFS uploads by sha256.
    """

    USER = "tester"

    def __init__(self, token: str = "hf_test_token", lfs: bool = True) -> None:
        self.token, self.lfs = token, lfs
        self.account: dict[str, Any] = {"type": "user", "id": "0", "name": self.USER, "orgs": []}
        self.log: list[tuple[str, str, int]] = []
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.lock = threading.RLock()
        self._failures: list[tuple[str, Refused]] = []
        # A class of its own, because `BaseHTTPRequestHandler` is made per request and takes no arguments of ours.
        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._httpd.daemon_threads = True
        self._thread = threading.Thread(target=self._httpd.serve_forever, args=(0.02,), daemon=True)
        self.url = f"http://127.0.0.1:{self._httpd.server_address[1]}"

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._httpd.shutdown()
        self._httpd.server_close()
        self._thread.join()

    def env(self, home: str | Path) -> dict[str, str]:
        """Environment variables that point a subprocess at this server, logged in.

        Args:
            home: `HF_HOME` of the subprocess: its cache and, if it has one, its token file.
        """
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": self.token,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
        }

    def use_here(self, monkeypatch: Any, home: Path) -> None:
        """Points the `huggingface_hub` of this process at the server, logged in, and forbids any other address.

        An `HfApi` made after this obeys; `transformers` may keep copies of its own: give it a subprocess with `env`.

        Args:
            monkeypatch: the pytest fixture, which undoes everything after the test.
            home: folder for the cache and the token file.
        """
        values = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_OFFLINE": False,
        }
        for name, value in values.items():
            monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
        monkeypatch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        monkeypatch.setenv("HF_TOKEN", self.token)
        connect = socket.socket.connect

        def loopback_only(sock: socket.socket, address: Any) -> None:
            assert address[0] == "127.0.0.1", f"a test tried to reach {address}"
            connect(sock, address)

        monkeypatch.setattr(socket.socket, "connect", loopback_only)

    def fail_next(self, n: int, status: int, match: str = "", code: str | None = None) -> None:
        """Answers the next `n` requests with an error.

        Args:
            n: number of requests.
            status: HTTP status, such as 401 or 503.
            match: only requests whose path contains this text count.
            code: the `X-Error-Code`, such as `GatedRepo`.
        """
        with self.lock:
            self._failures += [(match, Refused(status, f"simulated {status}", code))] * n

    def files(self, repo_id: str, revision: str = "main") -> list[str]:
        """Sorted paths of the files in a repository."""
        return sorted(self.tree(repo_id, revision))

    def tree(self, repo_id: str, revision: str = "main") -> Tree:
        """The files in a repository by path."""
        repo = self.repos[repo_id]
        return repo.commits[repo.resolve(revision)]

    def calls(self, part: str, method: str = "POST") -> list[int]:
        """Statuses of the requests of this method whose path contains `part`, in order."""
        return [status for verb, path, status in self.log if verb == method and part in path]

    def planned_failure(self, path: str) -> Refused | None:
        """Takes the failure that `fail_next` has in store for this path, if any."""
        with self.lock:
            due = next((failure for failure in self._failures if failure[0] in path), None)
            if due is not None:
                self._failures.remove(due)
            return due[1] if due else None


def _node(path: str, blob: Blob) -> dict[str, Any]:
    """A file as the tree and paths-info endpoints describe it."""
    lfs = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
    node = {"type": "file", "path": path, "oid": blob.git_oid, "size": len(blob.data)}
    return node | {"lfs": lfs} if blob.lfs else node


def _folder(path: str) -> dict[str, Any]:
    """A folder as the tree and paths-info endpoints describe it."""
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}


def _byte_range(header: str, size: int) -> tuple[int, int] | None:
    """First and last byte of a `bytes=a-b`, `bytes=a-` or `bytes=-n` header, or None without one."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", header)
    if match is None or match[0] == "bytes=-":
        return None
    first, last = match[1], match[2]
    if not first:
        return max(size - int(last), 0), size - 1
    return int(first), min(int(last), size - 1) if last else size - 1


class _Handler(BaseHTTPRequestHandler):
    """One request. An endpoint is a method in `ROUTES`; it answers with `reply` or raises `Refused`."""

    hub: HubServer  # set by HubServer in a subclass
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two writes; without this each answer waits 40 ms for an ACK

    def log_message(self, format: str, *args: object) -> None:  # house: overrides printing with nothing, on purpose
        """Silent: `HubServer.log` is the record."""

    def handle_any(self) -> None:
        """Finds the endpoint, checks the token, and turns `Refused` into an answer of the Hub."""
        url = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(url.query).items()}
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            failure = self.hub.planned_failure(self.path)
            if failure is not None:
                raise failure
            endpoint, arguments, needs_token = self._route(url.path)
            self.authorized = self._check_token(needs_token)
            with self.hub.lock:
                getattr(self, endpoint)(**arguments)
        except Refused as refused:
            self.reply(refused.body, status=refused.status, headers=refused.headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def _route(self, path: str) -> tuple[str, dict[str, str], bool]:
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, endpoint, needs_token in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and verb == method:
                return endpoint, {k: unquote(v) for k, v in match.groupdict().items() if v is not None}, needs_token
        raise Refused(404, f"no endpoint for {self.command} {path}")

    def _check_token(self, needed: bool) -> bool:
        """Whether the caller is logged in. Raises `Refused` for a wrong token, or for none where one is needed."""
        sent = self.headers.get("Authorization")
        if sent is not None and sent != f"Bearer {self.hub.token}":
            raise Refused(401, "Invalid credentials in Authorization header")
        if needed and sent is None:
            raise Refused(401, "Invalid username or password.")
        return sent is not None

    def reply(
        self, payload: Any = None, status: int = 200, headers: dict[str, str] | None = None, raw: bytes | None = None
    ) -> None:
        """Sends JSON, or `raw` bytes, and writes the log line."""
        data = json.dumps(payload).encode() if raw is None else raw
        self.hub.log.append((self.command, self.path, status))
        self.send_response(status)
        kind = "application/json" if raw is None else "application/octet-stream"
        for key, value in {"Content-Type": kind, "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def repo(self, repo_id: str) -> Repo:
        """The repository, if it exists and the caller may see it; the Hub gives the same 401 in both cases."""
        repo = self.hub.repos.get(repo_id)
        if repo is not None and (self.authorized or not repo.private):
            return repo
        if self.authorized:
            raise Refused(404, "Repository not found", "RepoNotFound")
        raise Refused(401, "Invalid username or password.", "RepoNotFound")

    # Accounts and repositories

    def whoami(self) -> None:
        self.reply(self.hub.account)

    def agent_harnesses(self) -> None:
        """Asked for once a day unless telemetry is off; the client breaks on anything but an object."""
        self.reply({})

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        closed = not content.startswith("---\n") or "\n---\n" in content[3:]
        errors = [] if closed else [{"message": "the front matter is not closed"}]
        self.reply({"errors": errors, "warnings": []}, status=400 if errors else 200)

    def create_repo(self) -> None:
        wanted = json.loads(self.body)
        repo_id = f"{wanted['organization'] or self.hub.USER}/{wanted['name']}"
        url = f"{self.hub.url}/{repo_id}"
        if repo_id in self.hub.repos:
            raise Refused(409, "You already created this model repo", url=url)
        private = wanted.get("visibility") == "private" or wanted.get("private") is True  # as before huggingface_hub 2
        repo = Repo(private=private)
        repo.commit("main", {".gitattributes": Blob(GITATTRIBUTES)}, "initial commit")
        self.hub.repos[repo_id] = repo
        self.reply({"url": url, "name": repo_id, "id": repo_id})

    def create_branch(self, repo_id: str, branch: str) -> None:
        repo = self.repo(repo_id)
        if branch in repo.branches:
            raise Refused(409, f"Reference already exists: {branch}")
        repo.branches[branch] = repo.resolve(json.loads(self.body or b"{}").get("startingPoint") or "main")
        self.reply({})

    # Upload: preupload says how, LFS takes the large files, commit makes them visible

    def preupload(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id)
        tree = repo.commits[repo.resolve(revision)]
        answers = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            lfs = self.hub.lfs and any(fnmatch.fnmatch(path, pattern) for pattern in LFS_PATTERNS)
            answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            answers.append(answer | ({"oid": tree[path].etag} if path in tree else {}))
        self.reply({"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        self.repo(repo_id)
        answers = []
        for wanted in json.loads(self.body)["objects"]:
            answer: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"], "authenticated": True}
            if wanted["oid"] not in self.hub.objects:
                href = f"{self.hub.url}/lfs/{wanted['oid']}"
                answer["actions"] = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
            answers.append(answer)
        self.reply({"transfer": "basic", "objects": answers})

    def lfs_put(self, oid: str) -> None:
        """Takes an object. The client sends no token here: on the real Hub the URL itself is signed."""
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "sha256 does not match oid")
        self.hub.objects[oid] = self.body
        self.reply({})

    def lfs_verify(self, oid: str) -> None:
        if len(self.hub.objects.get(oid, b"")) != json.loads(self.body)["size"]:
            raise Refused(404, "LFS object not found")
        self.reply({})

    def commit(self, repo_id: str, revision: str) -> None:
        """All operations of a commit or none: the branch moves after the last one has succeeded."""
        repo = self.repo(repo_id)
        tree, title = dict(repo.commits[repo.resolve(revision)]), ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            if operation["key"] == "header":
                title = operation["value"]["summary"]
            else:
                self._apply(tree, operation["key"], operation["value"])
        sha = repo.commit(revision, tree, title)
        self.reply({"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{sha}"})

    def _apply(self, tree: Tree, key: str, value: dict[str, str]) -> None:
        """Applies one operation of a commit to `tree`."""
        path = value["path"]
        if key == "file":
            tree[path] = Blob(base64.b64decode(value["content"], validate=True))
        elif key == "lfsFile":
            if value["oid"] not in self.hub.objects:
                raise Refused(400, f"LFS object {value['oid']} was never uploaded ({path})")
            tree[path] = Blob(self.hub.objects[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            doomed = [p for p in tree if p == path or p.startswith(path.rstrip("/") + "/")]
            if not doomed:
                raise Refused(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
            for p in doomed:
                del tree[p]
        else:
            raise Refused(400, f"unknown commit operation {key!r}")

    # Reading

    def model_info(self, repo_id: str, revision: str = "main") -> None:
        repo = self.repo(repo_id)
        sha = repo.resolve(revision)
        siblings = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        flags = {"private": repo.private, "gated": False, "disabled": False, "lastModified": now, "tags": []}
        self.reply({"id": repo_id, "modelId": repo_id, "sha": sha, "siblings": siblings, **flags})

    def list_tree(self, repo_id: str, revision: str, folder: str = "") -> None:
        repo = self.repo(repo_id)
        tree, prefix = repo.commits[repo.resolve(revision)], f"{folder}/" if folder else ""
        inside = sorted(path for path in tree if path.startswith(prefix))
        if folder and not inside:
            raise Refused(404, f"{folder} does not exist", "EntryNotFound")
        depth = 99 if self.query.get("recursive", "").lower() in ("true", "1") else prefix.count("/")
        parents = {
            path.rsplit("/", i)[0] for path in inside for i in range(1, path.count("/") - prefix.count("/") + 1)
        }
        folders = [_folder(path) for path in sorted(parents) if path.count("/") <= depth]
        self.reply(folders + [_node(path, tree[path]) for path in inside if path.count("/") <= depth])

    def paths_info(self, repo_id: str, revision: str) -> None:
        repo = self.repo(repo_id)
        tree = repo.commits[repo.resolve(revision)]
        wanted = parse_qs(self.body.decode()).get("paths", [])
        folders = [_folder(path) for path in wanted if any(p.startswith(f"{path.rstrip('/')}/") for p in tree)]
        self.reply(folders + [_node(path, tree[path]) for path in wanted if path in tree])

    def refs(self, repo_id: str) -> None:
        branches = self.repo(repo_id).branches.items()
        rows = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in branches]
        self.reply({"branches": rows, "tags": [], "converts": []})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        """HEAD or GET of a file, whole or a range of bytes (a download that goes on where it was cut)."""
        repo = self.repo(repo_id)
        sha = repo.resolve(revision)
        blob = repo.commits[sha].get(path)
        headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if blob is None:  # with the commit in the headers, the client caches the absence
            missing = Refused(404, "Entry not found", "EntryNotFound")
            return self.reply(missing.body, status=404, headers=missing.headers | headers)
        headers["ETag"] = f'"{blob.etag}"'
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        wanted = _byte_range(self.headers.get("Range", ""), len(blob.data))
        if wanted is None:
            return self.reply(raw=blob.data, headers=headers)
        first, last = wanted
        if first > last:
            return self.reply({"error": "range"}, 416, headers | {"Content-Range": f"bytes */{len(blob.data)}"})
        headers["Content-Range"] = f"bytes {first}-{last}/{len(blob.data)}"
        return self.reply(raw=blob.data[first : last + 1], status=206, headers=headers)


_REPO = r"(?P<repo_id>[^/]+/[^/]+)"
_AT = r"(?P<revision>[^/]+)"
ROUTES = [  # method, path, endpoint, whether a token is needed
    ("GET", r"/api/whoami-v2", "whoami", True),
    ("GET", r"/api/agent-harnesses", "agent_harnesses", False),
    ("POST", r"/api/validate-yaml", "validate_yaml", False),
    ("POST", r"/api/repos/create", "create_repo", True),
    ("POST", rf"/api/models/{_REPO}/branch/(?P<branch>[^/]+)", "create_branch", True),
    ("POST", rf"/api/models/{_REPO}/preupload/{_AT}", "preupload", True),
    ("POST", rf"/api/models/{_REPO}/commit/{_AT}", "commit", True),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", "lfs_batch", True),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_put", False),
    ("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify", "lfs_verify", True),
    ("GET", rf"/api/models/{_REPO}", "model_info", False),
    ("GET", rf"/api/models/{_REPO}/revision/{_AT}", "model_info", False),
    ("GET", rf"/api/models/{_REPO}/tree/{_AT}(?:/(?P<folder>.+))?", "list_tree", False),
    ("POST", rf"/api/models/{_REPO}/paths-info/{_AT}", "paths_info", False),
    ("GET", rf"/api/models/{_REPO}/refs", "refs", False),
    ("GET", rf"/{_REPO}/resolve/{_AT}/(?P<path>.+)", "resolve", False),
]
