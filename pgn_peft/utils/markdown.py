"""Markdown of model cards: formatting values, and updating a card without losing what people wrote in it."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LARGEST_LIST = 50  # class names that a card shows
CITATION = """\
@inproceedings{loedeman2024prompt,
  title     = {Prompt Generation Networks for Input-Space Adaptation of Frozen Vision Transformers},
  author    = {Loedeman, Jochem and Stol, Maarten and Han, Tengda and Asano, Yuki M.},
  booktitle = {British Machine Vision Conference},
  year      = {2024}
}"""
# The generated part of a card, and the names of the generated metadata.
OWN_PART = re.compile(r"<!-- pgn-peft: begin \[(.*?)\] -->.*?<!-- pgn-peft: end -->", re.DOTALL)
# What PEFT adds to a card whenever it saves.
PEFT_NOTE = re.compile(r"### Framework versions\s+(- PEFT \S+\s*)+")


def update_card(card: str, existing: str | None) -> str:
    """Replace the generated part of an existing card, and keep what people wrote in it.

    The generated text is enclosed in two comments. The text around it is kept, and so are tags, and metadata that were
    not generated. A card without these comments is kept as a whole, unless it is PEFT's empty template.
    """
    from huggingface_hub import CardData, ModelCard, ModelCardData, RepoCard

    new = RepoCard(card)
    if not OWN_PART.search(new.text):
        ours = " ".join(new.data.to_dict())
        new.text = f"\n<!-- pgn-peft: begin [{ours}] -->\n{new.text.strip()}\n<!-- pgn-peft: end -->\n"
    if not existing:
        return str(new)
    old = RepoCard(existing)
    own = OWN_PART.search(old.text)
    kept = PEFT_NOTE.sub("", OWN_PART.sub("", old.text)).strip()
    if kept and kept == ModelCard.from_template(ModelCardData()).text.strip():  # PEFT's empty template
        return str(new)
    names = own[1].split() if own else []
    data = {name: value for name, value in old.data.to_dict().items() if name not in names} | new.data.to_dict()
    tags = [*(new.data.get("tags") or []), *(old.data.get("tags") or [])]
    # PEFT adds a tag with the base model, which can be a local folder. The Hub derives this tag itself.
    data["tags"] = list(dict.fromkeys(tag for tag in tags if not tag.startswith("base_model:"))) or None
    if kept:
        part = OWN_PART.search(new.text)[0]  # type: ignore[index]  # it has been added above
        new.text = OWN_PART.sub(lambda _: part, old.text) if own else f"{old.text.rstrip()}\n\n{part}\n"
    new.data = CardData(**data)
    return str(new)


def update_card_for_hub(api: Any, repo_id: str, file: Path, revision: str | None = None) -> None:
    """Merge the new card in `file` with what people wrote in a repository's card; `api` is an `HfApi`."""
    existing = None
    if api.file_exists(repo_id, "README.md", revision=revision):
        existing = Path(api.hf_hub_download(repo_id, "README.md", revision=revision)).read_text(encoding="utf-8-sig")
    file.write_text(update_card(file.read_text(encoding="utf-8"), existing), encoding="utf-8")


def push_with_card(made: Any, repo_id: str, private: bool | None, token: str | None) -> str:
    """Publish what `made.save_pretrained` writes, with the card of `made.make_card`, in one commit.

    Returns:
        The repository's id.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        made.make_card(repo_id).save(Path(folder, "README.md"))
        update_card_for_hub(api, repo_id, Path(folder, "README.md"))
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload prompter")
    return repo_id


def list_names(id2label: Mapping[int, str] | None) -> str:
    """List the names of classes; of many, only the first ones."""
    names = list((id2label or {}).values())
    shown = ", ".join(map(cell, names[:LARGEST_LIST]))
    return f"{shown}, and {len(names) - LARGEST_LIST} more" if len(names) > LARGEST_LIST else shown or "none"


def cell(value: Any) -> str:
    """Format a value for a cell of a Markdown table."""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write rows, values by column, as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
