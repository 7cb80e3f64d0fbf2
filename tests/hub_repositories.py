"""What a Hub keeps: repositories with commits, branches and tags, and the objects of large file storage."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import yaml

POINTER = "lfs:"  # a file's content in a commit, where it lies in large file storage


def sha1(content: object) -> str:
    """Return a name for a content, as git would."""
    return hashlib.sha1(repr(content).encode()).hexdigest()


@dataclass
class Repository:
    """Commits by hash, each a dictionary of path and content; refs are branches and tags."""

    private: bool = False
    commits: dict[str, dict[str, bytes | str]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._record("main", {}, "initial commit")

    def __iter__(self):
        """Iterate over the paths in main."""
        return iter(self.commits[self.refs["main"]])

    def resolve(self, revision: str) -> str | None:
        """Return the hash of a branch, tag or commit; None where there is none."""
        commit = self.refs.get(revision, revision)
        return commit if commit in self.commits else None

    def apply(self, branch: str, lines: list[dict]) -> str:
        """Apply a commit of the Hub's protocol, and return its hash."""
        files, summary = dict(self.commits[self.refs[branch]]), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                summary = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = POINTER + value["oid"]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise ValueError(f"a commit has no {line['key']!r}")
        return self._record(branch, files, summary)

    def _record(self, branch: str, files: dict[str, bytes | str], summary: str) -> str:
        commit = sha1((sorted(files.items()), self.log))
        self.commits[commit] = files
        self.refs[branch] = commit
        self.log.append(summary)
        return commit


@dataclass
class Fault:
    """What a Hub does wrong, a number of times, to requests of a method whose path contains a word.

    Args:
        method: of the request.
        path: the word.
        status: what it answers; None: it reads half of the body and cuts the connection.
        times: how often, before it works again.
    """

    method: str
    path: str
    status: int | None
    times: int = 1

    def strikes(self, method: str, path: str) -> bool:
        """Whether it hits this request; counts."""
        if self.times and method == self.method and self.path in path:
            self.times -= 1
            return True
        return False


class LoopbackHub:
    """A Hub's memory.

    Args:
        token: what a client must send to write, and to read private repositories; None: nothing is asked for.
    """

    def __init__(self, token: str | None = None) -> None:
        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # large file storage, by SHA-256
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.url = ""

    def put(self, repository: str, folder: Path, private: bool = False, subfolder: str = "") -> str:
        """Commit a folder's files, as somebody else would have, and return the commit's hash."""
        found = self.repositories.setdefault(repository, Repository(private))
        lines = []
        for file in sorted(path for path in folder.iterdir() if path.is_file()):
            path, content = subfolder + file.name, file.read_bytes()
            if file.suffix == ".safetensors":
                oid = hashlib.sha256(content).hexdigest()
                self.objects[oid] = content
                lines.append({"key": "lfsFile", "value": {"path": path, "oid": oid}})
            else:
                content = base64.b64encode(content)
                lines.append({"key": "file", "value": {"path": path, "content": content}})
        return found.apply("main", lines)

    def content(self, repository: str, path: str, revision: str = "main") -> bytes | None:
        """Return a file's content; None where there is none."""
        found = self.repositories[repository]
        content = found.commits[found.resolve(revision)].get(path)
        return self.objects[content.removeprefix(POINTER)] if isinstance(content, str) else content

    def tree(self, repository: str, revision: str) -> list[dict]:
        """List a commit's files as the Hub does."""
        found = self.repositories[repository]
        entries = []
        for path, content in found.commits[found.resolve(revision)].items():
            size = len(self.content(repository, path, revision))
            entry = {"type": "file", "path": path, "size": size, "oid": sha1(content)}
            if isinstance(content, str):
                entry["lfs"] = {"oid": content.removeprefix(POINTER), "size": size, "pointerSize": 130}
            entries.append(entry)
        return entries


def metadata_errors(card: str) -> list[str]:
    """Check a model card's metadata for what the Hub would show: an id as base model, a complete model-index."""
    data = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else {}
    errors = []
    base = data.get("base_model")
    if base is not None and base.count("/") > 1:
        errors.append('"base_model" with value ' + json.dumps(base) + " is not valid. Use a model id.")
    for model in data.get("model-index", []):
        for result in model["results"]:
            if not {"task", "dataset", "metrics"} <= result.keys():
                errors.append('"model-index" has an incomplete result.')
    return errors
