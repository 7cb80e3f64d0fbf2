"""An adapter's files on disk and on the Hub: weights, configuration, image processor and card, and nothing else."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from pgn_peft.hub.downloads import ADAPTER_FILES, PROCESSOR_FILES
from pgn_peft.hub.image_size import makes_another_size
from pgn_peft.hub.library_picture import draw_library
from pgn_peft.hub.model_card import EXAMPLE_FILES, PICTURE_FILE, CardFacts, make_card
from pgn_peft.hub.timm_processor import plain_processor
from pgn_peft.nn.images import convert_image
from pgn_peft.nn.preprocessing import check_image_processor
from pgn_peft.tuner.adapters import active_adapter, adapter_tensors, prompt_layer
from pgn_peft.tuner.saved_weights import checksums_of_parts
from pgn_peft.utils.checksums import record
from pgn_peft.utils.files import replacing
from pgn_peft.utils.markdown import update_card
from pgn_peft.utils.sources import is_repo_id, one_line
from pgn_peft.utils.values import filled

CARD_FILE = "README.md"
PUBLISHED_FILES = (*ADAPTER_FILES, CARD_FILE, PICTURE_FILE, *EXAMPLE_FILES)
# An image processor in a second file would take precedence over the one that is saved, and an example without an entry
# in the card is nobody's.
REPLACED_FILES = (*PROCESSOR_FILES, *EXAMPLE_FILES)
EXAMPLE_SIDE = 512  # at most, in pixels
CHECKED_FILES = (SAFETENSORS_WEIGHTS_NAME, *PROCESSOR_FILES)

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
    commit_message: str | None = "Upload adapter"
    create_pr: bool = False


def save(model: nn.Module, image_processor: Any, folder: Path, facts: CardFacts, name: str | None = None) -> list[str]:
    """Write an adapter's files, and remove those of an earlier save that no longer belong to it.

    Args:
        model: a model with an active PGN adapter.
        image_processor: the adapter's image processor.
        folder: where to write. Files that no save writes are left alone.
        facts: facts for the card.
        name: the id that the card's examples load; None: the folder's name.

    Returns:
        The names of the files that were written.
    """
    adapter_name, config = active_adapter(model)
    check_image_processor("image_processor", image_processor)
    image_processor = plain_processor(image_processor)
    with replacing(folder) as staged:
        image_processor.save_pretrained(staged)
        save_file(adapter_tensors(model, adapter_name), staged / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(staged))
        files = [file for name in CHECKED_FILES if (file := staged / name).is_file()]
        record(staged / CONFIG_NAME, files, checksums_of_parts(staged / SAFETENSORS_WEIGHTS_NAME))
        write_card(model, image_processor, staged, facts, name or folder.name, read_card(folder / CARD_FILE))
        written = sorted(file.name for file in staged.iterdir())
    for file in REPLACED_FILES:
        if file not in written:
            folder.joinpath(file).unlink(missing_ok=True)
    return written


def write_card(
    model: nn.Module, image_processor: Any, folder: Path, facts: CardFacts, name: str, existing: str | None
) -> None:
    """Write an adapter's card, its picture and examples; see `save`. `existing` is the card that it replaces."""
    interpolate = makes_another_size(prompt_layer(model), image_processor)
    picture, text = draw_library(model, active_adapter(model)[0])
    picture.save(folder / PICTURE_FILE, optimize=True)
    for file, image in zip(EXAMPLE_FILES, facts.examples.values(), strict=False):
        smaller = convert_image(image)
        smaller.thumbnail((EXAMPLE_SIDE, EXAMPLE_SIDE))
        smaller.save(folder / file, quality=90)
    card = make_card(model, name, facts, interpolate=interpolate, picture=text)
    folder.joinpath(CARD_FILE).write_text(update_card(str(card), existing), encoding="utf-8")


def read_card(file: str | Path) -> str | None:
    """Return the text of a card; None where there is none."""
    return Path(file).read_text(encoding="utf-8-sig") if Path(file).is_file() else None


def check_shareable(model: nn.Module, repo_id: str) -> None:
    """Refuse, before anything is written, what would be of no use to others.

    Raises:
        ValueError: `repo_id` is not a valid id, or the base model is a folder.
    """
    # With the owner, because the card tells others what to load.
    if not is_repo_id(repo_id) or "/" not in repo_id:
        raise ValueError(
            f"`repo_id` must be like 'user/name', but got {repo_id!r}. Name its owner and the repository."
        )
    _, config = active_adapter(model)
    base = config.base_model_name_or_path
    if not is_repo_id(base):
        raise ValueError(
            f"`base_model_name_or_path` must be the id of a model on the Hub, but got {base!r}, which nobody else "
            "has. Name the one that it is a copy of: "
            "model.peft_config['default'].base_model_name_or_path = 'user/model'."
        )


def push(
    model: nn.Module, image_processor: Any, upload: Upload, facts: CardFacts, save_directory: str | Path | None
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
            existing = read_card(api.hf_hub_download(repo_id, CARD_FILE, revision=upload.revision))
        card = update_card(filled(read_card(folder / CARD_FILE)), existing)
        contents = {file: folder / file for file in files} | {CARD_FILE: card.encode()}
        left_over = sorted(present.intersection(REPLACED_FILES).difference(files))
        return api.create_commit(
            repo_id,
            [CommitOperationAdd(file, content) for file, content in contents.items()]
            + [CommitOperationDelete(file) for file in left_over],
            commit_message=upload.commit_message or "Upload adapter",
            revision=upload.revision,
            create_pr=upload.create_pr,
        )
    except Exception as error:  # the client raises errors of many kinds
        raise OSError(_explain(error, folder, upload)) from error


def _explain(error: BaseException, folder: Path, upload: Upload) -> str:
    what = one_line(error)
    if isinstance(error, RuntimeError) and error.__cause__ is not None:  # which only says that an upload failed
        what = f"{what} {one_line(error.__cause__)}"
    command = f"hf upload {upload.repo_id} {folder}"
    if upload.revision is not None:
        command += f" --revision {upload.revision}"
    names = {path.name for path in folder.iterdir()}
    if not names <= set(PUBLISHED_FILES):
        command += "".join(f" --include {name}" for name in PUBLISHED_FILES if name in names)
    return (
        f"`repo_id` must be a repository that takes the upload, but got {upload.repo_id!r}: {what} Nothing is lost: "
        f"the adapter is in {folder}. {REMEDIES.get(_status(error), 'Try again later')}, and push again, or run: "
        f"{command}"
    )


def _status(error: BaseException | None) -> int | None:
    """Find the HTTP status that an error goes back to."""
    while error is not None:
        response = getattr(error, "response", None)
        if response is not None:
            return response.status_code
        error = error.__cause__
    return None
