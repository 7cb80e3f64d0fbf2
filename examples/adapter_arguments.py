"""The adapter of `train_image_classifier.py`: its arguments, and its initialisation from training images."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import Any, get_type_hints

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from pgn_peft import PGNConfig, frequency_mapping
from pgn_peft.nn.preprocessing import denormalize
from pgn_peft.training import start_library_from_images

# Images that the library of an adapter in pixel space starts from.
LIBRARY_IMAGES = 256


# Fields of `PGNConfig` that are arguments of the script as they are.
FIELDS = (
    "num_virtual_tokens",
    "library_size",
    "generator",
    "generator_image_size",
    "generator_width",
    "generator_norm",
    "generator_rank",
    "mixing",
    "slot_prompts",
    "initializer_range",
    "initial_logit_std",
    "prompt_space",
    "prompt_layout",
    "image_offset",
    "jpeg_quality",
    "head",
)


@dataclass
class ModelArguments:
    """The frozen model, and what is not a field of `PGNConfig`."""

    model_name_or_path: str = field(metadata={"help": "Id or path of a ViT."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    label_mapping: bool = field(
        default=False, metadata={"help": "With a frozen head: read the model's classes as the task's."}
    )
    prompt_depth: int = field(
        default=1, metadata={"help": "Number of encoder layers with prompts of their own; 0: all of them."}
    )

    def config(self, labels: list[str], processor, image_size: int | None, mapping: list[int] | None) -> PGNConfig:
        """Return the adapter's configuration for these classes."""
        in_pixels = self.prompt_space == "pixel"
        return PGNConfig(
            **{name: getattr(self, name) for name in FIELDS},
            prompt_depth=self.prompt_depth or None,
            image_size=image_size if in_pixels or self.prompt_layout else None,
            image_mean=list(processor.image_mean) if in_pixels else None,
            image_std=list(processor.image_std) if in_pixels else None,
            label_mapping=mapping,
            # Transformers' loss would find out in the first step, and a compiled model be compiled again.
            problem_type="single_label_classification" if len(labels) > 1 else None,
            # A frozen head without a mapping has the model's labels.
            id2label=None if self.head == "frozen" and mapping is None else dict(enumerate(labels)),
        )


def _argument(name: str) -> tuple[str, type, Any]:
    declared = PGNConfig.__dataclass_fields__[name]
    metadata = {"help": declared.metadata["help"]}
    return name, get_type_hints(PGNConfig)[name], field(default=declared.default, metadata=metadata)


AdapterArguments = make_dataclass("AdapterArguments", map(_argument, FIELDS), bases=(ModelArguments,))


def find_label_mapping(backbone: PreTrainedModel, rows: Dataset, interpolate: bool) -> list[int]:
    """Find by frequency which of the model's classes stand for the task's: `rows` without augmentation."""
    backbone.eval()
    logits = []
    with torch.inference_mode():
        for start in range(0, len(rows), 100):
            pixel_values = rows[start : start + 100]["pixel_values"].to(backbone.device)
            logits.append(backbone(pixel_values, interpolate_pos_encoding=interpolate).logits.cpu())
    labels = torch.tensor(rows.with_format(None)["label"])
    names = rows.features["label"].names
    return frequency_mapping(torch.cat(logits), labels, len(names), backbone.config.id2label)


def start_library(model, rows: Dataset, processor) -> None:
    """Start the library of an adapter in pixel space from the training images."""
    chosen = rows.shuffle(seed=0).select(range(min(LIBRARY_IMAGES, len(rows))))
    pixels = denormalize(chosen[:]["pixel_values"], processor.image_mean, processor.image_std).clamp(0, 1)
    start_library_from_images(model, pixels)
