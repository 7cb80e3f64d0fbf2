"""Prompts in pixel space: their positions in an image, and the function that adds them.

Training, inversion and `ImagePrompter` use the same function, so deployment equals training. Plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LAYOUTS = ("additive", "append")


@dataclass(frozen=True)
class PromptLayout:
    """The grid of patches of a prompted image, with the image in its top left corner.

    Args:
        name: "additive": prompts are added to the patches of the image; "append": they are patches of their own, in
            rows below the image and columns to its right.
        patch_size: side p of the model's patches, in pixels.
        grid: rows and columns of patches in the prompted image.
        image_grid: rows and columns that the image covers.
    """

    name: str
    patch_size: int
    grid: tuple[int, int]
    image_grid: tuple[int, int]

    @property
    def num_virtual_tokens(self) -> int:
        """The number of prompts P: one for each patch of the image ("additive"), or for each patch outside it."""
        return len(self.slots)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the prompted image, in pixels."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the image without prompts, in pixels."""
        return self.image_grid[0] * self.patch_size, self.image_grid[1] * self.patch_size

    @property
    def slots(self) -> list[int]:
        """Indices of the prompts' patches, row by row in the grid; prompt i is in patch `slots[i]`."""
        inside = set() if self.name == "additive" else set(self.image_patches)
        return [patch for patch in range(self.grid[0] * self.grid[1]) if patch not in inside]

    @property
    def image_patches(self) -> list[int]:
        """Indices of the image's patches, row by row in the grid."""
        rows, columns = self.image_grid
        return [row * self.grid[1] + column for row in range(rows) for column in range(columns)]


def make_layout(
    name: str, image_size: tuple[int, int], patch_size: int, num_virtual_tokens: int | None = None
) -> PromptLayout:
    """Return the layout of P prompts.

    Args:
        name: "additive" or "append".
        image_size: height and width of the images that the model sees without prompts, in pixels.
        patch_size: side of the model's patches, in pixels.
        num_virtual_tokens: P; None: one row below the image ("append"), or one prompt for each patch ("additive"), the
            only number possible there.

    Returns:
        The layout. If several fit, the one with the most even numbers of added rows and columns.

    Raises:
        ValueError: the images are not whole patches, or P prompts do not fill whole rows and columns. Partly filled
            ones are not possible, because the model makes a token of every patch.
    """
    if any(side % patch_size or side < patch_size for side in image_size):
        raise ValueError(
            f"Images of {image_size[0]} x {image_size[1]} pixels are not whole patches of {patch_size}. Set "
            f"`image_size` to a multiple of {patch_size}."
        )
    rows, columns = image_size[0] // patch_size, image_size[1] // patch_size
    if name == "additive":
        if num_virtual_tokens not in (None, rows * columns):
            raise ValueError(
                f"Images of {rows} x {columns} patches have {rows * columns} prompts in pixel space, one for each. "
                "Leave `num_virtual_tokens` out."
            )
        return PromptLayout(name, patch_size, (rows, columns), (rows, columns))
    added = [(down, right) for down in range(rows + 1) for right in range(columns + 1) if down or right]
    options: dict[int, tuple[int, int]] = {}  # number of prompts -> grid
    # The last grid of each number is kept: the most even one, and of equally even ones that with more rows.
    for down, right in sorted(added, key=lambda more: (-abs(more[0] - more[1]), more[0])):
        options[(rows + down) * (columns + right) - rows * columns] = (rows + down, columns + right)
    number = columns if num_virtual_tokens is None else num_virtual_tokens
    if number not in options:
        nearest = sorted(sorted(options, key=lambda count: abs(count - number))[:5])
        raise ValueError(
            f"{number} prompts do not fill whole rows and columns of patches ({rows} x {columns} patches of "
            f"{patch_size} pixels). Set `num_virtual_tokens` to one of {', '.join(map(str, nearest))}."
        )
    return PromptLayout(name, patch_size, options[number], (rows, columns))


def compose(
    pixels: Tensor, patches: Tensor, layout: PromptLayout, image_offset: Tensor | None = None, valid: bool = True
) -> Tensor:
    """Combine images and prompts into prompted images.

    Args:
        pixels: (B, C, H, W) images of the layout's `image_size`, in [0, 1].
        patches: (B, P, C, p, p) prompts: changes of pixels ("additive"), or pixels, in [0, 1] for valid images.
        layout: positions of the prompts.
        image_offset: (C, H, W) to add to the image; None: nothing.
        valid: clip the result to [0, 1] and round it to 8 bits, as in an image file; see `to_levels`.

    Returns:
        (B, C, H', W') prompted images of the layout's `size`.

    Raises:
        ValueError: the images do not have the layout's size.
    """
    if tuple(pixels.shape[-2:]) != layout.image_size:
        raise ValueError(
            f"The images measure {pixels.shape[-2]} x {pixels.shape[-1]} pixels, and the prompts are for "
            f"{layout.image_size[0]} x {layout.image_size[1]}. Resize them as the adapter's image processor does."
        )
    image = pixels if image_offset is None else pixels + image_offset
    patches = patches.to(image.dtype)
    if layout.name == "additive":
        prompted = image + to_image(patches, layout.grid)
    else:
        rows, columns = layout.image_grid
        right = layout.grid[1] - columns
        beside, below = patches.split([rows * right, patches.shape[1] - rows * right], dim=1)
        prompted = torch.cat([image, to_image(beside, (rows, right))], dim=3)
        prompted = torch.cat([prompted, to_image(below, (layout.grid[0] - rows, layout.grid[1]))], dim=2)
    # Rounding alone can change a prediction near a decision boundary, so training rounds too.
    return to_levels(prompted) if valid else prompted


def to_levels(pixels: Tensor) -> Tensor:
    """Clip pixels to [0, 1] and round them to the levels of 8 bits.

    The gradient is 1 in [0, 1], bounds included, and 0 outside. With 0 at the bounds, prompts that start at zero could
    not change black and white pixels. The gradient of `torch.clamp` at the bounds depends on torch's version.
    """
    # In place, because memory traffic takes most of the time.
    rounded = pixels.detach().mul(255).round_().clamp_(0, 255).div_(255)
    if torch.is_grad_enabled() and pixels.requires_grad:
        inside = (pixels >= 0) & (pixels <= 1)
        return rounded + torch.where(inside, pixels - pixels.detach(), 0)
    return rounded


def to_image(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Assemble patches (B, N, C, p, p), given row by row, to images (B, C, H, W)."""
    batch, _, channels, patch_size, _ = patches.shape
    patches = patches.reshape(batch, *grid, channels, patch_size, patch_size).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels, grid[0] * patch_size, grid[1] * patch_size)
