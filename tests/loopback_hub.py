"""A Hub on this machine, as far as the tests need one: the real `huggingface_hub` client talks to it over HTTP."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import pytest
from hub_repositories import POINTER, Fault, LoopbackHub, Repository, metadata_errors

__all__ = ["Fault", "LoopbackHub", "loopback_hub", "use_hub"]

ID = r"(?P<repository>[^/]+/[^/]+?)"
# method, path, name of the handler's method; tried in this order
ROUTES = [
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", rf"/api/models/{ID}/preupload/.+", "preupload"),
    ("POST", rf"/api/models/{ID}/commit/(?P<revision>.+)", "commit"),
    ("POST", rf"/api/models/{ID}/branch/(?P<name>.+)", "branch"),
    ("POST", rf"/api/models/{ID}/tag/(?P<revision>.+)", "tag"),
    ("GET", rf"/api/models/{ID}/tree/(?P<revision>[^/]+)", "tree"),
    ("GET", rf"/api/models/{ID}(/revision/(?P<revision>.+))?", "info"),
    ("POST", rf"/{ID}\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "store"),
    ("GET", rf"/{ID}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
]


class Handler(BaseHTTPRequestHandler):
    """Answers one request; `hub` is set on a subclass."""

    hub: LoopbackHub

    def answer(self) -> None:
        """Find the route, and go along it."""
        path = unquote(self.path.partition("?")[0])
        self.hub.requests.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length", 0))
        fault = next((fault for fault in self.hub.faults if fault.strikes(self.command, path)), None)
        if fault is not None and fault.status is None:
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        self.body = (
            self._chunks() if "chunked" in self.headers.get("Transfer-Encoding", "") else self.rfile.read(length)
        )
        if fault is not None:
            self.reply(fault.status, {"error": "as told"}, X_Error_Message="as told")
            return
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if wanted == method and match is not None:
                groups = match.groupdict()
                if self.allowed(groups.get("repository")):
                    getattr(self, name)(**groups)
                return
        self.reply(404, {"error": path})

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def allowed(self, repository: str | None) -> bool:
        """Refuse strangers what is private, and to write."""
        known = self.hub.token is None or self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        found = self.hub.repositories.get(repository)
        public = self.command in ("GET", "HEAD") and not (found is not None and found.private)
        if not (known or public or self.command == "PUT"):  # uploads go to signed addresses
            self.reply(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials")
            return False
        if repository is not None and found is None:
            self.reply(404, {}, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            return False
        return True

    def reply(self, status: int, body: dict | list | bytes = b"", **headers: str) -> None:
        """Send an answer; dictionaries and lists as JSON."""
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing about each request."""

    # The routes.

    def whoami(self) -> None:
        self.reply(200, {"name": "user", "type": "user", "auth": {}})

    def create(self) -> None:
        request = json.loads(self.body)
        repository = f"{request.get('organization') or 'user'}/{request['name']}"
        exists = repository in self.hub.repositories
        if not exists:
            self.hub.repositories[repository] = Repository(private=request.get("visibility") == "private")
        self.reply(409 if exists else 200, {"url": f"{self.hub.url}/{repository}", "id": repository})

    def validate(self) -> None:
        errors = metadata_errors(json.loads(self.body)["content"])
        self.reply(400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []})

    def preupload(self, repository: str) -> None:
        paths = [file["path"] for file in json.loads(self.body)["files"]]
        modes = {path: "lfs" if path.endswith((".safetensors", ".bin")) else "regular" for path in paths}
        files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        self.reply(200, {"files": files})

    def batch(self, repository: str) -> None:
        answers = []
        for wanted in json.loads(self.body)["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}
            answers.append(answer)
        self.reply(200, {"transfer": "basic", "objects": answers})

    def store(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self.reply(400, {"error": "not what was announced"})
            return
        self.hub.objects[oid] = self.body
        self.reply(200)

    def commit(self, repository: str, revision: str) -> None:
        found = self.hub.repositories[repository]
        lines = [json.loads(line) for line in self.body.splitlines() if line]
        missing = [line for line in lines if line["key"] == "lfsFile" and line["value"]["oid"] not in self.hub.objects]
        if missing or revision not in found.refs:
            self.reply(400, {"error": f"no branch {revision!r}, or no such objects: {missing}"})
            return
        commit = found.apply(revision, lines)
        url = f"{self.hub.url}/{repository}/commit/{commit}"
        self.reply(200, {"commitUrl": url, "commitOid": commit, "success": True})

    def branch(self, repository: str, name: str) -> None:
        found = self.hub.repositories[repository]
        exists = name in found.refs
        start = (json.loads(self.body) if self.body else {}).get("startingPoint", "main")
        found.refs.setdefault(name, found.resolve(start))
        self.reply(409 if exists else 200, {})

    def tag(self, repository: str, revision: str) -> None:
        found = self.hub.repositories[repository]
        found.refs[json.loads(self.body)["tag"]] = found.resolve(revision)
        self.reply(200, {})

    def info(self, repository: str, revision: str | None) -> None:
        commit = self.commit_of(repository, revision or "main")
        if commit is not None:
            siblings = [{"rfilename": file["path"]} for file in self.hub.tree(repository, commit)]
            private = self.hub.repositories[repository].private
            self.reply(200, {"id": repository, "sha": commit, "private": private, "siblings": siblings})

    def tree(self, repository: str, revision: str) -> None:
        commit = self.commit_of(repository, revision)
        if commit is not None:
            self.reply(200, self.hub.tree(repository, commit))

    def resolve(self, repository: str, revision: str, path: str) -> None:
        commit = self.commit_of(repository, revision)
        if commit is None:
            return
        content = self.hub.content(repository, path, commit)
        if content is None:
            self.reply(404, {}, X_Error_Code="EntryNotFound", X_Error_Message="not found", X_Repo_Commit=commit)
            return
        entry = self.hub.repositories[repository].commits[commit][path]
        oid = entry.removeprefix(POINTER) if isinstance(entry, str) else hashlib.sha1(content).hexdigest()
        self.reply(200, content, ETag=f'"{oid}"', X_Repo_Commit=commit)

    def commit_of(self, repository: str, revision: str) -> str | None:
        commit = self.hub.repositories[repository].resolve(revision)
        if commit is None:
            self.reply(404, {}, X_Error_Code="RevisionNotFound", X_Error_Message="no such revision")
        return commit


@contextmanager
def loopback_hub(token: str | None = None):
    """Run a Hub, and yield it."""
    hub = LoopbackHub(token)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)  # seconds to a shutdown
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def use_hub(
    patch: pytest.MonkeyPatch, hub: LoopbackHub, cache: Path, token: str | None, offline: bool = False
) -> None:
    """Have huggingface_hub's client in this process call `hub`, with a cache of its own, and retry without a wait.

    The client reads its settings from the environment when it is imported; here they are changed afterwards.
    """
    settings = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": offline,
        "HF_TOKEN_PATH": str(cache / "no-token"),
    }
    for name, value in settings.items():
        patch.setattr(huggingface_hub.constants, name, value)
    patch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    patch.setattr("transformers.utils.hub._hf_api", None, raising=False)  # made once, with the address of then
    patch.setattr(time, "sleep", lambda seconds: None)
    if token is None:
        patch.delenv("HF_TOKEN", raising=False)
    else:
        patch.setenv("HF_TOKEN", token)
