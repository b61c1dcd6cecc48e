"""A small Hub: the protocol that huggingface_hub speaks, on 127.0.0.1, in memory.

    with hub() as server: ...   # server.url is HF_ENDPOINT, server.token a token it accepts

Accounts, repositories, branches, preupload, LFS, commits, trees, files. `server.fail[step]` makes the next
requests of a step (create, lfs-batch, lfs-upload, preupload, commit) fail with a status.
"""

import base64
import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "right" * 6
USER, ORGANISATION = "ada", "lab"
ASPECTS = ("preupload", "commit", "branch", "revision", "tree", "paths-info", "refs")
Answer = tuple[int, Any]


@dataclass
class Repository:
    """Branches name commits, commits hold files: path -> content."""

    kind: str
    name: str
    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)  # of the commits that were made by clients

    def __post_init__(self) -> None:
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        content = f"{self.kind} {self.name} {branch} {len(self.commits)}".encode()
        sha = hashlib.sha1(content).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.resolve(revision) or ""]

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


def is_lfs(path: str, size: int) -> bool:
    return path.endswith((".safetensors", ".jsonl")) or size > 1 << 20


def blob_id(content: bytes) -> str:
    return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


class Refusal(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


class HubServer(ThreadingHTTPServer):
    """State of the Hub."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.token = TOKEN
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS: sha256 -> content
        self.uploads: list[str] = []  # sha256 of every upload, in order
        self.fail: dict[str, int] = {}  # step -> status of all its requests
        self.lock = Lock()

    def repository(self, name: str, kind: str = "model") -> Repository:
        return self.repositories[kind, name]


class Handler(BaseHTTPRequestHandler):
    """One request."""

    server: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def do_GET(self) -> None:
        self._serve(head=False)

    def do_HEAD(self) -> None:
        self._serve(head=True)

    def do_POST(self) -> None:
        self._serve(head=False)

    do_PUT = do_POST

    def _serve(self, head: bool) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        headers: dict[str, str] = {"Content-Type": "application/json"}
        try:
            with self.server.lock:
                status, content = self._route(unquote(parts.path), parse_qs(parts.query), body, headers)
        except Refusal as refusal:
            status, content = refusal.status, {"error": refusal.message}
            headers |= {"X-Error-Message": refusal.message, "X-Error-Code": refusal.code}
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        if status == 200 and (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"
            status, data = 206, data[first : last + 1]
        self.send_response(status)
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not head:
            self.wfile.write(data)

    # ------------------------------------------------------------------------------------------ routing

    def _route(self, path: str, query: dict[str, list[str]], body: bytes, headers: dict[str, str]) -> Answer:
        if path == "/api/whoami-v2":
            self._signed_in()
            return 200, {"name": USER, "type": "user", "orgs": [{"name": ORGANISATION}]}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if found := re.fullmatch(r"/lfs/(\w{64})", path):
            return self._upload(found[1], body)
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(json.loads(body))
        pattern = rf"/api/(model|dataset)s/([^/]+/[^/]+?)(?:/({'|'.join(ASPECTS)})(?:/(.*))?)?"
        if found := re.fullmatch(pattern, path):
            repository = self._repository(found[1], found[2])
            return self._about(repository, found[3] or "revision", found[4] or "main", body)
        if found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository = self._repository("dataset" if found[1] else "model", found[2])
            return self._file(repository, found[3], found[4], headers)
        raise Refusal(404, f"{path}: no such address")

    def _signed_in(self) -> None:
        given = self.headers.get("Authorization", "")
        if given != f"Bearer {self.server.token}":
            # A careless server: what it says repeats the token.
            raise Refusal(401, f"Invalid credentials in Authorization header ({given})")

    def _failing(self, step: str) -> None:
        if step in self.server.fail:
            raise Refusal(self.server.fail[step], f"made to fail at {step}")

    def _repository(self, kind: str, name: str) -> Repository:
        found = self.server.repositories.get((kind, name))
        if found is None or (found.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"):
            raise Refusal(401, "Repository not found", "RepoNotFound")
        return found

    def _create(self, wanted: dict[str, Any]) -> Answer:
        self._signed_in()
        self._failing("create")
        owner = wanted.get("organization") or USER
        if owner not in (USER, ORGANISATION):
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        kind, name = wanted.get("type") or "model", f"{owner}/{wanted['name']}"
        prefix = "datasets/" if kind == "dataset" else ""
        if (kind, name) in self.server.repositories:
            return 409, {"error": "You already created this repo", "url": f"{self.server.url}/{prefix}{name}"}
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.server.repositories[kind, name] = Repository(kind, name, bool(private))
        return 200, {"url": f"{self.server.url}/{prefix}{name}"}

    @staticmethod
    def _validate(text: str) -> Answer:
        from ruamel.yaml import YAML, YAMLError

        found = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        try:
            YAML(typ="safe").load(found[1] if found else "")
        except YAMLError as error:
            return 400, {"errors": [{"message": str(error).splitlines()[0]}], "warnings": []}
        return 200, {"errors": [], "warnings": []}

    def _about(self, repository: Repository, what: str, rest: str, body: bytes) -> Answer:
        if what == "refs":
            branches = [
                {"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha}
                for name, sha in repository.branches.items()
            ]
            return 200, {"branches": branches, "tags": [], "converts": []}
        if what == "branch":
            self._signed_in()
            if rest in repository.branches:
                raise Refusal(409, "Reference already exists")
            repository.branches[rest] = repository.branches["main"]
            return 200, {}
        revision, _, inside = rest.partition("/") if what == "tree" else (rest, "", "")
        sha = repository.resolve(revision)
        if sha is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = repository.commits[sha]
        if what == "preupload":
            self._signed_in()
            return self._modes(files, json.loads(body)["files"])
        if what == "commit":
            self._signed_in()
            return self._commit(repository, revision, sha, body)
        if what == "revision":
            return 200, {"id": repository.name, "sha": sha, "private": repository.private, "tags": [],
                         "siblings": [{"rfilename": name} for name in files]}  # fmt: skip
        if what == "tree":
            return 200, [_entry(name, files[name]) for name in sorted(files) if name.startswith(inside)]
        asked = parse_qs(body.decode()) if b"=" in body[:6] else json.loads(body)
        folders = {name.rpartition("/")[0] for name in files}
        entries = [_entry(name, files[name]) for name in asked["paths"] if name in files]
        found = [{"type": "directory", "path": n, "oid": "0" * 40} for n in asked["paths"] if n in folders]
        return 200, entries + found

    # ------------------------------------------------------------------------------------------ uploads

    def _modes(self, there: dict[str, bytes], files: list[dict[str, Any]]) -> Answer:
        self._failing("preupload")
        found = []
        for one in files:
            lfs = is_lfs(one["path"], one["size"])
            oid = None
            if one["path"] in there:
                content = there[one["path"]]
                oid = hashlib.sha256(content).hexdigest() if lfs else blob_id(content)
            mode = "lfs" if lfs else "regular"
            found.append({"path": one["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": found}

    def _batch(self, wanted: dict[str, Any]) -> Answer:
        self._signed_in()
        self._failing("lfs-batch")
        objects = []
        for one in wanted["objects"]:
            entry = {"oid": one["oid"], "size": one["size"]}
            if one["oid"] not in self.server.objects:
                href = f"{self.server.url}/lfs/{one['oid']}?X-Amz-Signature=secret"
                entry["actions"] = {"upload": {"href": href}}
            objects.append(entry)
        return 200, {"transfer": "basic", "objects": objects}

    def _upload(self, oid: str, body: bytes) -> Answer:
        self._failing("lfs-upload")
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, "the content is not what was announced")
        self.server.objects[oid] = body
        self.server.uploads.append(oid)
        return 200, {}

    def _commit(self, repository: Repository, branch: str, sha: str, body: bytes) -> Answer:
        self._failing("commit")
        lines = [json.loads(line) for line in body.splitlines() if line]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, sha):
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(repository.commits[sha])
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.objects:
                    raise Refusal(400, f"{value['path']}: was not uploaded")
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        made = repository.commit(branch, files)
        repository.messages.append(header["summary"])
        url = f"{self.server.url}/{repository.name}/commit/{made}"
        return 200, {"success": True, "commitOid": made, "commitUrl": url}

    @staticmethod
    def _file(repository: Repository, revision: str, path: str, headers: dict[str, str]) -> Answer:
        sha = repository.resolve(revision)
        if sha is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        headers["X-Repo-Commit"] = sha
        if path not in repository.commits[sha]:
            raise Refusal(404, "Entry not found", "EntryNotFound")
        content = repository.commits[sha][path]
        etag = hashlib.sha256(content).hexdigest() if is_lfs(path, len(content)) else blob_id(content)
        headers |= {"ETag": f'"{etag}"', "Content-Type": "application/octet-stream"}
        if is_lfs(path, len(content)):
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(content))}
        return 200, content


def _entry(name: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": blob_id(content)}
    if is_lfs(name, len(content)):
        sha = hashlib.sha256(content).hexdigest()
        entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 130}
    return entry


@contextlib.contextmanager
def hub() -> Iterator[HubServer]:
    """A Hub of one's own, until the block ends."""
    server = HubServer()
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def connect(server: HubServer, cache: Any, monkeypatch: Any) -> None:
    """Make huggingface_hub in this process a client of the server, as HF_ENDPOINT does for a new process."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # Xet's servers are another protocol
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setenv("HF_TOKEN", server.token)
