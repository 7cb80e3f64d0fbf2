"""The adapter of `train_image_classifier.py`: its arguments, and its initialisation from training images."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from typing import Any, get_type_hints

import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoTokenizer,
    PreTrainedModel,
)

from pgn_peft import PGNConfig, embed_texts, frequency_mapping, use_texts
from pgn_peft.training import start_library_from_images
from pgn_peft.tuner.backbones import SUPPORTED

# Images that the library of an adapter in pixel space starts from.
LIBRARY_IMAGES = 256
# With fewer images of each of more classes, 100 steps are too few for prompts in every layer (docs/evidence.md).
FEW_IMAGES, MANY_CLASSES = 4, 20


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
    "prompt_dropout",
    "head",
    "text_correction",
)


@dataclass
class ModelArguments:
    """The frozen model, and what is not a field of `PGNConfig`."""

    model_name_or_path: str = field(metadata={"help": "Id or path of a ViT."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    label_mapping: bool = field(
        default=False, metadata={"help": "With a frozen head: read the model's classes as the task's."}
    )
    templates: list[str] = field(
        default_factory=lambda: ["a photo of a {}."],
        metadata={
            "help": "With head 'text': sentences with {} for a class's name, embedded by the model's text tower."
        },
    )
    text_embeds: str | None = field(
        default=None,
        metadata={
            "help": "With head 'text', for a model without a text tower: a safetensors file with one tensor, an "
            "embedding for each class in the order of the data set's labels."
        },
    )
    prompt_depth: int | None = field(
        default=None,
        metadata={
            "help": "Number of encoder layers with prompts of their own; 0: all of them. By default all, but 1 for "
            "prompts that are or become pixels, for texts, and for few images of each of many classes."
        },
    )

    def choose(self, images: int, classes: int) -> str:
        """Settle what was left open, by the rule that the README gives, and say what applies.

        Args:
            images: to train on.
            classes: of the task.

        Returns:
            One line to print.
        """
        each = f"{images / classes:.3g} images of each of {classes} classes"
        if self.prompt_space == "pixel":
            rule, depth = "prompts in pixels, for a model that can only be called", 1
        elif self.prompt_layout is not None or self.head == "text":
            rule, depth = "prompts for the first layer", 1
        elif images < FEW_IMAGES * classes and classes > MANY_CLASSES:
            rule, depth = "few images of many classes: prompts for the first layer, which learn in fewer steps", 1
        else:
            rule, depth = "prompts in every layer", 0
        if self.prompt_depth is None:
            self.prompt_depth = depth
        elif self.prompt_depth != depth:
            rule = f"--prompt_depth {self.prompt_depth}, as asked for; the rule is: {rule}"
        return f"{each}: {rule} (README, 'Which method')"

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


def load_backbone(adapter: ModelArguments) -> PreTrainedModel:
    """Load the model: as its checkpoint was saved for texts, else as a classifier; for features if there is none."""
    source = {"pretrained_model_name_or_path": adapter.model_name_or_path, "revision": adapter.model_revision}
    config = AutoConfig.from_pretrained(**source)
    if adapter.head == "text":
        name = (config.architectures or [type(config).__name__])[0]
        if name not in SUPPORTED or not SUPPORTED[name].has_texts:
            raise SystemExit(
                f"`model_name_or_path` must be a model for images and texts with --head text, but got a {name}. Name "
                "a CLIP or SigLIP checkpoint."
            )
        return getattr(transformers, name).from_pretrained(**source)
    if type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return AutoModelForImageClassification.from_pretrained(**source)
    return AutoModel.from_pretrained(**source)


def add_texts(model, adapter: ModelArguments, labels: list[str]) -> None:
    """Give an adapter with texts as classes the embeddings of a file, or of the classes' names."""
    if adapter.text_embeds is None:
        tokenizer = AutoTokenizer.from_pretrained(adapter.model_name_or_path, revision=adapter.model_revision)
        use_texts(model, embed_texts(model.get_base_model(), tokenizer, labels, adapter.templates))
        return
    tensors = load_file(adapter.text_embeds)
    if len(tensors) != 1:
        raise SystemExit(
            f"`text_embeds` must hold one tensor, but got {', '.join(tensors) or 'none'} in {adapter.text_embeds!r}. "
            "Save the embeddings of the classes alone."
        )
    use_texts(model, *tensors.values())


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


def start_library(model, rows: Dataset) -> None:
    """Start the library of an adapter from the training images; `rows` without augmentation."""
    chosen = rows.shuffle(seed=0).select(range(min(LIBRARY_IMAGES, len(rows))))
    start_library_from_images(model, chosen[:]["pixel_values"])
