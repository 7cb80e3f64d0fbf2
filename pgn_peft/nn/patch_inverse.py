"""The inverse of a ViT's patch projection, from tokens to pixels, and its accuracy. Plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class InversionReport:
    """Accuracy of a prompt inversion.

    Args:
        rank: numerical rank of the patch projection, at most D.
        hidden_size: the backbone's width D. If `rank` is smaller, pixels cannot produce every token.
        condition_number: largest over smallest singular value within the rank.
        token_error: largest relative error `|W x - t| / |t|` of a token, over all library entries and slots (and the
            image's own patches, where they are compensated).
        mean_token_error: root mean squared error over the root mean square, of the same tokens.
        largest_pixel: largest absolute value of a normalised pixel of a prompt. Images stay within about 2.6.
        in_range: whether the pixels were restricted to the range of images.
    """

    rank: int
    hidden_size: int
    condition_number: float
    token_error: float
    mean_token_error: float
    largest_pixel: float
    in_range: bool


class PatchInverse:
    """The pseudo-inverse of a patch projection, in float64.

    Args:
        weight: (D, C, p, p), the projection's weight W.

    Attributes:
        rank: numerical rank of W.
        condition_number: largest over smallest singular value within the rank.
    """

    def __init__(self, weight: Tensor) -> None:
        self.patch_shape = tuple(weight.shape[1:])
        self.weight = weight.detach().double().flatten(1)  # (D, C * p * p)
        left, self.singular_values, right = torch.linalg.svd(self.weight, full_matrices=False)
        threshold = max(self.weight.shape) * torch.finfo(torch.float64).eps * self.singular_values[0]
        self.rank = int((self.singular_values > threshold).sum())
        self.condition_number = (self.singular_values[0] / self.singular_values[self.rank - 1]).item()
        kept = slice(self.rank)
        self.left, self.right = left[:, kept], right[kept]
        self.inverse = (self.right.mT / self.singular_values[kept]) @ self.left.mT  # (C * p * p, D)

    def pixels(self, tokens: Tensor) -> Tensor:
        """Compute the minimum-norm pixels (..., C * p * p) that the projection maps to `tokens` (..., D)."""
        return tokens @ self.inverse.mT

    def tokens(self, pixels: Tensor) -> Tensor:
        """Project pixels (..., C * p * p) to tokens (..., D)."""
        return pixels @ self.weight.mT

    def directions(self, image_std: Sequence[float], floor: float = 0.036) -> Tensor:
        """Compute the change of a patch's pixels, in units of [0, 1], that moves its token by 1 along each axis.

        Args:
            image_std: standard deviation of each channel, by which the image processor divides.
            floor: lower limit of the singular values, as a fraction of the largest. Without it, the weakest directions
                would move pixels out of range and hardly change the token.

        Returns:
            (C, p, p, D) float32.
        """
        values = self.singular_values[: self.rank].clamp(min=floor * self.singular_values[0])
        pixels = ((self.right.mT / values) @ self.left.mT).unflatten(0, self.patch_shape)  # normalised
        std = torch.tensor(image_std, dtype=pixels.dtype, device=pixels.device)
        return (pixels * std[:, None, None, None]).float()

    def pixels_in_range(self, tokens: Tensor, low: Tensor, high: Tensor, steps: int = 300) -> Tensor:
        """Find pixels between `low` and `high` whose tokens come closest to `tokens`.

        Solved by the alternating direction method of multipliers (ADMM): a least-squares step in closed form
        alternates with a projection onto the box. Tokens that no pixels in range produce keep an error.

        Args:
            tokens: (n, D).
            low: (C * p * p,) lower bound of each pixel.
            high: (C * p * p,) upper bounds.
            steps: iterations; 1,000 patches take seconds.

        Returns:
            (n, C * p * p) pixels, each within its bounds.
        """
        values = self.singular_values[: self.rank]
        weight = values.square().mean()  # of the penalty: balances both steps
        filtered = (self.right.mT * (values / (values.square() + weight))) @ self.left.mT  # (C * p * p, D)
        pull = tokens @ filtered.mT
        keep = values.square() / (values.square() + weight)
        boxed = self.pixels(tokens).clamp(low, high)
        dual = torch.zeros_like(boxed)
        for _ in range(steps):
            target = boxed - dual
            free = pull + target - ((target @ self.right.mT) * keep) @ self.right
            boxed = (free + dual).clamp(low, high)
            dual = dual + free - boxed
        return boxed
