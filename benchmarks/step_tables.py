"""Tables of `step_time.py`: one for each cell, and the ratios of several cells side by side."""

from __future__ import annotations

from typing import Any


def table(row: dict[str, Any]) -> str:
    """Write a cell of the table as Markdown."""
    settings, measured = row["settings"], row["measured"]
    head = ["training step, ms", "/ static", "/ full", "/ floor", "saved, MB", "inference, ms", "/ static", "/ frozen"]
    if any(each["inference_peak_bytes"] for each in measured.values()):
        head += ["training peak, MB", "/ static"]
    lines = [
        f"{settings['model']}, {settings['precision']}, {'eager and compiled' if settings['compiled'] else 'eager'}, "
        f"batch {settings['batch_size']}, P = {settings['num_virtual_tokens']}, L = {settings['library_size']}, "
        f"{row['environment']['device']}, {row['environment']['threads']} threads",
        "",
        "| | " + " | ".join(head) + " |",
        "|---" * (len(head) + 1) + "|",
    ]
    for name, each in measured.items():
        train, infer = each.get("train_ratios", {}), each["inference_ratios"]
        cells = ["", "", "", "", ""]
        if train:
            cells = [
                f"{1e3 * each['train_seconds']:.0f}",
                decimals(train.get("static")),
                decimals(train.get("full")),
                decimals(each["train_seconds"] / each["train_floor"]),
                f"{each['saved_bytes'] / 1e6:.0f}",
            ]
        cells += [
            f"{1e3 * each['inference_seconds']:.0f}",
            decimals(infer.get("static")),
            decimals(infer.get("frozen")),
        ]
        if len(head) > len(cells):
            peak, static = each.get("train_peak_bytes"), measured.get("static", {}).get("train_peak_bytes")
            cells += [f"{peak / 1e6:.0f}", decimals(peak / static if static else None)] if peak else ["", ""]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(rows: list[dict[str, Any]]) -> str:
    """Write the ratios of cells side by side as Markdown: of those that have all of the yardsticks."""
    rows = [row for row in rows if {"static", "full", "frozen"} <= row["measured"].keys()]
    titles = [
        f"{row['settings']['model']}, {row['settings']['precision']}, batch {row['settings']['batch_size']}"
        for row in rows
    ]
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row["measured"]))
    tables = []
    for kind, other, title in (
        ("train", "static", "Training step / static prompts"),
        ("train", "full", "Training step / full fine-tuning"),
        ("inference", "static", "Inference / static prompts"),
        ("inference", "frozen", "Inference / the frozen model"),
    ):
        lines = [f"**{title}**", "", f"| | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
        for name in names:
            ratios = [row["measured"].get(name, {}).get(f"{kind}_ratios", {}).get(other) for row in rows]
            if any(ratios):
                lines.append(f"| {name} | {' | '.join(map(decimals, ratios))} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def decimals(number: float | None) -> str:
    """Write a ratio with two decimals."""
    return "" if number is None else f"{number:.2f}"
