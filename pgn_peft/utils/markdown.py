"""Values in the Markdown of a model card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LARGEST_LIST = 50  # names that are shown
CITATION = """\
@inproceedings{loedeman2024prompt,
  title     = {Prompt Generation Networks for Input-Space Adaptation of Frozen Vision Transformers},
  author    = {Loedeman, Jochem and Stol, Maarten and Han, Tengda and Asano, Yuki M.},
  booktitle = {British Machine Vision Conference},
  year      = {2024}
}"""


def list_names(id2label: Mapping[int, str] | None) -> str:
    """Write the names of classes, the first of them where there are many."""
    names = list((id2label or {}).values())
    shown = ", ".join(map(cell, names[:LARGEST_LIST]))
    return f"{shown}, and {len(names) - LARGEST_LIST} more" if len(names) > LARGEST_LIST else shown or "none"


def cell(value: Any) -> str:
    """Write a value so that it stays in its cell."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())
