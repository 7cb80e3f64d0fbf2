"""Folders of adapters and base models, local or from the Hub. Only JSON and safetensors are downloaded.

Pickles and Python files, which can run code, are neither downloaded nor opened.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from pgn_peft.tuner.config import PGNConfig
from pgn_peft.utils.checksums import compare_file
from pgn_peft.utils.files import finish_save, read_settings
from pgn_peft.utils.values import check_processor_settings

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, *PROCESSOR_FILES)
BASE_CONFIG_FILE = "config.json"
BASE_FILES = (
    BASE_CONFIG_FILE,
    "model.safetensors",
    "model.safetensors.index.json",
    "model-*-of-*.safetensors",
    *PROCESSOR_FILES,
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


def read_adapter_config(folder: Path, name: str) -> PGNConfig:
    """Read the configuration of an adapter that is not trusted, and check its weights against it.

    Args:
        folder: the adapter's folder.
        name: what the user called it.

    Raises:
        OSError: a file is missing.
        ValueError: the adapter is of another method, or not of a classifier; or a file is damaged.
    """
    finish_save(folder)
    for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not folder.joinpath(file).is_file():
            raise OSError(f"`{file}` must be in the adapter, but got none in {name!r}. {_pickle_remedy(folder, file)}")
    config = PGNConfig.from_pretrained(str(folder))
    if config.num_labels is None:
        raise ValueError(
            f"`num_labels` must be recorded in a classifier's adapter, but got None in {name!r}, which answers with "
            "features. Load it with peft.AutoPeftModel."
        )
    for file in PROCESSOR_FILES:
        compare_file(folder / file, config.saved_checksums, CONFIG_NAME)
    return config


@contextmanager
def unchanging(folder: Path, config: PGNConfig) -> Iterator[Path]:
    """Copy an adapter's files, so that no other process can replace them while they are loaded.

    Loaders open a file more than once: they could read the header of one adapter and the weights of another.

    Args:
        folder: the adapter's folder.
        config: as `read_adapter_config` returned it.

    Yields:
        A folder with the files that were there when the configuration was read.

    Raises:
        OSError: they were replaced meanwhile.
    """
    with tempfile.TemporaryDirectory() as copy:
        for file in filter(Path.is_file, (folder / name for name in ADAPTER_FILES)):
            shutil.copyfile(file, Path(copy, file.name))
        try:
            for name in (SAFETENSORS_WEIGHTS_NAME, *PROCESSOR_FILES):
                compare_file(Path(copy, name), config.saved_checksums, CONFIG_NAME)
            same = PGNConfig.from_pretrained(copy).saved_checksums == config.saved_checksums
        except ValueError:
            same = False
        if not same:
            raise OSError(f"`{folder}` must not be written to while it is loaded, but got other files. Load it again.")
        yield Path(copy)


def _pickle_remedy(folder: Path, file: str) -> str:
    if file == CONFIG_NAME:
        return "Look for a misspelt name, or pass the `subfolder` that the adapter lies in."
    pickled = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    found = f"Beside it there is only {', '.join(pickled)}. " if pickled else ""
    return (
        f"{found}Pickled weights (adapter_model.bin) are never read, because they can run code. Where you trust them, "
        "load them with PEFT and save the adapter again, which writes safetensors."
    )


def check_base_folder(folder: Path, name: str) -> None:
    """Refuse a base model that is not a plain one with weights in safetensors.

    Raises:
        OSError: a file is missing.
        ValueError: the base model is itself an adapter.
    """
    if folder.joinpath(CONFIG_NAME).is_file():
        # Transformers would follow it to yet another base, and read its weights of whatever kind.
        raise ValueError(
            f"`base_model_name_or_path` must be a plain model, but got {name!r}, which is an adapter. Name the model "
            "below it."
        )
    if not folder.joinpath(BASE_CONFIG_FILE).is_file() or not any(folder.glob("model*.safetensors")):
        raise OSError(
            f"`base_model_name_or_path` must have {BASE_CONFIG_FILE} and weights in safetensors, but got {name!r} "
            "without. Pickled weights are never read, because they can run code. Pass the path of a converted copy."
        )


def check_processor_files(folder: Path) -> None:
    """Check what an image processor's files hold.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a file is damaged, or a field has an impossible value.
    """
    for name in PROCESSOR_FILES:
        if folder.joinpath(name).is_file():
            settings = read_settings(folder / name)
            nested = settings.get("image_processor")
            check_processor_settings(nested if isinstance(nested, dict) else settings)


def has_processor(folder: Path) -> bool:
    """Whether an image processor lies in a folder."""
    return any(folder.joinpath(file).is_file() for file in PROCESSOR_FILES)


def processor_source(folder: Path) -> Path:
    """Return what to load an adapter's image processor from.

    That is the file which `save_pretrained` of an image processor writes. In a folder Transformers prefers the other
    one, which an earlier save of a CLIP processor can have left there. (huggingface/transformers#42085)
    """
    file = folder / PROCESSOR_FILES[0]
    return file if file.is_file() else folder
