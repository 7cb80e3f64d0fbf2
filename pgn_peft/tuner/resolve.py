"""`resolve`: completes a config with what is left open, for one model, and refuses what cannot work."""

from __future__ import annotations

import copy
import warnings
from typing import cast

from torch import nn

from pgn_peft.nn.layout import LAYOUTS, make_layout
from pgn_peft.tuner.backbones import (
    AVERAGES_PATCHES,
    GIVES_POSITIONS,
    HEAD,
    SUPPORTED,
    Backbone,
    find_backbone,
    find_layers,
)
from pgn_peft.tuner.config import LARGEST, PGNConfig, own_fields
from pgn_peft.tuner.embeddings import own_image_size, patch_projection
from pgn_peft.tuner.head import PGNHead, labels_of
from pgn_peft.tuner.headless import can_get_head
from pgn_peft.tuner.prompts import describe_modules
from pgn_peft.utils import not_none
from pgn_peft.utils.labels import Labels, number_labels

# Attribute of a resolved config: the fields that were filled from the model, before and after. One config can serve
# several models, though PEFT keeps the object that the user passed.
FILLED = "_filled"

# A condition under which a config cannot work, and what to tell its user.
Rule = tuple[bool, str]


def resolve(config: PGNConfig, model: nn.Module) -> PGNConfig:
    """Complete a config for a model.

    Args:
        config: an adapter's; not changed.
        model: the model that is adapted, with or without other PGN adapters; not changed.

    Returns:
        A copy in which every field has a value that the adapter needs.

    Raises:
        TypeError: the architecture is not supported, or a field has the wrong type.
        ValueError: fields do not fit each other or the model.
    """
    resolved = copy.deepcopy(config)
    for name, (left_open, completed) in vars(resolved).pop(FILLED, {}).items():
        if getattr(resolved, name) == completed:  # for another model
            setattr(resolved, name, left_open)
    resolved.__post_init__()  # fields can be assigned after the config was made
    backbone = find_backbone(model, resolved.target_modules)  # type: ignore[arg-type]  # no string by now
    in_pixels, generated = resolved.prompt_space == "pixel", resolved.generator != "static"
    if resolved.static_prompts is None:
        resolved.static_prompts = generated and not in_pixels
    if resolved.prompt_layout is None and in_pixels:
        resolved.prompt_layout = "additive"
    if resolved.prompt_depth is None:
        resolved.prompt_depth = 1 if resolved.prompt_layout is not None or resolved.head == "text" else "all"
    if resolved.prompt_dropout is None:
        resolved.prompt_dropout = 0.5 if generated and resolved.prompt_depth != 1 else 0.0
    if resolved.accumulate_prompts is None:
        resolved.accumulate_prompts = resolved.prompt_depth != 1
    if resolved.mixing_init_std is None:
        resolved.mixing_init_std = 4.0
    refuse(_prompt_rules(resolved, backbone))
    _fill_from_backbone(resolved, model, backbone)
    _leave_out_head(resolved, backbone)
    _fill_labels(resolved, model, backbone)
    refuse(_label_rules(resolved, model, backbone))
    tensors = [tensor for module in describe_modules(resolved).values() for tensor in module.state_dict().values()]
    numbers = sum(tensor.numel() for tensor in tensors)
    refuse([(numbers > LARGEST, f"This adapter would have {numbers:,} numbers; most have a million.")])
    pairs = {field.name: (getattr(config, field.name), getattr(resolved, field.name)) for field in own_fields()}
    vars(resolved)[FILLED] = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    return resolved


def refuse(rules: list[Rule]) -> None:
    """Raise the message of the first rule that applies."""
    message = next((message for applies, message in rules if applies), None)
    if message is not None:
        raise ValueError(message)


def _prompt_rules(config: PGNConfig, backbone: Backbone) -> list[Rule]:
    in_pixels, static, layout = config.prompt_space == "pixel", config.generator == "static", config.prompt_layout
    reason = AVERAGES_PATCHES if backbone.reads_all else GIVES_POSITIONS if backbone.positions else None
    return [
        (layout in ("canvas", "append") and (in_pixels or layout == "canvas"),
         f"prompt_layout={layout!r} in pixel space was removed: 'additive' is as accurate or better. Train an adapter "
         "with that, or use the version of pgn_peft that saved this one."),
        (layout not in (None, *LAYOUTS), f"prompt_layout={layout!r}. Choose one of {', '.join(LAYOUTS)}."),
        (layout == "additive" and not in_pixels, "prompt_layout='additive' needs prompt_space='pixel'."),
        (layout == "append" and reason is not None,
         f"prompt_layout='append' has no use on this model: {reason}. Use prompt_space='pixel'."),
        (config.prompt_depth != 1 and layout is not None,
         f"prompt_depth={config.prompt_depth!r} needs latent prompts without a layout: an image brings prompts to the "
         "first layer only."),
        (config.num_virtual_tokens == 0 and (not static or layout is not None),
         "num_virtual_tokens=0, a linear head without prompts, needs generator='static' in latent space."),
        (bool(config.static_prompts) and static,
         "static_prompts=True has no effect with generator='static', whose prompts are all static. Leave it out."),
        (bool(config.static_prompts) and in_pixels, "static_prompts=True needs prompt_space='latent'."),
        (bool(config.accumulate_prompts) and config.prompt_depth == 1,
         "accumulate_prompts=True needs prompts in several layers."),
        (bool(config.prompt_dropout) and static,
         f"prompt_dropout={config.prompt_dropout} has no effect with generator='static'. Leave it out."),
        (not_none(config.prompt_dropout) >= 1, f"prompt_dropout={config.prompt_dropout} must be below 1."),
        (config.generator_rank is not None and in_pixels, "`generator_rank` has no effect in pixel space."),
        (config.jpeg_quality is not None and not in_pixels, "`jpeg_quality` needs prompt_space='pixel'."),
        (config.jpeg_quality is not None and not_none(config.jpeg_quality) > 100, "`jpeg_quality` is at most 100."),
    ]  # fmt: skip


def _fill_from_backbone(config: PGNConfig, model: nn.Module, backbone: Backbone) -> None:
    """Record the model's width, channels and patches, and fill depth, image size and number of prompts from them."""
    embeddings = model.get_submodule(backbone.embeddings)
    projection = patch_projection(embeddings)
    config.hidden_size, config.num_channels = projection.out_channels, projection.in_channels
    config.target_modules = [backbone.embeddings]
    # PeftModel.save_pretrained writes this by itself, Transformers' save_pretrained does not.
    config.auto_mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    if config.prompt_depth != 1:
        layers = find_layers(model, backbone.embeddings)
        config.prompt_depth = len(layers) if config.prompt_depth == "all" else config.prompt_depth
        too_deep = cast(int, config.prompt_depth) > len(layers)
        refuse([(too_deep, f"prompt_depth={config.prompt_depth}, but the model has {len(layers)} layers.")])
    if config.prompt_layout is None:
        config.num_virtual_tokens = 16 if config.num_virtual_tokens is None else config.num_virtual_tokens
        return
    config.patch_size = projection.kernel_size[0]
    size = own_image_size(embeddings) if config.image_size is None else (config.image_size,) * 2
    channels, jpeg = config.num_channels, config.jpeg_quality
    in_pixels = config.prompt_space == "pixel"
    refuse([
        (projection.kernel_size[0] != projection.kernel_size[1],
         f"`prompt_layout` needs square patches, and this model's measure {projection.kernel_size} pixels."),
        (size[0] != size[1], f"This model's images measure {size} pixels. Give `image_size` for square ones."),
        (in_pixels and not len(config.image_mean or []) == len(config.image_std or []) == channels,
         f"prompt_space='pixel' needs `image_mean` and `image_std`, a number for each of {channels} channels: "
         "PGNConfig(image_mean=processor.image_mean, image_std=processor.image_std, ...)."),
        (in_pixels and min(config.image_std or [1]) <= 0, f"`image_std` is {config.image_std}, and must be above 0."),
        (jpeg is not None and channels not in (1, 3), f"JPEG has one or three channels, and this model {channels}."),
    ])  # fmt: skip
    config.image_size = size[0]
    layout = make_layout(not_none(config.prompt_layout), size, config.patch_size, config.num_virtual_tokens)
    config.num_virtual_tokens = layout.num_virtual_tokens


def _leave_out_head(config: PGNConfig, backbone: Backbone) -> None:
    """Drop the head from `modules_to_save`. PEFT's image recipe names it, and the adapter has one of its own."""
    names = config.modules_to_save or []
    heads = {name for name in names if name.rpartition(".")[2] in (HEAD, (backbone.head or HEAD).rpartition(".")[2])}
    if heads:
        warnings.warn(
            f"Leaving {', '.join(sorted(heads))} out of `modules_to_save`: a PGN adapter trains and saves a head of "
            "its own.",
            stacklevel=2,
        )
        config.modules_to_save = [name for name in names if name not in heads] or None


def _fill_labels(config: PGNConfig, model: nn.Module, backbone: Backbone) -> None:
    """Set the adapter's labels: those of its config, or else the model's own."""
    head = None if backbone.head is None else model.get_submodule(backbone.head)
    model_labels = Labels.of(getattr(model, "config", None))
    if config.id2label is None and config.num_labels is None and config.label_mapping is not None:
        config.num_labels = len(config.label_mapping)
    if head is not None:
        base = head.base_labels if isinstance(head, PGNHead) else labels_of(head, getattr(model, "config", None))
        # Users also rename the classes in the model's config, before or instead of here.
        shown = base if model_labels is None or isinstance(head, PGNHead) else model_labels
        if config.id2label is None and config.num_labels in (None, len(shown.id2label)):
            config.id2label = shown.id2label or None
            config.problem_type = config.problem_type or shown.problem_type
    if config.id2label is None and config.num_labels is not None:
        config.id2label = number_labels(config.num_labels)
    if config.id2label is not None:
        if config.num_labels not in (None, len(config.id2label)):
            raise ValueError(f"`num_labels` is {config.num_labels} but `id2label` has {len(config.id2label)} names.")
        config.num_labels = len(config.id2label)
        num_features = backbone.num_features(model)
        config.head_features = None if num_features == config.hidden_size else num_features


def _label_rules(config: PGNConfig, model: nn.Module, backbone: Backbone) -> list[Rule]:
    name, number, mapping = type(model).__name__, config.num_labels, config.label_mapping
    head = None if backbone.head is None else model.get_submodule(backbone.head)
    plain_head = head.get_base_layer() if isinstance(head, PGNHead) else head
    outputs = getattr(plain_head, "out_features", None)
    with_texts = [other for other, found in SUPPORTED.items() if found.has_texts]
    return [
        (config.head == "text" and not backbone.has_texts,
         f"head='text' needs a model whose features are compared with texts, and a {name} has none. Load the "
         f"checkpoint as {', '.join(with_texts)}."),
        (config.head == "text" and number is None, "head='text' needs the classes: id2label=dict(enumerate(names))."),
        (head is not None and number is None, f"This {name} has no labels. Give `id2label` or `num_labels`."),
        (head is not None and not isinstance(plain_head, (nn.Linear, nn.Identity)),
         f"The head {backbone.head!r} is a {type(plain_head).__name__}, and PGN replaces linear heads only."),
        (head is None and number is not None and backbone.read is None,
         f"A {name} cannot get a classification head. Leave the labels out, or load a ForImageClassification class."),
        (head is None and number is not None and config.head == "frozen",
         f"head='frozen' needs a model with a head, and a {name} has none. Leave the labels out for features."),
        (head is None and number is not None and not can_get_head(model),
         f"This {name} cannot get a head: it has a {HEAD!r} already, or its `forward` was replaced, as Accelerate's "
         "mixed precision does. Make the adapter on the model inside, before it is prepared."),
        (mapping is not None and config.head != "frozen", "`label_mapping` needs head='frozen'."),
        (mapping is not None and (len(mapping) != number or len(set(mapping)) != number),
         f"`label_mapping` is {mapping}. It needs a different class of the model for each of {number} classes."),
        (mapping is not None and outputs is not None and not all(0 <= index < outputs for index in mapping),
         f"`label_mapping` is {mapping}, and the model has the classes 0 to {(outputs or 0) - 1}."),
        (config.head == "frozen" and mapping is None and outputs not in (None, number),
         f"head='frozen' has the model's {outputs} classes, and the config {number}. Give a `label_mapping`, or use "
         "head='trained'."),
        (number == 1 and config.problem_type == "single_label_classification",
         "A single label cannot be 'single_label_classification'. Use two labels for a yes-or-no question."),
    ]  # fmt: skip
