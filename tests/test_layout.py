"""Where prompts lie in an image: every patch is used, the image is whole, and valid pixels stay valid."""

import pytest
import torch

from pgn_peft.nn.layout import compose, make_layout, to_image, to_levels
from pgn_peft.nn.resize import resize


def to_patches(pixel_values, patch_size):
    """Cut images (B, C, H, W) into patches (B, N, C, p, p), row by row."""
    batch, channels, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    patches = pixel_values.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels, patch_size, patch_size)


@pytest.mark.parametrize(
    ("name", "size", "patch", "prompts", "grid", "image_grid", "origin"),
    [
        ("append", 224, 16, 14, (15, 14), (14, 14), (0, 0)),
        ("append", 224, 32, 7, (8, 7), (7, 7), (0, 0)),
        ("append", 224, 32, 15, (8, 8), (7, 7), (0, 0)),  # one row and one column
        ("append", 224, 16, None, (15, 14), (14, 14), (0, 0)),
        ("canvas", 224, 16, 14, (14, 14), (13, 14), (0, 0)),
        ("canvas", 224, 16, 27, (14, 14), (13, 13), (0, 0)),
        ("canvas", 224, 16, 52, (14, 14), (12, 12), (1, 1)),  # a ring
        ("canvas", 224, 16, None, (14, 14), (12, 12), (1, 1)),
        ("canvas", 112, 16, 24, (7, 7), (5, 5), (1, 1)),
        ("canvas", 64, 32, None, (2, 2), (1, 2), (0, 0)),  # too small for a ring
    ],
)
def test_prompts_fill_rows_and_columns(name, size, patch, prompts, grid, image_grid, origin):
    layout = make_layout(name, (size, size), patch, prompts)
    assert (layout.grid, layout.image_grid, layout.origin) == (grid, image_grid, origin)
    assert layout.num_virtual_tokens == len(layout.slots) == (prompts or len(layout.slots))
    assert sorted(layout.slots + layout.image_patches) == list(range(grid[0] * grid[1]))


@pytest.mark.parametrize(
    ("name", "size", "patch", "prompts", "message"),
    [
        ("append", 224, 16, 16, "but got 16. Use 14, 28, 29, 42, 44"),
        ("append", 224, 32, 16, "but got 16. Use 7, 14, 15, 21, 23"),
        ("canvas", 224, 16, 13, "but got 13. Use 14, 27, 28, 40, 42"),
        ("canvas", 32, 16, 4, "but got 4. Use 2, 3"),  # nothing would be left of the image
        (
            "canvas",
            16,
            16,
            None,
            "`image_size` must be two patches of 16 pixels at least in the 'canvas' layout",
        ),
        ("append", 100, 16, 14, "`image_size` must be whole patches of 16 pixels, but got 100 x 100"),
        ("below", 224, 16, 14, "`prompt_layout` must be one of append, canvas, dense, but got 'below'"),
    ],
)
def test_prompts_that_do_not_fit_are_refused_with_the_numbers_that_do(name, size, patch, prompts, message):
    with pytest.raises(ValueError, match=message):
        make_layout(name, (size, size), patch, prompts)


def test_patches_and_back():
    images = torch.randn(2, 3, 24, 16)
    patches = to_patches(images, 8)
    assert torch.equal(patches[1, 2], images[1, :, 8:16, 0:8])  # row by row
    assert torch.equal(to_image(patches, (3, 2)), images)


@pytest.mark.parametrize(("name", "prompts"), [("append", 4), ("append", 9), ("canvas", 7), ("canvas", 12)])
def test_the_prompted_image_holds_every_prompt_and_the_whole_image(name, prompts):
    layout = make_layout(name, (32, 32), 8, prompts)
    images = torch.rand(2, 3, 32, 32)
    patches = torch.rand(2, prompts, 3, 8, 8)
    prompted = to_patches(compose(images, patches, layout, valid=False), 8)
    assert torch.equal(prompted[:, layout.slots], patches)
    inside = to_image(prompted[:, layout.image_patches], layout.image_grid)
    assert torch.equal(inside, resize(images, layout.image_size))
    if name == "append":
        assert torch.equal(inside, images)


def test_a_shrunk_image_is_shrunk_not_cropped_and_stays_in_range():
    corners = torch.zeros(1, 1, 32, 32)
    corners[..., 0, 0] = corners[..., -1, -1] = 1
    small = resize(corners, (24, 32))
    assert small[..., 0, 0] > 0.5
    assert small[..., -1, -1] > 0.5
    stripes = (torch.arange(32) % 2).float().expand(1, 3, 32, 32)
    assert 0 <= resize(stripes, (20, 20)).min() <= resize(stripes, (20, 20)).max() <= 1
    # An affine change of scale, such as normalisation, may come before or after.
    torch.testing.assert_close(resize(stripes * 4 - 2, (20, 20)), resize(stripes, (20, 20)) * 4 - 2)


def test_an_offset_is_added_to_the_image_alone_and_clipped():
    layout = make_layout("canvas", (32, 32), 8, 12)
    images, patches, offset = torch.rand(2, 3, 32, 32), torch.rand(2, 12, 3, 8, 8), torch.randn(3, 8, 8)
    plain = to_patches(compose(images, patches, layout, valid=False), 8)
    shifted = to_patches(compose(images, patches, layout, offset), 8)
    own = layout.image_patches
    rounded = ((plain[:, own] + offset).clamp(0, 1) * 255).round() / 255
    torch.testing.assert_close(shifted[:, own], rounded)
    torch.testing.assert_close(shifted[:, layout.slots], (patches * 255).round() / 255)
    whole = torch.randn(3, 16, 16)
    free = to_patches(compose(images, patches, layout, whole, valid=False), 8)
    assert torch.equal(free[:, own], plain[:, own] + to_patches(whole[None], 8))


def test_images_and_prompts_of_another_size_are_refused():
    layout = make_layout("canvas", (32, 32), 8, 12)
    with pytest.raises(ValueError, match="must measure 32 x 32 pixels, as the layout does, but got 32 x 40"):
        compose(torch.rand(1, 3, 32, 40), torch.rand(1, 12, 3, 8, 8), layout)
    with pytest.raises(ValueError, match="`patches` must be 12 for each image, as in the layout, but got 4"):
        compose(torch.rand(1, 3, 32, 32), torch.rand(1, 4, 3, 8, 8), layout)


def test_gradients_pass_between_the_bounds_and_at_them():
    pixels = torch.tensor([-0.3, -1e-6, 0.0, 0.123, 1.0, 1.0001], requires_grad=True)
    levels = to_levels(pixels)
    assert torch.equal(levels, torch.tensor([0, 0, 0, 31 / 255, 1, 1]))
    levels.sum().backward()
    assert torch.equal(pixels.grad, torch.tensor([0.0, 0, 1, 1, 1, 0]))
    with torch.no_grad():
        assert torch.equal(to_levels(pixels), levels)


def test_rounding_to_8_bits_lets_gradients_pass():
    layout = make_layout("canvas", (32, 32), 8, 12)
    images, patches = torch.rand(1, 3, 32, 32), torch.rand(1, 12, 3, 8, 8, requires_grad=True)
    prompted = compose(images, patches, layout)
    levels = prompted.detach() * 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    (prompted * 3).sum().backward()
    assert torch.equal(patches.grad, torch.full_like(patches, 3))
