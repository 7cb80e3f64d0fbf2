"""Makes an `ImagePrompter` from a trained adapter, and inverts latent prompts to pixels.

A ViT maps the pixels x of patch j to the token `W x + b + pos_j`. Pixels that produce the token t therefore solve
`W x = t - b - pos_j`. This is linear, so it is solved once for the library, with a fixed offset for each slot:

    pixels_j = sum_k a_jk (W^+ L_k) - W^+ (b + pos_j)

Afterwards the backbone is not needed. Source: the idea is in arXiv:2210.06466, but not in its code; the derivation is
this project's.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from pgn_peft.nn.images import PILLOW_MODES, to_pixels
from pgn_peft.nn.layout import PromptLayout, make_layout, to_image
from pgn_peft.nn.library import AdditiveLibrary
from pgn_peft.nn.patch_inverse import InversionReport, PatchInverse
from pgn_peft.nn.preprocessing import Preprocessing, denormalize, normalize
from pgn_peft.prompter.image_prompter import ImagePrompter
from pgn_peft.prompter.score_head import EmbeddingHead, ScoreHead, exact_score_head, one_to_one_head
from pgn_peft.tuner.adapters import find_layer, own_logits
from pgn_peft.tuner.backbones import AVERAGES_PATCHES, GIVES_POSITIONS
from pgn_peft.tuner.config import PGNConfig
from pgn_peft.tuner.embeddings import patch_projection, position_tokens
from pgn_peft.tuner.head import PGNHead, find_head, plain_weight
from pgn_peft.tuner.layer import PGNBlock, PGNLayer

APPEND = "append"  # the layout of prompts in rows and columns of their own


def make_prompter(
    model: nn.Module,
    processor: Any,
    adapter_name: str = "default",
    in_range: bool = False,
) -> ImagePrompter:
    """Make the client of a trained adapter. The client works without the model.

    Prompts in pixel space are used as they are. Latent prompts are inverted: exactly, for a server that takes tensors,
    or with an error into valid images.

    Args:
        model: a model with the adapter, made by PEFT or by Transformers' own loaders.
        processor: the image processor that the adapter was trained with, and that the server uses.
        adapter_name: the adapter.
        in_range: invert latent prompts into valid images. Has no effect in pixel space.

    Returns:
        The client, on the CPU in float32, with a `report` if prompts were inverted. It records the unmodified model's
        scores for the probe image. Its `score_head` computes the logits of the adapter's head from the scores of the
        model's own classes, if these determine the features; for an adapter with a `label_mapping`, it selects the
        mapped classes.

    Raises:
        TypeError: the model carries no adapter.
        ValueError: no adapter has this name; the adapter has prompts in several layers; its latent prompts do not fill
            rows of patches, or the model averages its patches; or the processor differs from that of training.
    """
    layer, head = find_layer(model, adapter_name), find_head(model)
    config, preprocessing = layer.configs[adapter_name], Preprocessing.from_processor(processor)
    _check(config, layer, preprocessing, model, in_range)
    height, width = preprocessing.output_size or (0, 0)
    generator, library = layer.generator(adapter_name), layer.library(adapter_name)
    prompts: dict[str, Any]
    if isinstance(library, AdditiveLibrary):
        layout = layer.layout(adapter_name, (height, width))
        prompts = {"library": library.patches.detach().float().cpu()}
    else:
        side = layer.projection.kernel_size[0]
        layout = make_layout(APPEND, (height, width), side, config.num_virtual_tokens)
        tokens = library.tokens[:, None] if generator is None else library.tokens[None]
        prompts = invert(layer.base_layer, tokens, layout, preprocessing, in_range, library.slot_prompts)
        if generator is None and in_range:
            prompts["library"] = prompts["library"][:, 0]  # one entry for each slot
    own_head, labels = (None, None) if head is None else (head.head(adapter_name), head.base_labels.id2label or None)
    PGNHead.check_texts(own_head)
    prompter = ImagePrompter(
        layout,
        preprocessing,
        **prompts,
        generator=None if generator is None else copy.deepcopy(generator).float().cpu(),
        id2label=config.id2label,
        server_labels=labels,
        score_head=None if head is None else _score_head(head, adapter_name),
    )
    if isinstance(own_head, nn.Linear):
        prompter.head = copy.deepcopy(own_head).float().cpu().requires_grad_(False)
    elif own_head is not None:
        prompter.head = EmbeddingHead.of(*own_head.linear())
    if labels:
        prompter.probe_scores = _answer_probe(model, layer, prompter)
    return prompter


def _check(config: PGNConfig, layer: PGNLayer, preprocessing: Preprocessing, model: nn.Module, in_range: bool) -> None:
    latent = config.prompt_space == "latent"
    averages = any(isinstance(part, PGNBlock) and part.ends for part in model.modules())
    size, trained_size = preprocessing.output_size, (config.image_size,) * 2
    trained, found = (
        torch.tensor([source.image_mean, source.image_std]) if not latent else torch.zeros(0)
        for source in (config, preprocessing)
    )
    refusals = [
        (
            config.prompt_depth != 1,
            f"`prompt_depth` is {config.prompt_depth}, but an image can hold prompts for the first layer only. Train "
            "an adapter with prompt_depth=1.",
        ),
        (
            latent and (averages or layer.extends_positions),
            f"Latent prompts cannot become pixels here: {AVERAGES_PATCHES if averages else GIVES_POSITIONS}. Train an "
            "adapter with prompt_space='pixel'.",
        ),
        (
            layer.num_channels not in PILLOW_MODES,
            f"Image files have 1, 3 or 4 channels, but the model takes {layer.num_channels}. Use the adapter inside "
            "its model.",
        ),
        (
            size is None,
            "The image processor resizes the shorter side and crops nothing, so images have different sizes. Use one "
            "with a fixed height and width, or one that crops.",
        ),
        (
            config.prompt_layout == APPEND and size != trained_size,
            f"The adapter was trained with images of {trained_size[0]} x {trained_size[1]} pixels, and the image "
            f"processor makes {size}. Set processor.size (and crop_size).",
        ),
        (
            not torch.allclose(trained, found, atol=1e-6),
            f"The adapter was trained with image_mean and image_std {trained.tolist()}, and the image processor has "
            f"{found.tolist()}. Pass the processor of the model that the adapter was made for.",
        ),
    ]
    for is_refused, message in refusals:
        if is_refused:
            raise ValueError(message)


def invert(
    embeddings: nn.Module,
    tokens: Tensor,
    layout: PromptLayout,
    preprocessing: Preprocessing,
    in_range: bool = False,
    static_prompts: Tensor | None = None,
) -> dict[str, Any]:
    """Convert trained tokens to pixels for the "append" layout.

    Args:
        embeddings: the frozen backbone's embeddings.
        tokens: (1, L, D), a library for all slots; or (P, 1, D), one token for each slot.
        layout: positions of the prompts.
        preprocessing: with the mean and standard deviation that images are normalised by.
        in_range: find valid pixels, with an error, instead of the exact ones, which lie far out of range. Each slot
            then has a library of its own. The image is not changed: its patches keep the small shift that interpolated
            position embeddings cause. Coefficients must sum to 1.
        static_prompts: (P, D), the static prompt of each slot, to which the mixture is added; or None.

    Returns:
        Arguments of `ImagePrompter`: `library` and `report`, and for exact pixels `offsets` and `image_offset`.

    Raises:
        ValueError: the patch projection has too low a rank.
    """
    scale = (preprocessing.image_mean, preprocessing.image_std)
    inverse = PatchInverse(patch_projection(embeddings).weight)
    tokens = tokens.detach().to(inverse.weight)
    added = position_tokens(embeddings, layout.size)  # (N', D)
    slots = added[layout.slots]  # (P, D)
    if static_prompts is not None:
        slots = slots - static_prompts.detach().to(slots)
    targets = (tokens - slots[:, None]).flatten(0, 1)  # (P * L, D): the projection's target in each slot
    if inverse.rank < tokens.shape[-1]:
        raise ValueError(
            f"The backbone's patch projection has rank {inverse.rank} ({inverse.weight.shape[1]} values per patch), "
            f"less than its width {tokens.shape[-1]}: pixels cannot reach every prompt. Train an adapter with "
            "prompt_space='pixel'."
        )
    std = torch.tensor(preprocessing.image_std, dtype=torch.float64, device=tokens.device)[:, None, None]
    if in_range:
        lowest = normalize(torch.zeros_like(inverse.weight[0]).view(inverse.patch_shape), *scale)
        pixels = inverse.pixels_in_range(targets, lowest.flatten(), (lowest + 1 / std).flatten())
        patches = pixels.unflatten(0, (len(slots), -1)).unflatten(-1, inverse.patch_shape)  # (P, L, C, p, p)
        report = _report(inverse, targets, inverse.tokens(pixels), pixels, in_range)
        return {"library": denormalize(patches, *scale).clamp(0, 1).float().cpu(), "report": report}
    # Interpolating positions to the larger grid shifts the tokens of the image's own patches by (N, D): compensate it.
    shift = position_tokens(embeddings, layout.image_size) - added[layout.image_patches]
    library, offsets, back = (inverse.pixels(part) for part in (tokens.flatten(0, 1), -slots, shift))
    pixels = (library.view(*tokens.shape[:2], -1) + offsets[:, None]).flatten(0, 1)  # (P * L, C * p * p)
    reached = inverse.tokens(torch.cat([pixels, back]))
    report = _report(inverse, torch.cat([targets, shift]), reached, pixels, in_range)
    library, offsets, back = (part.unflatten(-1, inverse.patch_shape) for part in (library, offsets, back))
    return {
        "library": (library * std).float().cpu(),
        "offsets": denormalize(offsets, *scale).float().cpu(),
        "image_offset": (to_image(back[None], layout.image_grid)[0] * std).float().cpu(),
        "report": report,
    }


def _report(
    inverse: PatchInverse, targets: Tensor, reached: Tensor, pixels: Tensor, in_range: bool
) -> InversionReport:
    errors, sizes = (reached - targets).norm(dim=1), targets.norm(dim=1)
    counted = sizes > 0  # no shift at all where positions need no interpolation
    return InversionReport(
        rank=inverse.rank,
        hidden_size=targets.shape[1],
        condition_number=inverse.condition_number,
        token_error=(errors[counted] / sizes[counted]).max().item(),
        mean_token_error=(errors.square().mean() / sizes.square().mean()).sqrt().item(),
        largest_pixel=pixels.abs().max().item(),
        in_range=in_range,
    )


def _score_head(head: PGNHead, adapter_name: str) -> ScoreHead | None:
    """Convert the adapter's head to one on the model's scores; None if there is none, or they do not determine it."""
    config, own, base = head.configs[adapter_name], head.head(adapter_name), head.base_layer
    labels = list(head.base_labels.id2label.values())
    if config.label_mapping is not None:
        return one_to_one_head(config.label_mapping, labels)
    # `read_answer` returns probabilities that sum to 1.
    single = config.problem_type in (None, "single_label_classification")
    if not (single and labels and isinstance(base, nn.Linear) and isinstance(own, nn.Linear) and own.out_features > 1):
        return None
    try:
        return exact_score_head(plain_weight(base), base.bias, own.weight, own.bias, labels)
    except ValueError:
        return None


def _answer_probe(model: nn.Module, layer: PGNLayer, prompter: ImagePrompter) -> Tensor:
    """Compute the unmodified model's scores for the prompter's probe: (M,)."""
    preprocessing, weight = prompter.preprocessing, layer.projection.weight
    pixels = to_pixels(prompter.probe(), prompter.num_channels)
    if prompter.layout.name != APPEND:
        pixels = preprocessing.apply(pixels)  # crops the margins
    pixels = pixels[None].to(weight.device).float() / 255
    pixel_values = normalize(pixels, preprocessing.image_mean, preprocessing.image_std)
    return own_logits(model, pixel_values.to(weight.dtype))[0].softmax(-1).cpu()
