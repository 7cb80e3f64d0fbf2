"""Prompt inversion: a library of tokens becomes a library of pixels.

A ViT turns the pixels x of patch j into the token `W x + b + pos_j`. Asking for the token t therefore means solving
`W x = t - b - pos_j`. All of it is linear, so it is solved once for the library, with a fixed offset for each slot:

    pixels_j = sum_k a_jk (W^+ L_k) - W^+ (b + pos_j)

Afterwards nothing of the backbone is needed. Plain torch. Source: the idea of arXiv:2210.06466, whose code does not
implement it; the derivation is this project's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pgn_peft.nn.layout import PromptLayout, to_image
from pgn_peft.nn.patch_inverse import PatchInverse
from pgn_peft.nn.pixel_prompts import InversionReport, PixelPrompts
from pgn_peft.nn.preprocessing import denormalize, normalize
from pgn_peft.tuner.embeddings import patch_projection, position_tokens


def invert_library(
    embeddings: nn.Module,
    tokens: Tensor,
    layout: PromptLayout,
    image_mean: Sequence[float],
    image_std: Sequence[float],
    in_range: bool = False,
    slot_prompts: Tensor | None = None,
) -> PixelPrompts:
    """Turn a trained library of tokens into pixels for the "append" layout.

    Args:
        embeddings: the frozen backbone's embeddings.
        tokens: (L, D), the library.
        layout: where the prompts go.
        image_mean: mean of each channel that the image processor subtracts.
        image_std: standard deviation that it divides by.
        in_range: find pixels of valid images, with an error, instead of the exact ones, which lie far outside. Each
            slot then has a library of its own, and the image is not changed: its patches keep the small shift of the
            interpolated position embeddings. Only for coefficients that sum to 1.
        slot_prompts: (P, D), the static prompt of each slot, to which the mixture is added; or None.

    Returns:
        The prompts as pixels, with a report.

    Raises:
        ValueError: the layout is not "append", or the projection has too low a rank.
    """
    return _invert(embeddings, tokens[None], layout, image_mean, image_std, in_range, slot_prompts)


def invert_static_prompts(
    embeddings: nn.Module,
    tokens: Tensor,
    layout: PromptLayout,
    image_mean: Sequence[float],
    image_std: Sequence[float],
    in_range: bool = False,
) -> PixelPrompts:
    """Turn trained static prompts, tokens (P, D), into pixels, one entry for each slot; see `invert_library`."""
    prompts = _invert(embeddings, tokens[:, None], layout, image_mean, image_std, in_range)
    return dataclasses.replace(prompts, library=prompts.library[:, 0]) if in_range else prompts


def _invert(
    embeddings: nn.Module,
    tokens: Tensor,
    layout: PromptLayout,
    image_mean: Sequence[float],
    image_std: Sequence[float],
    in_range: bool,
    slot_prompts: Tensor | None = None,
) -> PixelPrompts:
    """Invert tokens (1, L, D), the same for all slots, or (P, 1, D), one for each."""
    if layout.name != "append":
        raise ValueError(
            f"`layout` must be 'append' for tokens, but got {layout.name!r}. A canvas shrinks the image, which the "
            "adapter was not trained with; train it with prompt_space='pixel'."
        )
    inverse = PatchInverse(patch_projection(embeddings).weight)
    hidden_size = tokens.shape[-1]
    tokens = tokens.detach().to(inverse.weight)
    added = position_tokens(embeddings, layout.size)  # (N', D)
    slots = added[layout.slots]  # (P, D)
    if slot_prompts is not None:
        slots = slots - slot_prompts.detach().to(slots)
    targets = tokens - slots[:, None]  # (P, L, D): the projection's target in each slot
    if inverse.rank < hidden_size:
        lost = (targets - (targets @ inverse.left) @ inverse.left.mT).norm(dim=-1) / targets.norm(dim=-1)
        raise ValueError(
            f"`embeddings` must have a patch projection of rank {hidden_size} to be inverted exactly, but got rank "
            f"{inverse.rank} ({inverse.weight.shape[1]} values per patch), which leaves up to {lost.max().item():.0%} "
            "of a prompt out. Train with prompt_space='pixel' instead."
        )
    std = torch.tensor(image_std, dtype=torch.float64, device=tokens.device)[:, None, None]
    if in_range:
        lowest = normalize(torch.zeros_like(inverse.weight[0]).view(inverse.patch_shape), image_mean, image_std)
        pixels = inverse.pixels_in_range(targets.flatten(0, 1), lowest.flatten(), (lowest + 1 / std).flatten())
        patches = pixels.unflatten(0, targets.shape[:2]).unflatten(-1, inverse.patch_shape)  # (P, L, C, p, p)
        return PixelPrompts(
            library=denormalize(patches, image_mean, image_std).clamp(0, 1).float(),
            report=_report(inverse, targets.flatten(0, 1), inverse.tokens(pixels), pixels, in_range=True),
        )

    # Where positions are interpolated to the larger grid, the image's own patches shift: (N, D), and back in pixels.
    shift = position_tokens(embeddings, layout.image_size) - added[layout.image_patches]
    library, offsets, back = (inverse.pixels(part) for part in (tokens.flatten(0, 1), -slots, shift))
    pixels = library.view(*tokens.shape[:2], -1) + offsets[:, None]  # (P, L, C * p * p)
    reached = torch.cat([inverse.tokens(pixels).flatten(0, 1), inverse.tokens(back)])
    report = _report(inverse, torch.cat([targets.flatten(0, 1), shift]), reached, pixels, in_range=False)
    library, offsets, back = (part.unflatten(-1, inverse.patch_shape) for part in (library, offsets, back))
    return PixelPrompts(
        library=(library * std).float(),
        offsets=denormalize(offsets, image_mean, image_std).float(),
        image_offset=(to_image(back[None], layout.image_grid)[0] * std).float(),
        report=report,
    )


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
