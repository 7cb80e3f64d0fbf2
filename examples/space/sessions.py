"""Sessions of visitors: a folder, the adapters that were loaded or trained, and the event that stops training."""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path

from pgn_peft import Classifier, ModelCardInfo

MOST_SESSIONS = 20
MOST_LOADED = 2  # adapters in memory, in addition to those that were trained here or uploaded


class Session:
    """A visitor's session. Its key is the hash that Gradio gives to the page, which no other page knows."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="pgn-space-"))
        self.stop = threading.Event()  # stops the current training
        self.training = self.closed = False
        self.lock = threading.RLock()  # a prediction switches adapters of the model off and on
        self.facts = ModelCardInfo()  # of the adapter that was trained here
        self.own: dict[str, Classifier] = {}  # trained here, or uploaded
        self.loaded: dict[str, Classifier] = {}

    def keep(self, name: str, classifier: Classifier) -> None:
        """Keep a loaded adapter in memory; of too many, the oldest is dropped."""
        with self.lock:
            self.loaded[name] = classifier
            while len(self.loaded) > MOST_LOADED:
                del self.loaded[next(iter(self.loaded))]

    def temporary_folder(self) -> tempfile.TemporaryDirectory:
        """Return a temporary folder, for one call."""
        return tempfile.TemporaryDirectory(dir=self.folder, ignore_cleanup_errors=True)

    def close(self) -> None:
        """Stop training, and remove all files."""
        self.closed = True
        self.stop.set()
        self.own.clear()
        self.loaded.clear()
        shutil.rmtree(self.folder, ignore_errors=True)


class Sessions:
    """All visitors' sessions by the hash that Gradio gives to each page."""

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._lock = threading.Lock()

    def get(self, session_hash: str) -> Session:
        """Return a visitor's session, created at the first call. Of too many, the least recently used is closed."""
        with self._lock:
            session = self._sessions.pop(session_hash, None) or Session()
            idle = [key for key, other in self._sessions.items() if not other.training]
            surplus = idle[: max(0, len(self._sessions) + 1 - MOST_SESSIONS)]
            self._sessions[session_hash] = session  # ordered by last use
        for key in surplus:
            self.close(key)
        return session

    def close(self, session_hash: str) -> None:
        """Close a visitor's session."""
        with self._lock:
            session = self._sessions.pop(session_hash, None)
        if session is not None:
            session.close()
