"""The steps of an image processor without Transformers: pixel for pixel what the real one does."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ConvNextImageProcessor, DeiTImageProcessor, ViTImageProcessor

from pgn_peft.nn.images import read_images, to_8_bit, to_images, to_pixels
from pgn_peft.nn.preprocessing import Preprocessing, denormalize, normalize

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
PROCESSORS = {
    "size": ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD),
    "bicubic": ViTImageProcessor(size={"height": 32, "width": 24}, resample=3),
    "crop": DeiTImageProcessor(size={"height": 40, "width": 40}, crop_size={"height": 32, "width": 32}),
    "odd crop": DeiTImageProcessor(size={"height": 37, "width": 39}, crop_size={"height": 32, "width": 32}),
    "shorter side": DeiTImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32}),
    "no crop": DeiTImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False),
}


def photo(height, width, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", PROCESSORS)
@pytest.mark.parametrize("size", [(64, 64), (47, 91), (120, 50), (32, 32), (20, 30)])
def test_images_come_out_as_from_the_processor(name, size):
    processor = PROCESSORS[name]
    preprocessing = Preprocessing.from_processor(processor)
    image = photo(*size)
    expected = processor(images=image, return_tensors="pt")["pixel_values"][0]
    pixels = preprocessing.apply(to_pixels(image, 3)).float() / 255
    found = normalize(pixels, preprocessing.image_mean, preprocessing.image_std)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert preprocessing.output_size == tuple(expected.shape[1:])


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_processor_cuts_the_margins_off_and_leaves_every_pixel_alone(name):
    """What the client sends is what the model sees."""
    processor = PROCESSORS[name]
    preprocessing = Preprocessing.from_processor(processor)
    finished = to_pixels(photo(*preprocessing.output_size), 3)
    sent = to_images(torch.nn.functional.pad(finished[None], preprocessing.margins), Image.Image)[0]
    seen = processor(images=sent, return_tensors="pt")["pixel_values"][0]
    seen = denormalize(seen, preprocessing.image_mean, preprocessing.image_std)
    assert torch.equal(to_8_bit(seen), finished)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_normalize": False}, "`do_normalize` must be True in the image processor, but got False"),
        ({"rescale_factor": 1 / 127.5}, "`rescale_factor` must be 1/255 in the image processor, but got 0.0078"),
        ({"resample": 0}, "`resample` must be bilinear .* but got"),
        ({"size": {"longest_edge": 32}}, "`size` must have height and width, or shortest_edge, .* but got"),
    ],
)
def test_processors_that_do_something_else_are_refused(change, message):
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    for name, value in change.items():
        setattr(processor, name, value)
    with pytest.raises(ValueError, match=message):
        Preprocessing.from_processor(processor)


@pytest.mark.parametrize("processor", [None, "google/vit-base-patch16-224"])
def test_what_is_no_processor_is_refused(processor):
    with pytest.raises(TypeError, match="`processor` must be an image processor, but got"):
        Preprocessing.from_processor(processor)


@pytest.mark.parametrize("images", [None, 7, "cat.png", ["cat.png"], {"image": 1}])
def test_what_holds_no_images_is_refused(images):
    preprocessing = Preprocessing.from_processor(PROCESSORS["size"])
    with pytest.raises(TypeError, match="`images` must be Pillow images, numpy arrays or tensors, but got"):
        read_images(images, preprocessing, 3, (32, 32))


def test_a_processor_with_rescaling_of_its_own_is_refused():
    with pytest.raises(ValueError, match="in the image processor"):
        Preprocessing.from_processor(ConvNextImageProcessor(do_rescale=False))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK", "LA"])
def test_pillow_images_of_any_mode(mode):
    image = photo(5, 7).convert(mode)
    pixels = to_pixels(image, 3)
    assert pixels.shape == (3, 5, 7)
    assert torch.equal(pixels, torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1))
    assert to_pixels(image, 1).shape == (1, 5, 7)


def test_the_same_image_in_all_its_forms():
    image = photo(5, 7)
    array = np.array(image)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    for form in (array, tensor, array / 255, tensor.float() / 255, tensor.double() / 255, np.asfortranarray(array)):
        assert torch.equal(to_pixels(form, 3), tensor)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (
            np.zeros((5, 7), np.uint8),
            ValueError,
            r"`images` must have the axes \(H, W, C\) as arrays, but got \(5, 7\)",
        ),
        (
            np.zeros((5, 7, 4), np.uint8),
            ValueError,
            r"`images` must have 3 channels, .* but got a tensor of \(4, 5, 7\)",
        ),
        (torch.zeros(1, 5, 7), ValueError, r"`images` must have 3 channels, .* but got a tensor of \(1, 5, 7\)"),
        (torch.zeros(3, 5, 7, dtype=torch.int64), TypeError, "8-bit integers or floats .* but got torch.int64"),
        (torch.full((3, 5, 7), 200.0), ValueError, r"`images` must lie in \[0, 1\] as floats, but got 200 to 200"),
        (torch.full((3, 5, 7), float("nan")), ValueError, r"`images` must lie in \[0, 1\] as floats, but got nan"),
        (torch.zeros(3, 0, 7), ValueError, r"`images` must have pixels, but got none in \(3, 0, 7\)"),
        ("cat.png", TypeError, "`images` must be Pillow images, numpy arrays or tensors, but got str"),
    ],
)
def test_what_is_no_image_is_refused(image, error, message):
    with pytest.raises(error, match=message):
        to_pixels(image, 3)


def test_normalisation_and_back():
    pixels = torch.rand(2, 3, 4, 5)
    torch.testing.assert_close(denormalize(normalize(pixels, MEAN, STD), MEAN, STD), pixels)
    assert normalize(torch.tensor(MEAN)[:, None, None], MEAN, STD).abs().max() == 0


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_wider_pixels_are_scaled_where_their_range_is_known(mode):
    grey = np.arange(35, dtype=np.uint8).reshape(5, 7) * 7
    wide = grey.astype(np.uint16) * 257 if mode == "I;16" else grey.astype(np.float32) / 255
    image = Image.fromarray(wide)
    assert image.mode == mode
    for channels in 1, 3:
        assert torch.equal(to_pixels(image, channels), torch.from_numpy(grey).expand(channels, -1, -1))
    colour = np.stack([grey, grey[::-1], grey.T.reshape(5, 7)], axis=-1).astype(np.uint16) * 257
    for array in (colour, colour.astype(">u2")):
        assert torch.equal(to_pixels(array, 3), torch.from_numpy(colour // 257).to(torch.uint8).permute(2, 0, 1))
    assert torch.equal(to_pixels(torch.from_numpy(colour).permute(2, 0, 1), 3), to_pixels(colour, 3))


@pytest.mark.parametrize("values", [[0, 65535], [-1.0, 1.0], [0.0, float("nan")]])
def test_pixels_of_an_unknown_range_are_refused(values):
    image = Image.fromarray(np.array([values], np.int32 if values[1] == 65535 else np.float32))
    with pytest.raises(ValueError, match="`images` must have .* as pixels, but got mode '[IF]' with values from"):
        to_pixels(image, 3)


@pytest.mark.parametrize("mode", ["La", "PA", "RGBa", "RGBX", "YCbCr", "LAB", "HSV", "I;16B", "I;16L"])
def test_rare_modes_are_converted(mode):
    image = Image.new(mode, (7, 5))
    assert to_pixels(image, 3).shape == (3, 5, 7)
    assert to_pixels(image, 1).shape == (1, 5, 7)
