"""Prompts as pixels, and a report of how exactly they reproduce tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class InversionReport:
    """Accuracy of a prompt inversion.

    Args:
        rank: numerical rank of the patch projection, at most D.
        hidden_size: the backbone's width D. If `rank` is smaller, a part of each token cannot be reached.
        condition_number: largest over smallest singular value within the rank.
        token_error: largest relative error `|W x - t| / |t|` of a token, over all library entries and slots (and the
            image's own patches, where they are compensated).
        mean_token_error: root of the mean squared error divided by the mean square, over the same tokens.
        largest_pixel: largest absolute value of a normalised pixel of a prompt. Images stay within about 2.6.
        in_range: whether all pixels are those of an image.
    """

    rank: int
    hidden_size: int
    condition_number: float
    token_error: float
    mean_token_error: float
    largest_pixel: float
    in_range: bool


@dataclass(frozen=True)
class PixelPrompts:
    """Prompts as pixels, in the scale in which images lie in [0, 1]: `sum_k a_jk library_k + offsets_j`.

    Args:
        library: (L, C, p, p), or (P, L, C, p, p) with a library for each slot.
        offsets: (P, C, p, p) added to each slot, or None.
        image_offset: added to the image itself: (C, H, W), or one patch (C, p, p) for each of its patches; or None.
        report: accuracy of the inversion; None for a library that was trained as pixels.
    """

    library: Tensor
    offsets: Tensor | None = None
    image_offset: Tensor | None = None
    report: InversionReport | None = None
