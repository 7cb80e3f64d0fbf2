"""Where prompts that became pixels lie in an image, resizing, and the 256 levels of a pixel."""

import pytest
import torch
from conftest import assert_same, refused

from pgn_peft.nn.functional import resize
from pgn_peft.nn.layout import make_layout, to_image, to_levels


def to_patches(pixel_values, patch_size):
    """Cut images (B, C, H, W) into patches (B, N, C, p, p), row by row."""
    batch, channels, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    patches = pixel_values.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels, patch_size, patch_size)


@pytest.mark.parametrize(
    ("size", "patch", "prompts", "grid", "image_grid"),
    [
        (224, 16, 14, (15, 14), (14, 14)),
        (224, 32, 7, (8, 7), (7, 7)),
        (224, 32, 15, (8, 8), (7, 7)),  # one row and one column
    ],
)
def test_appended_prompts_fill_rows_and_columns(size, patch, prompts, grid, image_grid):
    layout = make_layout("append", (size, size), patch, prompts)
    assert (layout.grid, layout.image_grid) == (grid, image_grid)
    assert layout.num_virtual_tokens == len(layout.slots) == prompts
    assert sorted(layout.slots + layout.image_patches) == list(range(grid[0] * grid[1]))


@pytest.mark.parametrize(
    ("size", "patch", "prompts", "words"),
    [(224, 16, 16, (16, "14, 28, 29")), (224, 32, 16, (16, "7, 14, 15")), (100, 16, 14, (100,))],
)
def test_prompts_that_do_not_fit_are_refused_with_the_numbers_that_do(size, patch, prompts, words):
    with refused(ValueError, *words):
        make_layout("append", (size, size), patch, prompts)


def test_patches_and_back():
    images = torch.randn(2, 3, 24, 16)
    patches = to_patches(images, 8)
    assert torch.equal(patches[1, 2], images[1, :, 8:16, 0:8])  # row by row
    assert torch.equal(to_image(patches, (3, 2)), images)


def test_a_shrunk_image_is_shrunk_not_cropped_and_stays_in_range():
    corners = torch.zeros(1, 1, 32, 32)
    corners[..., 0, 0] = corners[..., -1, -1] = 1
    small = resize(corners, (24, 32))
    assert small[..., 0, 0] > 0.5
    assert small[..., -1, -1] > 0.5
    stripes = (torch.arange(32) % 2).float().expand(1, 3, 32, 32)
    assert 0 <= resize(stripes, (20, 20)).min() <= resize(stripes, (20, 20)).max() <= 1
    # An affine change of scale, such as normalisation, may come before or after.
    assert_same(resize(stripes * 4 - 2, (20, 20)), resize(stripes, (20, 20)) * 4 - 2)


def test_gradients_pass_between_the_bounds_and_at_them():
    pixels = torch.tensor([-0.3, -1e-6, 0.0, 0.123, 1.0, 1.0001], requires_grad=True)
    levels = to_levels(pixels)
    assert_same(levels.detach(), torch.tensor([0, 0, 0, 31 / 255, 1, 1]))
    levels.sum().backward()
    assert_same(pixels.grad, torch.tensor([0.0, 0, 1, 1, 1, 0]))
    with torch.no_grad():
        assert_same(to_levels(pixels), levels.detach())
