"""Fields that a config records from the model; those of a saved adapter are compared with the model."""

from __future__ import annotations

from torch import nn

from pgn_peft.nn.layout import make_layout
from pgn_peft.tuner.backbones import AVERAGES_PATCHES, GIVES_POSITIONS, SUPPORTED, Backbone
from pgn_peft.tuner.config import PGNConfig
from pgn_peft.tuner.embeddings import own_image_size, patch_projection
from pgn_peft.tuner.head import PGNHead, labels_of
from pgn_peft.utils.labels import number_labels
from pgn_peft.utils.values import filled


def record_base(config: PGNConfig, model: nn.Module, backbone: Backbone) -> None:
    """Compare the config with the model's width, channels and patches, and record them.

    Raises:
        ValueError: a recorded field differs from the model.
    """
    embeddings = model.get_submodule(backbone.embeddings)
    reason = AVERAGES_PATCHES if backbone.reads_all else GIVES_POSITIONS if backbone.positions else None
    if reason is not None and config.prompt_space == "latent" and config.prompt_layout is not None:
        raise ValueError(
            f"`prompt_layout` must be None with prompt_space='latent' for a {type(model).__name__}, but got "
            f"{config.prompt_layout!r}: {reason}. Use prompt_space='pixel' for prompts that become pixels."
        )
    grows = config.prompt_space == "pixel" and config.prompt_layout == "append"
    if grows and (backbone.positions or backbone.carries):
        raise ValueError(
            f"`prompt_layout` must be 'dense' or 'canvas' for a {type(model).__name__}, but got 'append': it computes "
            "positions from the size of the image without prompts."
        )
    projection = patch_projection(embeddings)
    found: dict[str, int | None] = {"hidden_size": projection.out_channels, "num_channels": projection.in_channels}
    if config.prompt_layout is not None:
        found["patch_size"] = _patch_size(projection)
    num_features = backbone.num_features(model) if backbone.head is not None or has_own_head(config) else None
    found["head_features"] = None if num_features == projection.out_channels else num_features
    for name, value in found.items():
        recorded = getattr(config, name)
        if recorded is not None and recorded != value:
            raise ValueError(
                f"`{name}` must be {value}, as in this {type(model).__name__}, but got {recorded}: the adapter was "
                "made for another model. Load it on the model that `base_model_name_or_path` names: "
                f"{config.base_model_name_or_path!r}."
            )
        setattr(config, name, value)
    if config.prompt_layout is not None:
        _record_layout(config, embeddings)
    config.target_modules = [backbone.embeddings]
    # PeftModel.save_pretrained writes this by itself, Transformers' save_pretrained does not.
    config.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}


def has_own_head(config: PGNConfig) -> bool:
    """Whether an adapter brings a head to a model that has none: it has labels."""
    return config.head == "text" or config.id2label is not None or config.num_labels is not None


def record_depth(config: PGNConfig, model: nn.Module, layers: list[str]) -> None:
    """Set the number of encoder layers with prompts of their own.

    Raises:
        ValueError: the adapter wants more layers than there are.
    """
    if config.prompt_depth is None:
        config.prompt_depth = len(layers)
    if config.prompt_depth > len(layers):
        raise ValueError(
            f"`prompt_depth` must be at most {len(layers)}, the layers of this {type(model).__name__}, but got "
            f"{config.prompt_depth}. None means all of them."
        )


def _patch_size(projection: nn.Conv2d) -> int:
    height, width = projection.kernel_size
    if height != width:
        raise ValueError(
            f"`prompt_layout` must be None for a model whose patches are not square, but got {height} x {width} "
            "pixels. Use prompts in latent space without a layout."
        )
    return height


def _record_layout(config: PGNConfig, embeddings: nn.Module) -> None:
    """Set the images' size and the number of prompts that fills the layout."""
    if config.image_size is None:
        height, width = own_image_size(embeddings)
        if height != width:
            raise ValueError(
                f"`image_size` must be given with a `prompt_layout` for a model with images of {height} x {width} "
                "pixels, but got None. Give the side of square images."
            )
        config.image_size = height
    mean, std = config.image_mean or [], config.image_std or []
    if config.prompt_space == "pixel" and not len(mean) == len(std) == config.num_channels:
        raise ValueError(
            f"`image_mean` and `image_std` must have {config.num_channels} numbers, one for each channel of the "
            f"model, but got {len(mean)} and {len(std)}. Copy them from the model's image processor."
        )
    if config.jpeg_quality is not None and config.num_channels not in (1, 3):
        raise ValueError(
            f"`jpeg_quality` must be None for a model with {config.num_channels} channels, but got "
            f"{config.jpeg_quality}. JPEG holds one or three."
        )
    layout = make_layout(
        filled(config.prompt_layout), (config.image_size,) * 2, filled(config.patch_size), config.num_virtual_tokens
    )
    config.num_virtual_tokens = layout.num_virtual_tokens


def record_labels(config: PGNConfig, model: nn.Module, backbone: Backbone) -> None:
    """Set the adapter's labels: those of its config, or else the model's own.

    Raises:
        TypeError: the model's head is not linear.
        ValueError: the labels do not fit the model, or there are none.
    """
    head = None if backbone.head is None else model.get_submodule(backbone.head)
    if config.head == "text" and not backbone.has_texts:
        raise ValueError(
            f"`head` must be 'trained' or 'frozen' for a {type(model).__name__}, but got 'text'. Load the "
            f"checkpoint as one of {', '.join(name for name, found in SUPPORTED.items() if found.has_texts)}."
        )
    if head is None:
        if has_own_head(config):
            _record_own_labels(config, model, backbone)
        return
    plain_head = head.get_base_layer() if isinstance(head, PGNHead) else head
    if not isinstance(plain_head, (nn.Linear, nn.Identity)):
        raise TypeError(
            f"`model` must have a linear head, but got a {type(plain_head).__name__} at {backbone.head!r}. Name it "
            "differently and train it through `modules_to_save`."
        )
    base = head.base_labels if isinstance(head, PGNHead) else labels_of(head, getattr(model, "config", None))
    if isinstance(plain_head, nn.Linear) and plain_head.out_features != len(base.id2label):
        raise ValueError(
            f"`id2label` in the model's config must name {plain_head.out_features} classes, the size of its head, but "
            f"got {len(base.id2label)}. Correct model.config.id2label."
        )
    if config.id2label is None and config.num_labels in (None, len(base.id2label)):
        config.id2label = base.id2label or None
        config.problem_type = config.problem_type or base.problem_type
    elif config.id2label is None:
        config.id2label = number_labels(filled(config.num_labels))
    if config.id2label is None:
        raise ValueError(
            f"`num_labels` must be given for a {type(model).__name__} without labels, but got None. Write "
            "PGNConfig(id2label=dict(enumerate(names))), or adapt the plain model for features."
        )
    config.num_labels = len(config.id2label)
    if config.label_mapping is not None:
        if max(config.label_mapping) >= len(base.id2label):
            raise ValueError(
                f"`label_mapping` must hold class indices of the model, 0..{len(base.id2label) - 1}, but got "
                f"{max(config.label_mapping)}. Make it with this model's logits."
            )
        return
    if config.head == "frozen" and config.num_labels != len(base.id2label):
        raise ValueError(
            f"`num_labels` must be {len(base.id2label)}, that of the model, with head='frozen', but got "
            f"{config.num_labels}. Use head='trained' for other labels, or give a `label_mapping`."
        )
    if config.head == "frozen" and config.id2label != base.id2label:
        raise ValueError(
            f"`id2label` must be the model's own with head='frozen', but got {config.id2label!r}. Leave it out, or "
            "give the model these labels first: model.config.id2label = ...; or map its answers: `label_mapping`."
        )


def _record_own_labels(config: PGNConfig, model: nn.Module, backbone: Backbone) -> None:
    if config.head == "frozen":
        raise ValueError(
            f"`head` must be 'trained' for labels on a {type(model).__name__}, which has no head, but got 'frozen'. "
            "Leave the labels out for features, or train a head."
        )
    if backbone.read is None:
        raise ValueError(
            f"`id2label` and `num_labels` must be left out for a {type(model).__name__}, but got "
            f"{config.num_labels or len(config.id2label or {})} labels. Use the ForImageClassification class."
        )
    if config.id2label is None and config.num_labels is None:
        raise ValueError(
            "`id2label` must name the classes with head='text', but got None. Write "
            "PGNConfig(head='text', id2label=dict(enumerate(names)))."
        )
    if config.id2label is None:
        config.id2label = number_labels(filled(config.num_labels))
    config.num_labels = len(config.id2label)
