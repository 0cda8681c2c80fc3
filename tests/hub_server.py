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


class _Handler(BaseHTTPRequestHandler):
    server: HubServer

    def do_GET(self) -> None:
        self._answer_file()

    def do_HEAD(self) -> None:
        self._answer_file()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append(f"POST {self.path}")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._error(401, "RepoNotFound")
        if self.path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
            self.server.repositories.setdefault(name, [])
            return self._json({"url": f"{self.server.url}/{name}", "id": name, "name": name})
        name = "/".join(self.path.split("/")[3:5])
        if "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        assert "/commit/" in self.path, self.path
        if self.server.refused_commits:
            return self._error(403, "Forbidden")
        lines = [json.loads(line) for line in body.splitlines()]
        files = {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }
        oid = self.server.commit(name, files)
        return self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{name}/commit/{oid}"})

    def _answer_file(self) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        parts = self.path.partition("?")[0].strip("/").split("/")
        if self.path == "/api/whoami-v2":
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            return self._json({"name": "somebody", "type": "user"}) if known else self._error(401, "InvalidToken")
        name = "/".join(parts[1:4] if parts[0] == "api" else parts[:2]).removeprefix("models/")
        commits = self.server.repositories.get(name)
        if not commits:
            return self._error(404, "RepoNotFound")
        revision = parts[parts.index("resolve") + 1] if "resolve" in parts else parts[-1]
        found = commits[-1:] if revision in ("main", parts[2]) else [c for c in commits if c[0] == revision]
        if not found:
            return self._error(404, "RevisionNotFound")
        oid, files = found[0]
        if parts[0] == "api":
            return self._json({"id": name, "sha": oid, "siblings": [{"rfilename": file} for file in files]})
        content = files.get(parts[-1])
        if content is None:
            return self._error(404, "EntryNotFound", commit=oid)
        etag = hashlib.sha1(content).hexdigest()
        self._send(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": oid})

    def _json(self, content: object) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, commit: str | None = None) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code} | ({"X-Repo-Commit": commit} if commit else {})
        self._send(status, b"{}", headers)

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
