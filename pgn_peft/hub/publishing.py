"""An adapter's files on disk and on the Hub: weights, configuration, image processor and card, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from pgn_peft.hub.image_processors import makes_another_size, plain_processor
from pgn_peft.hub.model_card import ModelCardInfo, is_repo_id, make_card
from pgn_peft.nn.preprocessing import check_image_processor
from pgn_peft.tuner.adapters import active_adapter, adapter_tensors, prompt_layer
from pgn_peft.utils.files import replacing
from pgn_peft.utils.markdown import update_card

CARD_FILE = "README.md"
# Of an earlier save. Transformers would read this image processor in place of ours.
STALE_FILE = "processor_config.json"


def save(
    model: nn.Module, image_processor: Any, folder: Path, facts: ModelCardInfo, name: str | None = None
) -> list[str]:
    """Write the files of the active adapter, and delete `STALE_FILE`; see `Classifier.save_pretrained`.

    Args:
        model: a model with an active PGN adapter.
        image_processor: the adapter's.
        folder: where to write.
        facts: for the card.
        name: the id that the card's examples load; None: the folder's name.

    Returns:
        The names of the files that were written.
    """
    adapter_name, config = active_adapter(model)
    check_image_processor("image_processor", image_processor)
    image_processor = plain_processor(image_processor)
    with replacing(folder) as staged:
        save_file(adapter_tensors(model, adapter_name), staged / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(staged))
        image_processor.save_pretrained(staged)
        card = describe(model, image_processor, folder, facts, name)
        staged.joinpath(CARD_FILE).write_text(card, encoding="utf-8")
        written = sorted(file.name for file in staged.iterdir())
    if STALE_FILE not in written:
        folder.joinpath(STALE_FILE).unlink(missing_ok=True)
    return written


def describe(
    model: nn.Module, image_processor: Any, folder: Path, facts: ModelCardInfo, name: str | None = None
) -> str:
    """Return the adapter's card with what people wrote into the one in `folder`; see `save`."""
    interpolate = makes_another_size(prompt_layer(model), image_processor)
    card = make_card(model, name or folder.name, facts, interpolate=interpolate)
    file = folder / CARD_FILE
    return update_card(str(card), file.read_text(encoding="utf-8-sig") if file.is_file() else None)


def check_shareable(model: nn.Module, repo_id: str) -> None:
    """Raise ValueError, before anything is written, if `repo_id` is not a valid id or the base model is a folder."""
    # With the owner, because the card tells others what to load.
    if not is_repo_id(repo_id) or "/" not in repo_id:
        raise ValueError(f"{repo_id!r} is not the id of a repository. Name its owner too: 'user/name'.")
    base = active_adapter(model)[1].base_model_name_or_path
    if not is_repo_id(base):
        raise ValueError(
            f"The base model {base!r} is not on the Hub, so nobody else could load the adapter. Name the model that "
            "it is a copy of: model.peft_config['default'].base_model_name_or_path = 'user/model'."
        )
