"""What one visitor has: a folder, the adapters that were loaded or trained, and the switch that stops a training."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from pathlib import Path

from pgn_peft import CardFacts, Classifier

HOURS = 1  # without a call, after which a session is closed
MOST_ADAPTERS = 3  # in memory


class Session:
    """A visitor's own. Nobody else's page can reach it."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pgn-space-"))
        self.stop = threading.Event()
        self.lock = threading.RLock()  # a model is switched to and fro while it answers
        self.used = time.monotonic()
        self.facts = CardFacts()  # of what was trained here
        self._adapters: dict[str, Classifier] = {}

    def keep(self, name: str, classifier: Classifier) -> None:
        """Keep an adapter under a name; of many, the oldest is dropped."""
        self._adapters.pop(name, None)
        self._adapters[name] = classifier
        while len(self._adapters) > MOST_ADAPTERS:
            del self._adapters[next(iter(self._adapters))]

    def find(self, name: str) -> Classifier | None:
        """Return an adapter that is kept."""
        return self._adapters.get(name)

    def new_folder(self) -> Path:
        """Return the name of a folder that is not there yet."""
        return Path(tempfile.mkdtemp(dir=self.folder)) / "files"

    def close(self) -> None:
        """Stop what runs, and remove all files."""
        self.stop.set()
        self._adapters.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


class Sessions:
    """All visitors' sessions by the hash that Gradio gives each page."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def get(self, session_hash: str) -> Session:
        """Return a visitor's session, made at the first call; close those that nobody has used for long."""
        with self._lock:
            now = time.monotonic()
            for key, session in list(self._sessions.items()):
                if now - session.used > HOURS * 3600:
                    self._sessions.pop(key).close()
            session = self._sessions.setdefault(session_hash, None) or Session()
            self._sessions[session_hash] = session
            session.used = now
            return session

    def close(self, session_hash: str) -> None:
        """Close a visitor's session."""
        with self._lock:
            session = self._sessions.pop(session_hash, None)
        if session is not None:
            session.close()

    def __len__(self) -> int:
        return len(self._sessions)
