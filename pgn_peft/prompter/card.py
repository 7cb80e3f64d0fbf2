"""The model card of an `ImagePrompter` on the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgn_peft.utils.citation import CITATION

if TYPE_CHECKING:
    from huggingface_hub import ModelCard


def make_prompter_card(repo_id: str, **facts: Any) -> ModelCard:
    """Fill `card_template.md` (with `huggingface_hub` and `jinja2` installed).

    Args:
        repo_id: id of the repository.
        **facts: the other variables of the template.
    """
    from huggingface_hub import ModelCard, ModelCardData

    data = ModelCardData(
        library_name="pgn-peft",
        pipeline_tag="image-classification",
        tags=["pgn-peft", "visual-prompting", "image-classification"],
    )
    return ModelCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("card_template.md")),
        repo_id=repo_id,
        title=repo_id.rpartition("/")[2],
        citation=CITATION,
        **facts,
    )
