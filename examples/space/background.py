"""Long computations in a thread of their own: they report how they stand, and can be stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from pgn_peft import Classifier, ModelCardInfo

THREAD = "computation"
SECONDS = 900  # the most for a computation
PAUSE = 0.1  # seconds between two looks at a computation: often enough for a page


class Stopped(BaseException):
    """Ends a computation. It is no `Exception`, so that calls of a server are not repeated because of it."""


@dataclass(frozen=True)
class Report:
    """How a computation stands.

    Args:
        text: in words.
        table: what was measured until now, in Markdown.
        classifier: the trained model; None until the end.
        facts: for its card.
    """

    text: str
    table: str = ""
    classifier: Classifier | None = None
    facts: ModelCardInfo = field(default_factory=ModelCardInfo)


class Watch:
    """What a computation reports to, and asks whether to go on.

    Args:
        stop: ends the computation.
    """

    def __init__(self, stop: threading.Event) -> None:
        self.report = Report("starting")
        self.error: Exception | None = None
        self.stop, self.end = stop, time.monotonic() + SECONDS

    def check(self) -> None:
        """Raise `Stopped` if the computation should stop, or its time is over."""
        if self.stop.is_set() or time.monotonic() > self.end:
            raise Stopped

    def run(self, compute: Callable[[Watch], None]) -> None:
        """Compute, and note an error."""
        try:
            compute(self)
        except Stopped:
            self.report = Report("stopped", self.report.table)
        except Exception as error:
            self.error = error


def watch(compute: Callable[[Watch], None], stop: threading.Event) -> Iterator[Report]:
    """Compute in a thread of its own, and yield reports, several a second at most; the last one always.

    Args:
        compute: sets `Watch.report`, and calls `Watch.check` often.
        stop: ends the computation. It is set when nobody iterates any more.
    """
    state, shown = Watch(stop), None
    thread = threading.Thread(target=state.run, args=[compute], name=THREAD, daemon=True)
    thread.start()
    try:
        while thread.is_alive() or state.error is not None or state.report is not shown:
            thread.join(PAUSE)
            if state.error is not None:
                raise state.error
            if state.report is not shown:
                yield (shown := state.report)
    finally:
        stop.set()  # the thread ends by itself: whoever closes the page must not wait for it
