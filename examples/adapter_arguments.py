"""The adapter that `train_image_classifier.py` trains: its arguments, and its start from the training images."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from datasets import Dataset
from transformers import PreTrainedModel

from pgn_peft import PGNConfig, frequency_mapping
from pgn_peft.nn.preprocessing import denormalize
from pgn_peft.training import start_library_from_images

# Images that the library of an adapter in pixel space starts from.
LIBRARY_IMAGES = 256


@dataclass
class AdapterArguments:
    """What to train: a frozen model, and the adapter on it. See `PGNConfig` for the fields."""

    model_name_or_path: str = field(metadata={"help": "Id or path of a ViT."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    num_virtual_tokens: int | None = field(
        default=None, metadata={"help": "Prompts per image; by default 16, or what fills the layout."}
    )
    prompt_depth: int = field(
        default=1, metadata={"help": "Layers that get prompts of their own; 1: the first; 0: all of them."}
    )
    library_size: int = 64
    generator: str = field(default="resnet10", metadata={"help": "'resnet10', or 'static' for the control."})
    generator_image_size: int | None = field(
        default=64, metadata={"help": "Side of what the generator sees, in pixels."}
    )
    generator_width: int = 16
    generator_norm: str = "batch"
    generator_rank: int | None = None
    mixing: str = "softmax"
    slot_prompts: bool | None = None
    initializer_range: float = 0.02
    initial_logit_std: float | None = None
    prompt_space: str = field(default="latent", metadata={"help": "'latent', or 'pixel': prompts are valid pixels."})
    prompt_layout: str | None = field(default=None, metadata={"help": "'canvas' or 'append', where pixels go."})
    image_offset: bool = field(default=True, metadata={"help": "In pixel space: learn a patch added to the image."})
    head: str = field(default="trained", metadata={"help": "'trained', or 'frozen': the model's own."})
    label_mapping: bool = field(
        default=False, metadata={"help": "With a frozen head: read the model's classes as the task's."}
    )

    def config(self, labels: list[str], processor, image_size: int | None, mapping: list[int] | None) -> PGNConfig:
        """Return the adapter's configuration for these classes."""
        in_pixels = self.prompt_space == "pixel"
        return PGNConfig(
            num_virtual_tokens=self.num_virtual_tokens,
            prompt_depth=self.prompt_depth or None,
            library_size=self.library_size,
            generator=self.generator,
            generator_image_size=self.generator_image_size,
            generator_width=self.generator_width,
            generator_norm=self.generator_norm,
            generator_rank=self.generator_rank,
            mixing=self.mixing,
            slot_prompts=self.slot_prompts,
            initializer_range=self.initializer_range,
            initial_logit_std=self.initial_logit_std,
            prompt_space=self.prompt_space,
            prompt_layout=self.prompt_layout,
            image_offset=self.image_offset,
            image_size=image_size if in_pixels or self.prompt_layout else None,
            image_mean=list(processor.image_mean) if in_pixels else None,
            image_std=list(processor.image_std) if in_pixels else None,
            head=self.head,
            label_mapping=mapping,
            # Transformers' loss would find out in the first step, and a compiled model be compiled again.
            problem_type="single_label_classification" if len(labels) > 1 else None,
            # A frozen head without a mapping has the model's labels.
            id2label=None if self.head == "frozen" and mapping is None else dict(enumerate(labels)),
        )


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
