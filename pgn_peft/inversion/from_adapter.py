"""Makes the client of a trained adapter, which then needs the model no more."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pgn_peft.inversion.library import invert_library, invert_static_prompts
from pgn_peft.nn.images import PILLOW_MODES, to_pixels
from pgn_peft.nn.layout import PromptLayout, make_layout
from pgn_peft.nn.library import AdditiveLibrary, PatchLibrary
from pgn_peft.nn.pixel_prompts import PixelPrompts
from pgn_peft.nn.preprocessing import Preprocessing, normalize
from pgn_peft.nn.text_head import TextHead
from pgn_peft.prompter.embedding_head import make_embedding_head
from pgn_peft.prompter.image_prompter import ImagePrompter
from pgn_peft.prompter.score_head import ScoreHead, exact_score_head
from pgn_peft.tuner.adapters import find_layer, own_logits
from pgn_peft.tuner.backbones import AVERAGES_PATCHES, GIVES_POSITIONS
from pgn_peft.tuner.encoder_layer import PGNBlock
from pgn_peft.tuner.head import PGNHead, find_head, plain_weight
from pgn_peft.tuner.layer import PGNLayer
from pgn_peft.tuner.offloading import loaded, loaded_copy


def make_prompter(
    model: nn.Module,
    processor: Any,
    adapter_name: str = "default",
    in_range: bool = False,
) -> ImagePrompter:
    """Make the client of a trained adapter.

    The patches of an adapter in pixel space are used as they are. The library of one in latent space is inverted:
    exactly, for a server that takes tensors, or in the range of images.

    Args:
        model: a model with the adapter, made by PEFT or by Transformers' own loaders.
        processor: the image processor that the adapter was trained with, and that the server uses.
        adapter_name: the adapter.
        in_range: invert into valid images, with an error. Pixel space needs no inversion.

    Returns:
        The client, on the CPU in float32, with `report` where it was inverted. The unmodified model's scores for the
        probe are recorded in it. For an adapter with a head of its own it has a `score_head`, which computes that
        head's logits from the scores of the model's own classes, if these determine the features.

    Raises:
        TypeError: the model carries no adapter.
        ValueError: no adapter has this name; the adapter has prompts in several layers; its latent prompts do not fill
            rows of patches, or the model averages its patches; its images have other channels than files have; or the
            processor differs from that of the training.
    """
    layer = find_layer(model, adapter_name)
    config = layer.configs[adapter_name]
    if config.prompt_depth != 1:
        raise ValueError(
            f"`prompt_depth` must be 1 for an adapter that is to become pixels, but got {config.prompt_depth} for "
            f"{adapter_name!r}. An image brings prompts to the first layer only; train one with prompt_depth=1."
        )
    averages = any(isinstance(part, PGNBlock) and part.ends for part in model.modules())
    if config.prompt_space == "latent" and (averages or layer.extends_positions):
        raise ValueError(
            f"`prompt_space` must be 'pixel' for an adapter that is to become pixels on this model, but got 'latent' "
            f"for {adapter_name!r}: {AVERAGES_PATCHES if averages else GIVES_POSITIONS}. Train one with "
            "prompt_space='pixel'."
        )
    if layer.num_channels not in PILLOW_MODES:
        raise ValueError(
            f"`num_channels` must be one of {', '.join(map(str, PILLOW_MODES))} for a client that sends images, but "
            f"got {layer.num_channels}. Use the adapter inside its model."
        )
    preprocessing = Preprocessing.from_processor(processor)
    layout = _layout(layer, adapter_name, preprocessing)
    generator, library = layer.generator(adapter_name), layer.library(adapter_name)
    if isinstance(library, (PatchLibrary, AdditiveLibrary)):
        offset = None if library.image_offset is None else library.image_offset.detach().float().cpu().clone()
        prompts = PixelPrompts(library.patches.detach().float().cpu(), image_offset=offset)
    else:
        if in_range and config.mixing != "softmax" and generator is not None:
            raise ValueError(
                f"`in_range` must be False for an adapter with mixing={config.mixing!r}, but got True: only "
                "coefficients that sum to 1 mix valid patches into a valid patch. Train with mixing='softmax'."
            )
        scale = (preprocessing.image_mean, preprocessing.image_std)
        embeddings, tokens = loaded_copy(layer.base_layer), library.tokens
        if generator is None:
            prompts = invert_static_prompts(embeddings, tokens, layout, *scale, in_range=in_range)
        else:
            slots = library.slot_prompts
            prompts = invert_library(embeddings, tokens, layout, *scale, in_range=in_range, slot_prompts=slots)
    head = find_head(model)
    own_head = None if head is None else head.head(adapter_name)
    PGNHead.check_texts(own_head)
    prompter = ImagePrompter(
        layout,
        preprocessing,
        prompts,
        generator=copy.deepcopy(generator).float().cpu() if generator is not None else None,
        id2label=config.id2label,
        label_mapping=config.label_mapping,
        server_labels=None if head is None else head.base_labels.id2label or None,
        head=_feature_head(own_head),
        score_head=None if head is None else _score_head(head, adapter_name),
    )
    if head is not None and head.base_labels.id2label:
        prompter.probe_scores = _answer_probe(model, layer, prompter)
    return prompter


def _feature_head(head: nn.Linear | TextHead | None) -> nn.Linear | None:
    """Return the adapter's head as one on the features of a server; texts as a linear head on embeddings."""
    if head is None or isinstance(head, nn.Linear):
        return None if head is None else copy.deepcopy(head).float().cpu()
    weight, bias = head.linear()
    return make_embedding_head(weight.detach().float().cpu(), bias.detach().float().cpu())


def _layout(layer: PGNLayer, adapter_name: str, preprocessing: Preprocessing) -> PromptLayout:
    config = layer.configs[adapter_name]
    size = preprocessing.output_size
    if size is None:
        raise ValueError(
            "`processor` must make images of one size, but got one that resizes the shorter side and crops nothing. "
            "Use a processor with a fixed height and width, or one that crops."
        )
    if config.prompt_layout not in (None, "dense") and size != (config.image_size,) * 2:
        raise ValueError(
            f"`processor` must make images of {config.image_size} x {config.image_size} pixels, as the adapter was "
            f"trained with, but got {size[0]} x {size[1]}. Set processor.size (and crop_size)."
        )
    if config.prompt_space == "pixel":
        for name in ("image_mean", "image_std"):
            trained, found = getattr(config, name), list(getattr(preprocessing, name))
            if not torch.allclose(torch.tensor(found), torch.tensor(trained), atol=1e-6):
                raise ValueError(
                    f"`{name}` must be {trained} in the processor, as the adapter was trained with, but got {found}. "
                    "Pass the processor of the model that the adapter was made for."
                )
        return layer.layout(adapter_name, size)
    patch_size = layer.projection.kernel_size[0]
    return make_layout("append", size, patch_size, config.num_virtual_tokens)


def _score_head(head: PGNHead, adapter_name: str) -> ScoreHead | None:
    """Make the adapter's head one on the model's scores; None without a head, or if these do not determine it."""
    own, base, labels = head.head(adapter_name), head.base_layer, head.base_labels.id2label
    if not isinstance(own, nn.Linear) or own.out_features < 2 or not isinstance(base, nn.Linear) or not labels:
        return None
    if head.configs[adapter_name].problem_type not in (None, "single_label_classification"):
        return None  # `read_answer` gives probabilities that sum to 1
    with loaded(base):
        weight, bias = plain_weight(base), base.bias
        try:
            return exact_score_head(weight, bias, own.weight, own.bias, list(labels.values()))
        except ValueError:
            return None


def _answer_probe(model: nn.Module, layer: PGNLayer, prompter: ImagePrompter) -> Tensor:
    """Compute the unmodified model's scores for the prompter's probe: (M,)."""
    with loaded(layer.projection):
        device, dtype = layer.projection.weight.device, layer.projection.weight.dtype
    pixels = to_pixels(prompter.probe(), prompter.num_channels)
    if prompter.layout.name != "append":
        pixels = prompter.preprocessing.apply(pixels)  # cuts its margins off
    pixels = pixels[None].to(device).float() / 255
    mean, std = prompter.preprocessing.image_mean, prompter.preprocessing.image_std
    return own_logits(model, normalize(pixels, mean, std).to(dtype))[0].softmax(-1).cpu()
