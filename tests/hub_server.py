"""A Hugging Face hub on this machine: repositories in memory, behind as much of its HTTP API as reads them.

What is large lies behind a redirect to another host name, as on the hub; commits, ETags and errors come in its headers.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

GOOD_TOKEN = "good"
_LARGE = (".safetensors",)


@dataclass
class Repo:
    """A repository. `gate` is "private" (to all but the good token) or "gated": what is there is seen, and not read."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    gate: str | None = None


class HubServer:
    """The server.

    Attributes:
        repos: by id.
        requests: method, path, and the Authorization header that came, of each.
        cuts: of how many more files only the half comes, then the connection drops.
        damaged: whether large files come with other bytes.
        names_only: whether listings say no sizes, as those of some mirrors.
        status: what everything is answered with instead, if not None.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[tuple[str, str, str | None]] = []
        self.cuts = 0
        self.damaged = self.names_only = False
        self.status: int | None = None
        self._server: ThreadingHTTPServer | None = None
        self.port = 0

    def start(self) -> None:
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def commit(self, repo: str, files: dict[str, bytes], *, branch: str = "main", gate: str | None = None) -> str:
        """Commit these files, and none but these, on a branch; returns the commit."""
        made = self.repos.setdefault(repo, Repo())
        made.gate = gate
        digest = hashlib.sha1(repr((len(made.commits), sorted(files.items()))).encode()).hexdigest()
        made.commits[digest] = files
        made.branches[branch] = digest
        return digest

    def downloads(self) -> list[str]:
        """The paths of files that were asked for with GET."""
        return [path for method, path, _ in self.requests if method == "GET" and not path.startswith("/api/")]


def files_below(folder: Path) -> dict[str, bytes]:
    """A folder's files by relative path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class _Handler(BaseHTTPRequestHandler):
    server_hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server_hub, unquote(urlsplit(self.path).path)
        if hub._server is None:  # a connection that was open when it stopped
            self.close_connection = True
            return
        self.token = self.headers.get("Authorization")
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "agent-harnesses"]:  # the library's own curiosity, once a process
            self._answer(404)
            return
        hub.requests.append((self.command, path, self.token))
        if hub.status is not None:
            self._answer(hub.status)
        elif parts[0] == "cdn":
            self._file(
                next(
                    c
                    for r in hub.repos.values()
                    for f in r.commits.values()
                    for c in f.values()
                    if hashlib.sha256(c).hexdigest() == parts[1]
                ),
                {},
            )
        elif parts[0] == "api":
            self._info("/".join(parts[2:4]), "/".join(parts[5:]) or "main")
        else:
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))

    def _commit(self, repo: str, revision: str, *, to_read: bool) -> tuple[str, dict[str, bytes]] | None:
        """A revision's files; None once it is said why not."""
        found = self.server_hub.repos.get(repo)
        if self.token not in (None, f"Bearer {GOOD_TOKEN}"):
            self._answer(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif found is None or (found.gate == "private" and self.token is None):
            self._answer(404 if self.token else 401, {"X-Error-Code": "RepoNotFound"})
        elif to_read and found.gate == "gated":
            self._answer(403 if self.token else 401, {"X-Error-Code": "GatedRepo"})
        elif (commit := found.branches.get(revision, revision)) not in found.commits:
            self._answer(404, {"X-Error-Code": "RevisionNotFound"})
        else:
            return commit, found.commits[commit]
        return None

    def _info(self, repo: str, revision: str) -> None:
        if (at := self._commit(repo, revision, to_read=False)) is None:
            return
        siblings = []
        for name, content in at[1].items():
            row: dict[str, Any] = {"rfilename": name}
            if not self.server_hub.names_only:
                row |= {"size": len(content), "blobId": _blob(content)}
                if name.endswith(_LARGE):
                    row["lfs"] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest(), "pointerSize": 9}
            siblings.append(row)
        info = {"id": repo, "modelId": repo, "sha": at[0], "lastModified": "2026-01-02T03:04:05.000Z"}
        self._answer(200, {"Content-Type": "application/json"}, json.dumps({**info, "siblings": siblings}).encode())

    def _resolve(self, repo: str, revision: str, name: str) -> None:
        if (at := self._commit(repo, revision, to_read=True)) is None:
            return
        commit, files = at
        head = {"X-Repo-Commit": commit}
        if name not in files:
            self._answer(404, {**head, "X-Error-Code": "EntryNotFound"})
        elif name.endswith(_LARGE):
            digest = hashlib.sha256(files[name]).hexdigest()
            linked = {"X-Linked-Size": str(len(files[name])), "X-Linked-Etag": f'"{digest}"'}
            self._answer(302, {**head, **linked, "Location": f"http://localhost:{self.server_hub.port}/cdn/{digest}"})
        else:
            self._file(files[name], {**head, "ETag": f'"{_blob(files[name])}"'})

    def _file(self, content: bytes, head: dict[str, str]) -> None:
        hub = self.server_hub
        if hub.damaged:
            content = bytes(byte ^ 1 for byte in content)
        start = 0
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            head = {**head, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        cut = self.command == "GET" and hub.cuts > 0
        hub.cuts -= cut
        self._answer(206 if asked else 200, head, content[start:], cut=cut)

    def _answer(self, status: int, head: dict[str, str] | None = None, body: bytes = b"", *, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in (head or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
