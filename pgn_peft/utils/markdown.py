"""Tables and lists of a model card, which no name can break."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LARGEST_LIST = 50  # names that are shown


def property_table(values: Mapping[str, Any]) -> str:
    """Write a table of two columns, names and values, without a head."""
    return "\n".join(["| | |", "|---|---|", *(f"| {cell(name)} | {cell(value)} |" for name, value in values.items())])


def row_table(entries: Sequence[Mapping[str, Any]]) -> str:
    """Write a table of entries, whose columns are those of the first."""
    columns = list(entries[0])
    lines = [columns, ["---"] * len(columns), *([entry.get(column, "") for column in columns] for entry in entries)]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def list_names(id2label: Mapping[int, str] | None) -> str:
    """Write the names of classes, the first of them where there are many."""
    names = list((id2label or {}).values())
    shown = ", ".join(map(cell, names[:LARGEST_LIST]))
    return f"{shown}, and {len(names) - LARGEST_LIST} more" if len(names) > LARGEST_LIST else shown or "none"


def cell(value: Any) -> str:
    """Write a value so that it stays in its cell."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())
