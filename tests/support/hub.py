"""A hub on the loopback, with as much of the protocol as huggingface_hub asks for, that misbehaves when told to."""

import contextlib
import hashlib
import json
import re
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

FIRST, SECOND = "1" * 40, "2" * 40
"""Commits."""


@dataclass
class Repository:
    """What is in a repository, and how it behaves."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Of each commit its files."""
    refs: dict[str, str] = field(default_factory=dict)
    """Branches and tags; `main` is the last commit if it isn't among them."""
    gated: bool = False
    """Only the listing is given; files answer 401, and 403 to who has a token."""
    answers: list[int] = field(default_factory=list)
    """Statuses that its next answers have; after them it behaves."""
    downloads: list[int] = field(default_factory=list)
    """The same for its next transfers alone."""
    retry_after: str | None = None
    """The header that comes with those statuses."""
    cut: dict[str, int] = field(default_factory=dict)
    """How often the transfer of a file still ends half-way of what was left."""
    delay: float = 0.0
    """Seconds that pass in the middle of a transfer."""

    def resolve(self, revision: str) -> str | None:
        """The commit of a revision."""
        refs = {"main": list(self.commits)[-1], **self.refs}
        return revision if revision in self.commits else refs.get(revision)


class Hub:
    """The server; a context."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        """By kind and name, as in `datasets/user/rows` and `models/user/base`."""
        self.requests: list[tuple[str, str]] = []
        """Method and path of each request; of a partial one the range too."""
        self.sent: Counter[str] = Counter()
        """How often a file was sent, or a part of it."""
        self.waits: list[float] = []
        """Seconds that the process which asks waited between tries, if the fixture notes them."""
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(self, name: str, *versions: dict[str, bytes], **behaviour: Any) -> Repository:
        """A repository whose commits are 1111…, 2222… and so on."""
        commits = {str(number) * 40: files for number, files in enumerate(versions, start=1)}
        self.repositories[name] = Repository(commits, **behaviour)
        return self.repositories[name]


class _Handler(BaseHTTPRequestHandler):
    server_hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError):  # the client left
            super().handle()

    def _answer(self, code: int, body: object = b"", headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _refuse(self, code: int, kind: str, message: str) -> None:
        self._answer(code, {"error": message}, {"X-Error-Code": kind, "X-Error-Message": message})

    def _route(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        path = unquote(urlparse(self.path).path)
        wanted = self.headers.get("range")
        self.server_hub.requests.append((self.command, f"{path} {wanted}" if wanted else path))
        is_api, rest = path.startswith("/api/"), path.removeprefix("/api/").strip("/")
        if not is_api and not rest.startswith("datasets/"):
            rest = f"models/{rest}"
        found = re.match(r"(?:models|datasets)/[^/]+/[^/]+", rest)
        repository = self.server_hub.repositories.get(found.group()) if found else None
        token = "authorization" in self.headers
        if found is None or repository is None:
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
            return
        after = {} if repository.retry_after is None else {"Retry-After": repository.retry_after}
        if repository.answers:
            self._answer(repository.answers.pop(0), b"", after)
        elif is_api:
            self._api(found.group(), repository, rest.removeprefix(found.group()), body)
        elif repository.gated:
            self._refuse(403 if token else 401, "GatedRepo", "Access is restricted.")
        elif repository.downloads and self.command == "GET":
            self._answer(repository.downloads.pop(0), b"", after)
        else:
            self._file(found.group(), repository, rest.removeprefix(found.group()))

    def _commit(self, repository: Repository, revision: str) -> str | None:
        commit = repository.resolve(revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def _api(self, name: str, repository: Repository, rest: str, body: bytes) -> None:
        revision, paths = re.fullmatch(r"(?:/revision/(.+))?", rest), re.fullmatch(r"/paths-info/([^/]+)", rest)
        if revision:
            if commit := self._commit(repository, revision.group(1) or "main"):
                files = [{"rfilename": path} for path in repository.commits[commit]]
                self._answer(
                    200, {"_id": "0", "id": name.partition("/")[2], "sha": commit, "tags": [], "siblings": files}
                )
        elif tree := re.fullmatch(r"/tree/([^/]+)", rest):
            if commit := self._commit(repository, tree.group(1)):
                held = repository.commits[commit].items()
                self._answer(200, [self._entry(path, content) for path, content in held])
        elif paths:
            if commit := self._commit(repository, paths.group(1)):
                asked = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
                held_files = repository.commits[commit]
                self._answer(200, [self._entry(path, held_files[path]) for path in asked if path in held_files])
        else:
            self._refuse(404, "EntryNotFound", f"no such call: {rest}")

    @staticmethod
    def _entry(path: str, content: bytes) -> dict[str, object]:
        return {"type": "file", "oid": hashlib.sha1(content).hexdigest(), "size": len(content), "path": path}

    def _file(self, name: str, repository: Repository, rest: str) -> None:
        asked = re.fullmatch(r"/resolve/([^/]+)/(.+)", rest)
        assert asked, rest
        commit, path = self._commit(repository, asked.group(1)), asked.group(2)
        if commit is None:
            return
        content = repository.commits[commit].get(path)
        if content is None:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if self.command == "HEAD":
            self._answer(200, content, headers)
            return
        self.server_hub.sent[f"{name}/{path}"] += 1
        begin, code = 0, 200
        if span := re.fullmatch(r"bytes=(\d+)-", self.headers.get("range") or ""):
            begin, code = int(span.group(1)), 206
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
        rest_of_it = content[begin:]
        self.send_response(code)
        for key, value in {**headers, "Content-Length": str(len(rest_of_it))}.items():
            self.send_header(key, value)
        self.end_headers()
        half = len(rest_of_it) // 2
        self.wfile.write(rest_of_it[:half])
        self.wfile.flush()
        if repository.delay:
            time.sleep(repository.delay)
        if repository.cut.get(path, 0) > 0:
            repository.cut[path] -= 1
            self.close_connection = True
            self.connection.shutdown(2)
            return
        self.wfile.write(rest_of_it[half:])

    do_GET = do_HEAD = do_POST = _route
