"""A server on this machine that speaks the Hub's API, for huggingface_hub's own client: repositories, LFS, commits."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LICENCES = ("apache-2.0", "mit", "openrail", "openrail++", "creativeml-openrail-m", "cc-by-4.0", "other")
RELATIONS = ("adapter", "merge", "finetune", "quantized")


@dataclass
class Repo:
    """A repository: the files of every commit, oldest first, and names of commits."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tags: tuple[str, ...] = ()
    gated: bool = False
    private: bool = False

    def commit(self, files: Mapping[str, bytes]) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[oid] = {**self.files(), **files}
        return oid

    def head(self) -> str:
        return next(reversed(self.commits), "")

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits.get(self.head() if revision in ("main", *self.tags) else revision, {})

    def has(self, revision: str) -> bool:
        return revision in ("main", *self.tags, *self.commits)


@dataclass
class Hub:
    """The state of the server."""

    repos: dict[str, Repo] = field(default_factory=dict)
    writers: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By token, the user and the organisations that it may write to; a token with none only reads."""
    objects: dict[str, bytes] = field(default_factory=dict)
    """Uploaded LFS objects by SHA-256."""
    requests: list[str] = field(default_factory=list)
    fails_at: str = ""
    """A part of the path of requests that fail, with the token in the message."""
    url: str = ""

    def add(self, name: str, files: Mapping[str, bytes], **options: Any) -> Repo:
        repo = self.repos[name] = Repo(**options)
        repo.commit(files)
        return repo


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a hub on a free port of loopback."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, hub=hub))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        server.shutdown()


def is_large(path: str) -> bool:
    return path.endswith((".safetensors", ".png"))


def front_matter(card: str) -> dict[str, Any]:
    """The metadata of a card."""
    block = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    assert block
    found = yaml.safe_load(block[1])
    assert isinstance(found, dict)
    return found


def faults(metadata: Mapping[str, Any]) -> list[str]:
    """Errors of a card's metadata that the Hub refuses."""
    found = []
    if metadata.get("license", "mit") not in LICENCES:
        found.append(f'"license" must be one of {", ".join(LICENCES)}')
    if metadata.get("base_model_relation", "merge") not in RELATIONS:
        found.append('"base_model_relation" is unknown')
    found += [f'"{key}" must be a list of strings' for key in ("tags",) if not isinstance(metadata.get(key, []), list)]
    return found


class Handler(BaseHTTPRequestHandler):
    """Answers requests as the Hub does."""

    protocol_version = "HTTP/1.1"

    def __init__(self, *args: Any, hub: Hub, **options: Any) -> None:
        self.hub = hub
        super().__init__(*args, **options)

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        match self._parts():
            case ["api", "whoami-v2"]:
                names = self.hub.writers.get(self.token)
                user = {"name": names[0] if names else "reader", "orgs": [{"name": n} for n in (names or ())[1:]]}
                self._refuse(401) if names is None else self._json(user)
            case ["api", "models", org, name, *rest]:
                self._about(f"{org}/{name}", rest)
            case [org, name, "resolve", revision, *path]:
                if repo := self._repo(f"{org}/{name}", revision):
                    content = repo.files(revision).get("/".join(path))
                    commit = repo.head() if revision in ("main", *repo.tags) else revision
                    self._refuse(404, "EntryNotFound") if content is None else self._file(content, commit)
            case _:
                self._refuse(404, "RepoNotFound")

    def _about(self, name: str, rest: list[str]) -> None:
        revision = rest[1] if rest[:1] in (["revision"], ["tree"]) else "main"
        repo = self._repo(name, revision)
        if repo is None:
            return
        files = repo.files(revision)
        if rest[:1] == ["refs"]:
            kinds = {"branches": ["main"], "tags": repo.tags}
            refs = {k: [{"name": n, "ref": n, "targetCommit": repo.head()} for n in ns] for k, ns in kinds.items()}
            self._json({"converts": [], **refs})
        elif rest[:1] == ["tree"]:
            self._json([{"type": "file", "path": n, "size": len(c), "oid": blob(c)} for n, c in files.items()])
        else:
            card = files.get("README.md", b"").decode()
            data = front_matter(card) if card.startswith("---\n") else None
            siblings = [self._sibling(path, content) for path, content in files.items()]
            self._json({"id": name, "sha": repo.head() or "0" * 40, "siblings": siblings, "cardData": data})

    def _sibling(self, path: str, content: bytes) -> dict[str, Any]:
        found: dict[str, Any] = {"rfilename": path, "size": len(content), "blobId": blob(content)}
        if is_large(path):
            found["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        return found

    def do_PUT(self) -> None:
        body = self._body()
        oid = self._parts()[-1]
        if hashlib.sha256(body).hexdigest() != oid:
            self._refuse(400, message="the content is not that of the oid")
            return
        self.hub.objects[oid] = body
        self._json({})

    def do_POST(self) -> None:
        body = self._body()
        parts = self._parts()
        if self.hub.fails_at and self.hub.fails_at in self.path:
            self._refuse(500, message=f"the server stumbled over Bearer {self.token}")
        elif parts == ["api", "validate-yaml"]:
            found = faults(front_matter(json.loads(body)["content"]))
            answer = {"errors": [{"message": fault} for fault in found], "warnings": []}
            self._json(answer, 400 if found else 200)
        elif self.token not in self.hub.writers:
            self._refuse(401, message="Invalid credentials in Authorization header")
        elif parts == ["api", "repos", "create"]:
            self._create(json.loads(body))
        elif parts[-3:] == ["lfs", "objects", "batch"]:
            objects = json.loads(body)["objects"]
            self._json({"transfer": "basic", "objects": [self._batch(each) for each in objects]})
        elif parts[:2] == ["api", "models"] and (repo := self._writable("/".join(parts[2:4]))):
            self._preupload(repo, json.loads(body)) if parts[4] == "preupload" else self._commit(repo, parts, body)

    def _create(self, asked: dict[str, Any]) -> None:
        org = asked.get("organization") or self.hub.writers[self.token][0]
        name = f"{org}/{asked['name']}"
        if name in self.hub.repos:
            self._json({"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}, 409)
        elif self._writes(org):
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            self.hub.repos[name] = Repo(private=private)
            self.hub.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
            self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.hub.url}/lfs/{asked['oid']}"}
        return {**asked, **({} if asked["oid"] in self.hub.objects else {"actions": {"upload": upload}})}

    def _preupload(self, repo: Repo, asked: dict[str, Any]) -> None:
        there = repo.files()
        paths = [each["path"] for each in asked["files"]]
        modes = {path: "lfs" if is_large(path) else "regular" for path in paths}
        oids = {path: blob(there[path]) for path in paths if path in there and not is_large(path)}
        oids |= {path: hashlib.sha256(there[path]).hexdigest() for path in paths if path in there and is_large(path)}
        files = [{"path": p, "uploadMode": modes[p], "shouldIgnore": False, "oid": oids.get(p)} for p in paths]
        self._json({"files": files})

    def _commit(self, repo: Repo, parts: list[str], body: bytes) -> None:
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.head()):
            self._refuse(412, message="The head of the branch is not the parent commit")
            return
        files = {line["value"]["path"]: self._content(line) for line in lines[1:]}
        oid = repo.commit(files)
        name = "/".join(parts[2:4])
        self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def _content(self, line: dict[str, Any]) -> bytes:
        if line["key"] == "lfsFile":
            return self.hub.objects[line["value"]["oid"]]
        return base64.b64decode(line["value"]["content"])

    def _writable(self, name: str) -> Repo | None:
        org = name.partition("/")[0]
        return self._repo(name) if self._writes(org) else None

    def _writes(self, org: str) -> bool:
        if org in self.hub.writers[self.token]:
            return True
        self._refuse(403, message=f'You don\'t have the rights to create a model under the namespace "{org}"')
        return False

    def _repo(self, name: str, revision: str = "main") -> Repo | None:
        """A repository that the token shows; None after it was refused."""
        repo = self.hub.repos.get(name)
        hidden = repo and repo.private and name.partition("/")[0] not in self.hub.writers.get(self.token, ())
        if repo is None or hidden:
            self._refuse(404 if self.token in self.hub.writers else 401, "RepoNotFound")
        elif repo.gated:
            self._refuse(403, "GatedRepo")
        elif not repo.has(revision):
            self._refuse(404, "RevisionNotFound")
        else:
            return repo
        return None

    def _parts(self) -> list[str]:
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def _body(self) -> bytes:
        self.hub.requests.append(f"{self.command} {urlsplit(self.path).path}")
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while length := int(self.rfile.readline(), 16):
            body += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _refuse(self, status: int, code: str = "", message: str = "") -> None:
        self._send(
            status, json.dumps({"error": message}).encode() if message else b"", {"X-Error-Code": code} if code else {}
        )

    def _json(self, data: Any, status: int = 200) -> None:
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    def _file(self, content: bytes, commit: str) -> None:
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        self._send(200, content, {"ETag": etag, "X-Repo-Commit": commit, "Content-Type": "application/octet-stream"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


def blob(content: bytes) -> str:
    """The name that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
