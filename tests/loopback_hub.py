"""A Hub on this machine, as far as the tests need one: the real `huggingface_hub` client talks to it over HTTP."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class LoopbackHub:
    """Repositories by id, each a dictionary of file names and contents; one branch, small files only.

    Args:
        token: what a client must send; None: nothing is asked for.
    """

    def __init__(self, token: str | None = None) -> None:
        self.token = token
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.url = ""

    def commit(self, repository: str, lines: list[dict]) -> None:
        """Apply a commit of the Hub's protocol: one JSON object a line, files in base64."""
        for line in lines:
            if line["key"] == "file":
                self.repositories[repository][line["value"]["path"]] = base64.b64decode(line["value"]["content"])

    def revision(self, repository: str) -> str:
        """Return a name for what a repository holds now, as a commit's hash."""
        return hashlib.sha1(repr(sorted(self.repositories[repository].items())).encode()).hexdigest()


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refused(self) -> bool:
            if hub.token is None or self.headers.get("Authorization") == f"Bearer {hub.token}":
                return False
            self.reply(401, b'{"error": "Invalid credentials"}', X_Error_Message="Invalid credentials")
            return True

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.refused():
                return
            if self.path == "/api/repos/create":
                request = json.loads(body)
                owner = request.get("organization") or "user"
                repository = f"{owner}/{request['name']}"
                hub.repositories.setdefault(repository, {})
                self.reply(200, json.dumps({"url": f"{hub.url}/{repository}", "id": repository}).encode())
                return
            _, _, _, owner, name, action, *_ = self.path.split("/")
            repository = f"{owner}/{name}"
            if action == "preupload":
                files = json.loads(body)["files"]
                answer = {
                    "files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
                }
            else:
                hub.commit(repository, [json.loads(line) for line in body.splitlines() if line])
                commit = hub.revision(repository)
                answer = {"commitUrl": f"{hub.url}/{repository}/commit/{commit}", "commitOid": commit, "success": True}
            self.reply(200, json.dumps(answer).encode())

        def do_GET(self) -> None:
            if self.refused():
                return
            parts = self.path.partition("?")[0].split("/")
            if parts[1] == "api":
                if parts[2] == "whoami-v2":
                    self.reply(200, b'{"name": "user", "type": "user", "auth": {}}')
                    return
                repository = "/".join(parts[3:5])
                body = {"id": repository, "sha": hub.revision(repository), "siblings": []}
                self.reply(200, json.dumps(body).encode())
                return
            repository, file = "/".join(parts[1:3]), "/".join(parts[5:])
            content = hub.repositories.get(repository, {}).get(file)
            if content is None:
                code = "EntryNotFound" if repository in hub.repositories else "RepoNotFound"
                self.reply(404, b"{}", X_Error_Code=code, X_Error_Message="not found")
                return
            tag = hashlib.sha1(content).hexdigest()
            self.reply(200, content, ETag=f'"{tag}"', X_Repo_Commit=hub.revision(repository))

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Say nothing about each request."""

    return Handler


@contextmanager
def loopback_hub(token: str | None = None):
    """Run a Hub, and yield it."""
    hub = LoopbackHub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
