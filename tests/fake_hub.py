"""A fake Hugging Face hub: the part of its HTTP interface that huggingface_hub uses."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_good"


@dataclass
class Repo:
    """A repository: its commits from the oldest on, each with all of its files."""

    private: bool = False
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits.append((sha, files))
        return sha

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        wanted = self.tags.get(revision, revision)
        return next((commit for commit in self.commits if commit[0] == wanted), None)

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1][1]


class FakeHub(ThreadingHTTPServer):
    """A server of repositories by type and name, which can be made to fail."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}  # large files, by SHA-256
        self.asked: list[str] = []
        self.damaged: set[str] = set()  # paths that are sent with a byte changed
        self.status: int | None = None  # answered to every request

    def add(self, kind: str, repo_id: str, files: dict[str, bytes]) -> Repo:
        repo = self.repos[kind, repo_id] = Repo()
        repo.commit(files)
        return repo


@contextmanager
def serving() -> Iterator[FakeHub]:
    """Run a hub until the block ends."""
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def handle_one(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b"".join(iter(self._chunk, b""))
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path}")
        if self.server.status is not None:
            self._answer(self.server.status, {"error": "on request"})
        elif path.startswith("/api/"):
            self._api(path.removeprefix("/api/"), body)
        elif path.startswith("/objects/"):
            self.server.objects[path.rpartition("/")[2]] = body
            self._answer(200)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body)["objects"])
        else:
            self._resolve(path)

    do_GET = do_HEAD = do_POST = do_PUT = handle_one

    def _api(self, path: str, body: bytes) -> None:
        if self.command == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer(401, {"error": "Invalid username or password."})
        elif path == "repos/create":
            self._create(json.loads(body))
        elif path == "validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif path.count("/") < 2:
            self._answer(404, {"error": "no such thing"})
        else:
            kinds, owner, name, *rest = path.split("/")
            repo = self.server.repos.get((kinds.removesuffix("s"), f"{owner}/{name}"))
            action, revision = (rest[0], "/".join(rest[1:])) if rest else ("revision", "main")
            commit = repo and repo.at(revision)
            if repo is None:
                self._answer(404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
            elif commit is None:
                self._answer(404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
            elif action == "revision":
                siblings = [{"rfilename": file} for file in commit[1]]
                self._answer(
                    200,
                    {
                        "id": f"{owner}/{name}",
                        "sha": commit[0],
                        "siblings": siblings,
                        "private": repo.private,
                        "tags": [],
                    },
                )
            elif action == "tree":
                self._answer(
                    200,
                    [
                        {"type": "file", "path": file, "size": len(content), "oid": "0"}
                        for file, content in commit[1].items()
                    ],
                )
            elif action == "preupload":
                files = json.loads(body)["files"]
                self._answer(
                    200,
                    {
                        "files": [
                            {
                                "path": file["path"],
                                "shouldIgnore": False,
                                "uploadMode": "lfs" if file["size"] > 8192 else "regular",
                            }
                            for file in files
                        ]
                    },
                )
            elif action == "commit":
                self._commit(repo, [json.loads(line) for line in body.splitlines()])

    def _create(self, wanted: dict[str, Any]) -> None:
        kind, repo_id = wanted["type"], f"{wanted['organization']}/{wanted['name']}"
        prefix = {"model": "", "dataset": "datasets/"}[kind]
        code = 409 if (kind, repo_id) in self.server.repos else 200
        if code == 200:
            repo = self.server.add(kind, repo_id, {".gitattributes": b""})
            repo.private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self._answer(code, {"url": f"{self.server.url}/{prefix}{repo_id}"})

    def _commit(self, repo: Repo, lines: list[dict[str, Any]]) -> None:
        files = dict(repo.files)
        for line in lines:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.server.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        sha = repo.commit(files)
        self._answer(200, {"commitUrl": f"{self.server.url}/o/n/commit/{sha}", "commitOid": sha})

    def _batch(self, objects: list[dict[str, Any]]) -> None:
        self._answer(
            200,
            {
                "transfer": "basic",
                "objects": [
                    {
                        **one,
                        "actions": {"upload": {"href": f"{self.server.url}/objects/{one['oid']}"}},
                    }
                    for one in objects
                ],
            },
        )

    def _resolve(self, path: str) -> None:
        where, _, rest = path[1:].partition("/resolve/")
        kind = "dataset" if where.startswith("datasets/") else "model"
        revision, _, file = rest.partition("/")
        commit = self.server.repos[kind, where.removeprefix("datasets/")].at(revision)
        assert commit is not None
        content = commit[1][file]
        if file in self.server.damaged:
            content = bytes([content[0] ^ 1]) + content[1:]
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit[0]}
        self._answer(200, content, headers)

    def _answer(self, code: int, content: Any = b"", headers: dict[str, str] | None = None) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        if not isinstance(content, bytes):
            self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _chunk(self) -> bytes:
        data = self.rfile.read(int(self.rfile.readline(), 16))
        self.rfile.readline()
        return data
