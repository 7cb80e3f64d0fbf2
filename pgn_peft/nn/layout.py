"""Layouts of prompts in pixel space, and the function that combines image and prompts.

Training, inversion and `ImagePrompter` all use it, so that deployment equals training. Plain torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pgn_peft.nn.resize import resize

LAYOUTS = ("append", "canvas", "dense")


@dataclass(frozen=True)
class PromptLayout:
    """A grid of patches: the image covers a rectangle of it, and each patch around the image, or of it, has a prompt.

    Args:
        name: "append": the grid grows by rows below the image and columns at its right; "canvas": it keeps the size
            of the model's input, and the image is shrunk to make room around it; "dense": the image covers all of it,
            and prompts are added to its patches.
        patch_size: side p of the model's patches, in pixels.
        grid: rows and columns of patches in the prompted image.
        image_grid: rows and columns that the image covers.
        origin: row and column of the image's first patch.
    """

    name: str
    patch_size: int
    grid: tuple[int, int]
    image_grid: tuple[int, int]
    origin: tuple[int, int]

    @property
    def num_virtual_tokens(self) -> int:
        """The number of prompts P: all patches outside of the image, or all of its own ("dense")."""
        patches = self.grid[0] * self.grid[1]
        return patches if self.name == "dense" else patches - self.image_grid[0] * self.image_grid[1]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the prompted image, in pixels."""
        return self.grid[0] * self.patch_size, self.grid[1] * self.patch_size

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the image inside it, in pixels."""
        return self.image_grid[0] * self.patch_size, self.image_grid[1] * self.patch_size

    @property
    def input_size(self) -> tuple[int, int]:
        """Height and width of the image before it is laid out, in pixels."""
        return self.size if self.name == "canvas" else self.image_size

    @property
    def slots(self) -> list[int]:
        """The prompts' patches, counted row by row through the grid; prompt i lies in patch `slots[i]`."""
        inside = set() if self.name == "dense" else set(self.image_patches)
        return [patch for patch in range(self.grid[0] * self.grid[1]) if patch not in inside]

    @property
    def image_patches(self) -> list[int]:
        """The image's patches, counted row by row through the grid."""
        (top, left), (rows, columns) = self.origin, self.image_grid
        return [row * self.grid[1] + left + column for row in range(top, top + rows) for column in range(columns)]

    def __str__(self) -> str:
        rows, columns = self.grid
        return f"{self.name}: {self.num_virtual_tokens} prompts, image {self.image_grid} of {rows} x {columns} patches"


def make_layout(
    name: str, image_size: tuple[int, int], patch_size: int, num_virtual_tokens: int | None = None
) -> PromptLayout:
    """Find the layout of P prompts, which must fill whole rows and columns of patches.

    Args:
        name: "append", "canvas" or "dense".
        image_size: height and width of the images that the model sees without prompts, in pixels.
        patch_size: side of the model's patches, in pixels.
        num_virtual_tokens: P; None: one row below the image ("append"), one ring around it ("canvas"), or all of its
            patches ("dense"), where no other number fits.

    Returns:
        The layout. If several fit, the one with the most even numbers of rows and columns. On a canvas the image is in
        the middle; an odd row goes below it, an odd column to its right.

    Raises:
        ValueError: the images are not whole patches, or P does not fill rows and columns.

    The model makes a token of every patch, so prompts must fill all patches outside of the image.
    """
    if name not in LAYOUTS:
        raise ValueError(
            f"`prompt_layout` must be one of {', '.join(LAYOUTS)}, but got {name!r}. Choose one of these."
        )
    if any(side % patch_size or side < patch_size for side in image_size):
        raise ValueError(
            f"`image_size` must be whole patches of {patch_size} pixels, but got {image_size[0]} x {image_size[1]}. "
            f"Use multiples of {patch_size}."
        )
    rows, columns = image_size[0] // patch_size, image_size[1] // patch_size
    if name == "dense":
        if num_virtual_tokens not in (None, rows * columns):
            raise ValueError(
                f"`num_virtual_tokens` must be {rows * columns} in the 'dense' layout, which has a prompt for each of "
                f"the {rows} x {columns} patches of an image, but got {num_virtual_tokens}. Leave it out."
            )
        return PromptLayout(name, patch_size, (rows, columns), (rows, columns), (0, 0))
    fitting = _fitting(name, rows, columns)
    if not fitting:
        raise ValueError(
            f"`image_size` must be two patches of {patch_size} pixels at least in the {name!r} layout, but got "
            f"{image_size[0]} x {image_size[1]}: there would be no room for the image. Use the 'dense' layout."
        )
    if num_virtual_tokens is None:
        ring = rows * columns - (rows - 2) * (columns - 2)
        num_virtual_tokens = ring if name == "canvas" and min(rows, columns) > 2 else columns
    if num_virtual_tokens not in fitting:
        nearest = sorted(sorted(fitting, key=lambda count: abs(count - num_virtual_tokens))[:5])
        raise ValueError(
            f"`num_virtual_tokens` must fill whole rows and columns of patches in the {name!r} layout ({rows} x "
            f"{columns} patches of {patch_size} pixels), because every patch is a token, but got "
            f"{num_virtual_tokens}. Use {', '.join(map(str, nearest))}."
        )
    more_rows, more_columns = fitting[num_virtual_tokens]
    if name == "append":
        return PromptLayout(name, patch_size, (rows + more_rows, columns + more_columns), (rows, columns), (0, 0))
    return PromptLayout(
        name,
        patch_size,
        (rows, columns),
        (rows - more_rows, columns - more_columns),
        (more_rows // 2, more_columns // 2),
    )


def _fitting(name: str, rows: int, columns: int) -> dict[int, tuple[int, int]]:
    """Find, for each number of prompts that fits, how many rows and columns they take."""
    if name == "append":
        options = [(down, right) for down in range(rows + 1) for right in range(columns + 1)]
        counts = [((rows + down) * (columns + right) - rows * columns, down, right) for down, right in options]
    else:
        options = [(down, right) for down in range(rows) for right in range(columns)]
        counts = [(rows * columns - (rows - down) * (columns - right), down, right) for down, right in options]
    fitting: dict[int, tuple[int, int]] = {}
    # Most even first; among equals, more rows.
    for count, down, right in sorted(counts, key=lambda entry: (abs(entry[1] - entry[2]), -entry[1])):
        if count:
            fitting.setdefault(count, (down, right))
    return fitting


def compose(
    pixels: Tensor, patches: Tensor, layout: PromptLayout, image_offset: Tensor | None = None, valid: bool = True
) -> Tensor:
    """Combine images and prompts into prompted images.

    Args:
        pixels: (B, C, H, W) images of the layout's `input_size`, in [0, 1].
        patches: (B, P, C, p, p) prompts, in [0, 1] for valid images; in the "dense" layout signed changes of pixels.
        layout: where they go.
        image_offset: added to the image after it is resized: (C, h, w), or one patch (C, p, p) added to each of the
            image's patches; None: nothing.
        valid: clip all pixels to [0, 1] in the end, and round them to 8 bits, as in a file: `to_levels`.

    Returns:
        (B, C, H', W') prompted images of the layout's `size`.

    Raises:
        ValueError: the images or the prompts do not have the layout's size.
    """
    if tuple(pixels.shape[-2:]) != layout.input_size:
        height, width = pixels.shape[-2:]
        raise ValueError(
            f"`pixel_values` must measure {layout.input_size[0]} x {layout.input_size[1]} pixels, as the layout "
            f"does, but got {height} x {width}. Resize the images as the adapter's image processor does."
        )
    if patches.shape[1] != layout.num_virtual_tokens:
        raise ValueError(
            f"`patches` must be {layout.num_virtual_tokens} for each image, as in the layout, but got "
            f"{patches.shape[1]}. Layout and prompts belong to different adapters."
        )
    image = resize(pixels, layout.image_size)
    if image_offset is not None:
        times = [whole // part for whole, part in zip(layout.image_size, image_offset.shape[-2:], strict=True)]
        image = image + image_offset.repeat(1, *times)
    patches = patches.to(image.dtype)
    if layout.name == "dense":
        image = image + to_image(patches, layout.grid)
    prompted = image if layout.name == "dense" else _surround(image, patches, layout)
    # Rounding alone can change a prediction near a decision boundary, so training rounds too.
    return to_levels(prompted) if valid else prompted


def to_levels(pixels: Tensor) -> Tensor:
    """Clip pixels to [0, 1] and round them to the levels of 8 bits.

    Gradients pass the rounding unchanged, and the clipping in [0, 1], black and white included: prompts that start at
    zero could not change these otherwise. At the bounds the gradient of `torch.clamp` is 1 or 0 by torch's version.
    """
    # In place: most of the time goes into memory traffic.
    rounded = pixels.detach().mul(255).round_().clamp_(0, 255).div_(255)
    if torch.is_grad_enabled() and pixels.requires_grad:
        inside = (pixels >= 0) & (pixels <= 1)
        return rounded + torch.where(inside, pixels - pixels.detach(), 0)
    return rounded


def _surround(image: Tensor, patches: Tensor, layout: PromptLayout) -> Tensor:
    """Put prompts (B, P, C, p, p), counted row by row through the grid, around images (B, C, h, w).

    Uses slices only: the image is copied once, and no list of indices is sent to a device.
    """
    (top, left), (rows, columns) = layout.origin, layout.image_grid
    below, right = layout.grid[0] - top - rows, layout.grid[1] - left - columns
    above_image, beside_image, below_image = patches.split(
        [top * layout.grid[1], rows * (left + right), below * layout.grid[1]], dim=1
    )
    left_of_it, right_of_it = beside_image.unflatten(1, (rows, left + right)).split([left, right], dim=2)
    row = [
        to_image(left_of_it.flatten(1, 2), (rows, left)),
        image,
        to_image(right_of_it.flatten(1, 2), (rows, right)),
    ]
    column = [
        to_image(above_image, (top, layout.grid[1])),
        torch.cat(row, dim=3),  # (B, C, h, W')
        to_image(below_image, (below, layout.grid[1])),
    ]
    return torch.cat(column, dim=2)  # (B, C, H', W')


def to_image(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Put patches (B, N, C, p, p), row by row, together to images (B, C, H, W)."""
    batch, _, channels, patch_size, _ = patches.shape
    patches = patches.reshape(batch, *grid, channels, patch_size, patch_size).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(batch, channels, grid[0] * patch_size, grid[1] * patch_size)
