"""A stand-in for the HTTP API of the Hugging Face Hub, as far as a push, a download and their errors need it."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_stand-in"  # of no account


class HubServer(ThreadingHTTPServer):
    """Repositories in memory: name -> [(commit, {file: content})], the newest last."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, list[tuple[str, dict[str, bytes]]]] = {}
        self.refused_commits = False
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def commit(self, name: str, files: dict[str, bytes]) -> str:
        commits = self.repositories[name]
        whole = {**(commits[-1][1] if commits else {}), **files}
        oid = hashlib.sha1(repr((len(commits), sorted(whole.items()))).encode()).hexdigest()
        commits.append((oid, whole))
        return oid


Answer = tuple[int, bytes, dict[str, str]]
"""Status, body, headers."""


def _json(content: object) -> Answer:
    return 200, json.dumps(content).encode(), {"Content-Type": "application/json"}


def _error(status: int, code: str) -> Answer:
    return status, b"{}", {"X-Error-Code": code, "X-Error-Message": code}


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self) -> None:
        self._send(*self._read())

    def do_HEAD(self) -> None:
        self._send(*self._read())

    def do_POST(self) -> None:
        self._send(*self._write(self.rfile.read(int(self.headers["Content-Length"]))))

    def _has_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _write(self, body: bytes) -> Answer:
        self.server.requests.append(f"POST {self.path}")
        if self.path == "/api/validate-yaml":
            return _json({"errors": [], "warnings": []})
        if not self._has_token():
            return _error(401, "InvalidToken")
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
            self.server.repositories.setdefault(name, [])
            return _json({"url": f"{self.server.url}/{name}", "id": name, "name": name})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            return _json(
                {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]}
            )
        assert "/commit/" in self.path, self.path
        if self.server.refused_commits:
            return _error(403, "Forbidden")
        values = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
        oid = self.server.commit(name, {value["path"]: base64.b64decode(value["content"]) for value in values})
        return _json({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"})

    def _read(self) -> Answer:
        self.server.requests.append(f"{self.command} {self.path}")
        if self.path == "/api/whoami-v2":
            return _json({"name": "somebody", "type": "user"}) if self._has_token() else _error(401, "InvalidToken")
        parts = self.path.partition("?")[0].strip("/").split("/")
        is_api = parts[0] == "api"
        name = "/".join(parts[2:4] if is_api else parts[:2])
        if name not in self.server.repositories:
            return _error(404, "RepoNotFound")
        commits = self.server.repositories[name]
        revision = next((parts[i + 1] for i, part in enumerate(parts) if part in ("resolve", "revision")), "main")
        found = commits[-1:] if revision == "main" else [commit for commit in commits if commit[0] == revision]
        if is_api and not commits:
            return _json({"id": name, "sha": None, "siblings": []})
        if not found:
            return _error(404, "RevisionNotFound")
        oid, files = found[0]
        if is_api:
            return _json({"id": name, "sha": oid, "siblings": [{"rfilename": file} for file in files]})
        if parts[-1] not in files:
            status, content, headers = _error(404, "EntryNotFound")
            return status, content, headers | {"X-Repo-Commit": oid}
        content = files[parts[-1]]
        return 200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": oid}

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def hub_server() -> Iterator[HubServer]:
    with HubServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
