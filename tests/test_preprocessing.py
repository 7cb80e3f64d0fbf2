"""The steps of an image processor without Transformers: pixel for pixel what the real one does."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import DeiTImageProcessor, ViTImageProcessor

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
def test_images_come_out_as_from_the_processor(name):
    processor = PROCESSORS[name]
    preprocessing = Preprocessing.from_processor(processor)
    for size in ((64, 64), (47, 91), (120, 50), (32, 32), (20, 30)):
        image = photo(*size)
        expected = processor(images=image, return_tensors="pt")["pixel_values"][0]
        pixels = preprocessing.apply(to_pixels(image, 3)).float() / 255
        found = normalize(pixels, preprocessing.image_mean, preprocessing.image_std)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert preprocessing.output_size == tuple(expected.shape[1:])


def test_the_longer_side_is_rounded_as_the_processor_rounds_it():
    """49 * (32 / 49) is less than 32 in floating point."""
    processor = DeiTImageProcessor(size={"shortest_edge": 32}, do_center_crop=False)
    image = photo(49, 49)
    expected = processor(images=image, return_tensors="pt")["pixel_values"][0]
    assert Preprocessing.from_processor(processor).apply(to_pixels(image, 3)).shape == expected.shape


def test_the_processor_cuts_the_margins_off_and_leaves_every_pixel_alone():
    """What the client sends is what the model sees."""
    for name, processor in PROCESSORS.items():
        preprocessing = Preprocessing.from_processor(processor)
        finished = to_pixels(photo(*preprocessing.output_size), 3)
        sent = to_images(torch.nn.functional.pad(finished[None], preprocessing.margins), Image.Image)[0]
        seen = processor(images=sent, return_tensors="pt")["pixel_values"][0]
        seen = denormalize(seen, preprocessing.image_mean, preprocessing.image_std)
        assert torch.equal(to_8_bit(seen), finished), name


def test_processors_that_do_something_else_are_refused():
    changes = {"do_normalize": False, "do_rescale": False, "rescale_factor": 1 / 127.5, "resample": 0}
    for name, value in (changes | {"size": {"longest_edge": 32}}).items():
        processor = ViTImageProcessor(size={"height": 32, "width": 32})
        setattr(processor, name, value)
        with pytest.raises(ValueError, match=f"`{name}` is .* in the image processor"):
            Preprocessing.from_processor(processor)


def test_what_is_no_processor_is_refused():
    with pytest.raises(TypeError, match="`processor` is not an image processor, but a str"):
        Preprocessing.from_processor("google/vit-base-patch16-224")


def test_what_holds_no_images_is_refused():
    preprocessing = Preprocessing.from_processor(PROCESSORS["size"])
    for images in (None, 7, "cat.png", ["cat.png"], {"image": 1}):
        with pytest.raises(TypeError, match="cannot be read. Give Pillow images, or arrays or tensors"):
            read_images(images, preprocessing, 3, (32, 32))


def test_an_image_of_another_size_is_named():
    steps = Preprocessing.from_processor(DeiTImageProcessor(size={"shortest_edge": 32}, do_center_crop=False))
    with pytest.raises(ValueError, match="Image 1 must measure 32 x 32 pixels .* but measures 32 x 64"):
        read_images([photo(8, 8), photo(8, 16)], steps, 3, (32, 32))


def test_pillow_images_of_any_mode():
    for mode in ("RGB", "L", "RGBA", "P", "1", "CMYK", "LA"):
        image = photo(5, 7).convert(mode)
        pixels = to_pixels(image, 3)
        assert torch.equal(pixels, torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)), mode
        assert to_pixels(image, 1).shape == (1, 5, 7), mode


def test_rare_modes_are_converted():
    for mode in ("La", "PA", "RGBa", "RGBX", "YCbCr", "LAB", "HSV", "I;16B", "I;16L"):
        image = Image.new(mode, (7, 5))
        assert to_pixels(image, 3).shape == (3, 5, 7), mode
        assert to_pixels(image, 1).shape == (1, 5, 7), mode


def test_the_same_image_in_all_its_forms():
    image = photo(5, 7)
    array = np.array(image)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    for form in (array, tensor, array / 255, tensor.float() / 255, tensor.double() / 255, np.asfortranarray(array)):
        assert torch.equal(to_pixels(form, 3), tensor)


def test_what_is_no_image_is_refused():
    for image, error, message in (
        (np.zeros((5, 7), np.uint8), ValueError, r"images of 3 channels, but one has the shape \(7, 5\)"),
        (np.zeros((5, 7, 4), np.uint8), ValueError, r"images of 3 channels, but one has the shape \(4, 5, 7\)"),
        (torch.zeros(3, 5, 7, dtype=torch.int64), TypeError, "An image of type torch.int64 cannot be read"),
        (torch.full((3, 5, 7), torch.nan), ValueError, r"must lie in \[0, 1\], but one goes from nan to nan"),
    ):
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


def test_pixels_of_an_unknown_range_are_refused():
    for values, dtype in (([0, 65535], np.int32), ([-1.0, 1.0], np.float32), ([0.0, float("nan")], np.float32)):
        with pytest.raises(ValueError, match="Unknown range of pixels: mode '[IF]' with values from"):
            to_pixels(Image.fromarray(np.array([values], dtype)), 3)
