"""What `faults.py` counts: refused with a clear message, accepted and right, wrong."""

from __future__ import annotations

import re
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pgn_peft

REFUSED, OTHERS, RIGHT, WRONG = "refused clearly", "refused by a library", "accepted and right", "wrong"
KINDS = (REFUSED, OTHERS, RIGHT, WRONG)
CLEAR = (ValueError, TypeError, OSError, SystemExit)
# What a clear message names: a field or file in backticks, or one of the files by its name.
NAMED = re.compile(r"`[^`]+`|\b\w+\.(json|safetensors|png|jpg|tiff|gif|bmp|webp)\b|['\"]/")
OURS = (str(Path(pgn_peft.__file__).parent), str(Path(__file__).parents[1] / "examples"))


@dataclass
class Tally:
    """Outcomes by row of the table; the wrong ones with what happened."""

    counts: dict[str, Counter] = field(default_factory=dict)
    unguarded: dict[str, Counter] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    words: Counter = field(default_factory=Counter)  # how the refusals by libraries begin

    def add(self, row: str, case: str, outcome: tuple[str, str], guarded: bool = True) -> None:
        """Count an outcome, a kind and its explanation.

        Args:
            row: of the table.
            case: what was done.
            outcome: as `judge` returns it.
            guarded: whether our code sees what was done. What it does not see has a table of its own.
        """
        kind, explanation = outcome
        (self.counts if guarded else self.unguarded).setdefault(row, Counter())[kind] += 1
        if kind == WRONG and guarded:
            self.wrong.append(f"{row}: {case}: {explanation}")
        elif kind == OTHERS:
            self.words[explanation[:100]] += 1


def table(rows: dict[str, Counter]) -> str:
    """Lay counts out in Markdown."""
    lines = ["| what | cases | " + " | ".join(KINDS) + " |", "|---" * (len(KINDS) + 2) + "|"]
    for row, counts in sorted(rows.items()):
        figures = [f"{counts.total():,}", *(f"{counts[kind]:,}" for kind in KINDS)]
        lines.append(f"| {row} | " + " | ".join(figures) + " |")
    return "\n".join(lines)


def judge(act: Callable[[], Any], is_right: Callable[[Any], bool]) -> tuple[str, str]:
    """Run something on damaged input, and say what came of it.

    Args:
        act: loads, reads or writes.
        is_right: whether its result is what undamaged input gives.

    Returns:
        A kind and its explanation. A refusal is clear if it is a ValueError, TypeError, OSError or SystemExit that
        names a file or a field. Any other exception is wrong if our code was on the way, and a library's own refusal
        if it was not: PEFT and Transformers read a file before they call us.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = act()
    except (Exception, SystemExit) as error:
        return refusal(error)
    return (RIGHT, "") if is_right(result) else (WRONG, "accepted, with other results")


def refusal(error: BaseException) -> tuple[str, str]:
    """Say what kind of refusal an exception is."""
    explanation = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if isinstance(error, CLEAR) and NAMED.search(str(error)):
        return REFUSED, explanation
    frames = traceback.extract_tb(error.__traceback__)
    return (WRONG if any(frame.filename.startswith(OURS) for frame in frames) else OTHERS), explanation
