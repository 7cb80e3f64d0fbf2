"""Calls of a server: several at once, repeated after errors, counted, and kept on disk."""

from __future__ import annotations

import hashlib
import io
import json
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from PIL import Image

from pgn_peft.prompter.answers import read_entries


def encode(image: Image.Image, jpeg_quality: int | None = None) -> bytes:
    """Write an image as a PNG file, or as a JPEG file of a quality from 1 to 100."""
    file = io.BytesIO()
    if jpeg_quality is None:
        image.save(file, "PNG", compress_level=1)  # much faster, and hardly larger
    else:
        image.save(file, "JPEG", quality=jpeg_quality)
    return file.getvalue()


class Calls:
    """Send images to a server, each file once.

    Args:
        call: answers an encoded image. An answer is a list of entries with `label` and `score`, or an embedding.
        cache: file (SQLite) that keeps the answers: an interrupted run continues where it ended. None: they are
            kept in memory.
        jpeg_quality: send JPEG files of this quality; None: PNG.
        workers: calls at the same time.
        attempts: calls for one image before its error is raised.
        seconds: pause before the second attempt; each further one takes twice as long.
        server: name of the server and of what it is asked for. Answers of others in the same file are not used.
    """

    def __init__(
        self,
        call: Callable[[bytes], Any],
        cache: str | Path | None = None,
        jpeg_quality: int | None = None,
        workers: int = 8,
        attempts: int = 5,
        seconds: float = 1.0,
        server: str = "",
    ) -> None:
        self.call = call
        self.server = server
        self.jpeg_quality = jpeg_quality
        self.workers = workers
        self.attempts = attempts
        self.seconds = seconds
        self.made = 0  # calls that were answered; the cache's answers do not count
        self._cache = sqlite3.connect(cache or ":memory:")
        self._cache.execute("CREATE TABLE IF NOT EXISTS answers (file TEXT PRIMARY KEY, answer BLOB)")

    def answers(self, images: Iterable[Image.Image], description: str | None = None) -> list[Any]:
        """Return the answers to images: each a list of entries (dictionaries), or of floats.

        Args:
            images: the images.
            description: is shown beside the progress bar.

        Raises:
            Exception: the last error of `call` for an image. All answers until then are kept.
        """
        from tqdm import tqdm

        files = [encode(image, self.jpeg_quality) for image in images]
        keys = [hashlib.sha256(self.server.encode() + file).hexdigest() for file in files]
        missing = {key: file for key, file in zip(keys, files, strict=True) if self._find(key) is None}
        with ThreadPoolExecutor(self.workers) as pool:
            asked = {pool.submit(self._ask, file): key for key, file in missing.items()}
            try:
                for done in tqdm(as_completed(asked), description, len(asked), leave=False, disable=None):
                    self._keep(asked[done], done.result())
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return [self._find(key) for key in keys]

    def _ask(self, file: bytes) -> Any:
        for attempt in range(self.attempts - 1):
            try:
                return _plain(self.call(file))
            except Exception:  # servers fail in many ways
                time.sleep(self.seconds * 2**attempt)
        return _plain(self.call(file))

    def _find(self, key: str) -> Any:
        row = self._cache.execute("SELECT answer FROM answers WHERE file = ?", (key,)).fetchone()
        return None if row is None else json.loads(zlib.decompress(row[0]))

    def _keep(self, key: str, answer: Any) -> None:
        self.made += 1
        packed = zlib.compress(json.dumps(answer).encode(), level=1)
        with self._cache:
            self._cache.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, packed))


def _plain(answer: Iterable[Any]) -> list[Any]:
    """Turn an answer into lists, dictionaries, strings and floats."""
    answer = list(answer)
    if isinstance(answer[0], Mapping) or hasattr(answer[0], "label"):
        return [{"label": label, "score": score} for label, score in read_entries(answer)]
    return [float(value) for value in answer]
