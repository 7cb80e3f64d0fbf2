"""`PGNConfig`: the configuration of an adapter, and its files."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any

from pgn_peft.tuner.fields import PGNFields, own_fields
from pgn_peft.tuner.forward_compatibility import name_newer, reads_newer
from pgn_peft.tuner.saved_weights import check_saved_weights, find_weights


@reads_newer
@dataclass
class PGNConfig(PGNFields):
    """Configuration of a Prompt Generation Network adapter.

    A field left at None is filled from the model when the adapter is created, and saved with it.

    Args:
    {fields}

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has an impossible value.

    Source: arXiv:2210.06466. Differs by default from the official code, whose form is `generator_image_size=None`
    (its released checkpoints saw 224 px), `slot_prompts=False` and `initial_logit_std=0`.
    """

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PGNConfig:
        """Load the configuration of a saved adapter and check its weights; see `PeftConfig.from_pretrained`.

        From the Hub this fetches the weights too, which a loader would do next.

        Raises:
            FileNotFoundError: there are no weights beside the configuration.
            ValueError: there is no configuration, or the weights cannot be read or are not what it describes. PEFT
                would find that out after it had changed the model, or not at all.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        # The width is recorded when an adapter is made; without it this is a bare configuration.
        if config.hidden_size is not None:
            download_kwargs, _, _ = cls._split_kwargs(kwargs)
            with name_newer(config.pgn_peft_version):
                folder = find_weights(str(pretrained_model_name_or_path), subfolder, download_kwargs)
                check_saved_weights(folder, config)
        return config


def _describe_fields() -> str:
    indent = 8 * " "
    return "\n".join(
        textwrap.fill(
            f"{field.name}: {field.metadata['help']}", 119, initial_indent=indent, subsequent_indent=indent + 4 * " "
        )
        for field in own_fields()
    )


# There is no docstring to complete where Python strips them (-OO).
PGNConfig.__doc__ = (PGNConfig.__doc__ or "").replace("{fields}", _describe_fields())
