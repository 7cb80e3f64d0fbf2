"""An adapter's files on disk and on the Hub: weights, configuration, image processor and card, and nothing else."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from pgn_peft.hub.image_processors import makes_another_size, plain_processor
from pgn_peft.hub.model_card import EXAMPLE_FILES, ModelCardInfo, make_card
from pgn_peft.nn.images import convert_image
from pgn_peft.nn.preprocessing import check_image_processor
from pgn_peft.tuner.adapters import active_adapter, adapter_tensors, prompt_layer
from pgn_peft.utils.files import replacing
from pgn_peft.utils.markdown import update_card
from pgn_peft.utils.sources import is_repo_id, one_line

CARD_FILE = "README.md"
# Files of an earlier save that a new one deletes. In processor_config.json Transformers would find another image
# processor first, and examples without an entry in the card belong to nothing.
REPLACED_FILES = ("preprocessor_config.json", "processor_config.json", *EXAMPLE_FILES)
EXAMPLE_SIDE = 512  # at most, in pixels

# Remedies by HTTP status of the Hub.
REMEDIES: dict[int | None, str] = {
    401: "Log in with `hf auth login`, or pass a token",
    403: "Use a token with write access, or a repository of your own",
    404: "Look for a misspelt name or branch",
    429: "Wait until the Hub takes requests again",
}


@dataclass(frozen=True)
class Upload:
    """Where an adapter goes; each field as in `Classifier.push_to_hub`."""

    repo_id: str
    private: bool | None = None
    token: str | bool | None = None
    revision: str | None = None
    commit_message: str | None = None
    create_pr: bool = False


def save(
    model: nn.Module, image_processor: Any, folder: Path, facts: ModelCardInfo, name: str | None = None
) -> list[str]:
    """Write an adapter's files, and delete those of an earlier save that no longer belong to it.

    Args:
        model: a model with an active PGN adapter.
        image_processor: the adapter's image processor.
        folder: where to write. Other files there are left alone.
        facts: facts for the card.
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
        for file, image in zip(EXAMPLE_FILES, facts.examples.values(), strict=False):
            smaller = convert_image(image)
            smaller.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))
            smaller.save(staged / file, quality=90)
        card = describe(model, image_processor, folder, facts, name)
        staged.joinpath(CARD_FILE).write_text(card, encoding="utf-8")
        written = sorted(file.name for file in staged.iterdir())
    for file in set(REPLACED_FILES).difference(written):
        folder.joinpath(file).unlink(missing_ok=True)
    return written


def describe(
    model: nn.Module, image_processor: Any, folder: Path, facts: ModelCardInfo, name: str | None = None
) -> str:
    """Return the adapter's card with what people wrote into the one in `folder`; see `save`."""
    interpolate = makes_another_size(prompt_layer(model), image_processor)
    card = make_card(model, name or folder.name, facts, interpolate=interpolate)
    return update_card(str(card), _read_card(folder / CARD_FILE))


def check_shareable(model: nn.Module, repo_id: str) -> None:
    """Refuse, before anything is written, what would be of no use to others.

    Raises:
        ValueError: `repo_id` is not a valid id, or the base model is a folder.
    """
    # With the owner, because the card tells others what to load.
    if not is_repo_id(repo_id) or "/" not in repo_id:
        raise ValueError(f"{repo_id!r} is not the id of a repository. Name its owner too: 'user/name'.")
    base = active_adapter(model)[1].base_model_name_or_path
    if not is_repo_id(base):
        raise ValueError(
            f"The base model {base!r} is not on the Hub, so nobody else could load the adapter. Name the model that "
            "it is a copy of: model.peft_config['default'].base_model_name_or_path = 'user/model'."
        )


def push(
    model: nn.Module, image_processor: Any, upload: Upload, facts: ModelCardInfo, save_directory: str | Path | None
) -> CommitInfo:
    """Save an adapter's files, and upload them; see `Classifier.push_to_hub`."""
    check_shareable(model, upload.repo_id)
    # Not a context manager: after a failed upload the folder is kept.
    folder = Path(tempfile.mkdtemp(prefix="adapter-") if save_directory is None else save_directory)
    commit = push_files(folder, save(model, image_processor, folder, facts, upload.repo_id), upload)
    if save_directory is None:
        shutil.rmtree(folder)
    return commit


def push_files(folder: Path, files: list[str], upload: Upload) -> CommitInfo:
    """Upload the files of a saved adapter in one commit, which also deletes what an earlier push left over.

    Text that people wrote into the card on the Hub is kept.

    Args:
        folder: where the adapter was saved.
        files: what that save wrote.
        upload: where they go.

    Raises:
        OSError: the upload failed; the message names a remedy.
    """
    api = HfApi(token=upload.token)
    try:
        repo_id = api.create_repo(upload.repo_id, private=upload.private, exist_ok=True).repo_id
        if upload.revision is not None and not upload.create_pr:
            api.create_branch(repo_id, branch=upload.revision, exist_ok=True)
        present = set(api.list_repo_files(repo_id, revision=upload.revision))
        existing = None
        if CARD_FILE in present:
            existing = _read_card(Path(api.hf_hub_download(repo_id, CARD_FILE, revision=upload.revision)))
        card = update_card(_read_card(folder / CARD_FILE) or "", existing)
        additions = [CommitOperationAdd(file, folder / file) for file in files if file != CARD_FILE]
        left_over = sorted(present.intersection(REPLACED_FILES).difference(files))
        return api.create_commit(
            repo_id,
            [
                *additions,
                CommitOperationAdd(CARD_FILE, card.encode()),
                *(CommitOperationDelete(file) for file in left_over),
            ],
            commit_message=upload.commit_message or "Upload adapter",
            revision=upload.revision,
            create_pr=upload.create_pr,
        )
    except Exception as error:  # the client raises errors of many kinds
        what = one_line(error)
        if isinstance(error, RuntimeError) and error.__cause__ is not None:  # which only says that an upload failed
            what = f"{what} {one_line(error.__cause__)}"
        remedy = REMEDIES.get(_status(error), "Try again later")
        raise OSError(
            f"The upload to {upload.repo_id!r} failed: {what} {remedy}, and push again; the adapter is saved in "
            f"{folder}."
        ) from error


def _read_card(file: Path) -> str | None:
    """Return the text of a card; None where there is none."""
    return file.read_text(encoding="utf-8-sig") if file.is_file() else None


def _status(error: BaseException | None) -> int | None:
    """Find the HTTP status that an error goes back to."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return response.status_code
        error = error.__cause__
    return None
