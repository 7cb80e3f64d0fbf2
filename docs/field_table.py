"""Write the table of all fields of `PGNConfig` into docs/config.md; `--check` only says whether it is up to date."""

from __future__ import annotations

import sys
from pathlib import Path

from pgn_peft.tuner.config import own_fields

PAGE = Path(__file__).with_name("config.md")
BEGIN, END = "<!-- fields -->\n", "<!-- /fields -->"


def table() -> str:
    rows = ["| field | default | |", "|---|---|---|"]
    rows += [f"| `{field.name}` | `{field.default!r}` | {field.metadata['help']} |" for field in own_fields()]
    return "\n".join(rows) + "\n"


def page_with_table() -> str:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    return before + BEGIN + table() + end + after


if __name__ == "__main__":
    page = page_with_table()
    if "--check" in sys.argv:
        sys.exit(page != PAGE.read_text(encoding="utf-8") and "docs/config.md is out of date: run docs/field_table.py")
    PAGE.write_text(page, encoding="utf-8")
