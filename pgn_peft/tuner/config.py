"""`PGNConfig`: the configuration of an adapter, and its files."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from pgn_peft.tuner.fields import PGNFields, PGNPeftType, own_fields
from pgn_peft.tuner.forward_compatibility import name_newer, reads_newer
from pgn_peft.tuner.saved_weights import check_saved_weights, checksums_of_parts, find_weights
from pgn_peft.utils.checksums import compare_file, record, with_checksums
from pgn_peft.utils.files import read_settings, replacing

# Containers of an adapter's modules, which have checksums of their own.
PARTS = ("pgn_generator", "pgn_library", "pgn_head")


@with_checksums(CONFIG_NAME)
@reads_newer
@dataclass
class PGNConfig(PGNFields):
    """Configuration of a Prompt Generation Network adapter.

    A field left at None is filled from the model when the adapter is created, and saved with it.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has an impossible value.

    Source: arXiv:2210.06466. Differs by default from the official code, whose form is `generator_image_size=None`
    (its released checkpoints saw 224 px), `slot_prompts=False` and `initial_logit_std=0`.
    """

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, with checksums; see `PeftConfig.save_pretrained`.

        Called by a `PeftModel` it records the checksum of the weights too, which are there already.

        Raises:
            OSError: the folder cannot be written to.
        """
        # PEFT's models pass this argument, after the weights are written. Transformers' models write them afterwards,
        # so that what lies there now may be those of an earlier save.
        weights_are_written = "auto_mapping_dict" in kwargs
        weights = Path(save_directory, SAFETENSORS_WEIGHTS_NAME)
        with replacing(Path(save_directory)) as folder:
            super().save_pretrained(str(folder), **kwargs)
            if weights_are_written and weights.is_file():
                record(folder / CONFIG_NAME, [weights], checksums_of_parts(weights))
            else:
                record(folder / CONFIG_NAME)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PGNConfig:
        """Load the configuration of a saved adapter and check its weights; see `PeftConfig.from_pretrained`.

        From the Hub this fetches the weights too, which a loader would do next.

        Raises:
            FileNotFoundError: there are no weights beside the configuration.
            OSError: a save was interrupted, and its files cannot be moved to their places.
            ValueError: there is no configuration; the weights cannot be read or are not what it describes; or one of
                the two was changed after it was saved. PEFT would find that out after it had changed the model, or
                not at all.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        # The width is recorded when an adapter is made; without it there are no weights to check.
        if config.hidden_size is not None:
            download_kwargs, _, _ = cls._split_kwargs(kwargs)
            with name_newer(config.pgn_peft_version):
                folder = find_weights(str(pretrained_model_name_or_path), subfolder, download_kwargs)
                check_saved_weights(folder, config)
            compare_file(folder / SAFETENSORS_WEIGHTS_NAME, config.saved_checksums, CONFIG_NAME)
            for part in PARTS:  # the file's checksum includes them
                config.saved_checksums.pop(part, None)
            config.weights_file = folder / SAFETENSORS_WEIGHTS_NAME
        return config

    def check_weights_file(self) -> None:
        """Refuse, where the configuration was read from a file, weights that were replaced since then.

        Called once, when the tensors that a loader has read go into the model. Another process that saves there
        meanwhile could have mixed two adapters: safetensors opens a file twice.

        Raises:
            OSError: the file has another checksum.
        """
        file, self.weights_file = self.weights_file, None
        if file is None or not file.is_file():
            return
        try:
            compare_file(file, self.saved_checksums, CONFIG_NAME)
        except ValueError as error:
            raise OSError(
                f"`{file}` must not be written to while it is loaded, but got other content. Load it again."
            ) from error

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read the fields of a configuration's file.

        Raises:
            ValueError: the file does not hold a JSON object, or the config is of another method.
        """
        settings = read_settings(Path(path_json_file))
        if settings.get("peft_type") != PGNPeftType.PGN.value:
            raise ValueError(
                f"`peft_type` must be {PGNPeftType.PGN.value!r}, but got {settings.get('peft_type')!r} in "
                f"{str(path_json_file)!r}. Load adapters of other methods with PEFT."
            )
        return super().from_json_file(path_json_file, **kwargs)


def _describe_fields() -> str:
    indent = 4 * " "
    texts = (f"{field.name}: {field.metadata['help']}" for field in own_fields())
    return "\n".join(textwrap.fill(text, 115, initial_indent=indent, subsequent_indent=2 * indent) for text in texts)


# Python -OO leaves no docstring to complete.
_text = inspect.cleandoc(PGNConfig.__doc__ or "")
PGNConfig.__doc__ = _text.replace("Raises:", f"Args:\n{_describe_fields()}\n\nRaises:", 1)
