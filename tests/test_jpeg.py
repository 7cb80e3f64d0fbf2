"""Training through JPEG: the pixels that Pillow decodes, gradients unchanged, in training only."""

import io

import numpy as np
import pytest
import torch
from conftest import answer, move_adapter, tiny_config, tiny_vit
from peft import get_peft_model
from PIL import Image

from pgn_peft.nn.images import through_jpeg
from pgn_peft.nn.preprocessing import denormalize, normalize
from pgn_peft.tuner.adapters import find_layer

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def images(channels=3):
    pixels = torch.randint(0, 256, (4, channels, 32, 32), generator=torch.Generator().manual_seed(0))
    return pixels / 255


@pytest.mark.parametrize(("channels", "mode", "quality"), [(3, "RGB", 90), (1, "L", 30)])
def test_pixels_are_those_that_pillow_decodes(channels, mode, quality):
    pixels = images(channels)
    for image, found in zip(pixels, through_jpeg(pixels, quality), strict=True):
        array = (image * 255).round().byte().permute(1, 2, 0).squeeze(-1).numpy()
        file = io.BytesIO()
        Image.fromarray(array).save(file, "JPEG", quality=quality)
        decoded = np.asarray(Image.open(file))
        assert Image.open(file).mode == mode
        assert np.array_equal((found * 255).round().byte().permute(1, 2, 0).squeeze(-1).numpy(), decoded)


def test_gradients_pass_unchanged_in_a_compiled_graph_too():
    torch.library.opcheck(through_jpeg, (images().requires_grad_(), 90))
    torch.compiler.reset()
    for function in (through_jpeg, torch.compile(through_jpeg, fullgraph=True, backend="aot_eager")):
        pixels, weights = images().requires_grad_(), torch.rand(4, 3, 32, 32)
        (function(pixels, 90) * weights).sum().backward()
        torch.testing.assert_close(pixels.grad, weights)


def test_an_adapter_sees_jpeg_in_training_only():
    scale = {"image_mean": MEAN, "image_std": STD}
    config = tiny_config(prompt_space="pixel", num_virtual_tokens=None, jpeg_quality=50, head="frozen", **scale)
    model = move_adapter(get_peft_model(tiny_vit(), config)).eval()
    layer = find_layer(model, "default")
    plain = layer.prompted_images("default", normalize(images(), MEAN, STD))
    expected = normalize(through_jpeg(denormalize(plain, MEAN, STD), 50), MEAN, STD)
    assert not torch.allclose(plain, expected, atol=0.1)
    layer.library("default").train()  # the library only: BatchNorm keeps its averages
    seen = torch.zeros(4, 2, dtype=torch.bool)
    for seed in range(10):
        torch.manual_seed(seed)
        prompted = layer.prompted_images("default", normalize(images(), MEAN, STD))
        found = [(prompted - other).abs().amax((1, 2, 3)) < 1e-5 for other in (plain, expected)]
        assert bool((found[0] ^ found[1]).all())  # each image as it is, or as JPEG
        seen |= torch.stack(found, 1)
    assert bool(seen.all())
    model(pixel_values=normalize(images(), MEAN, STD), labels=torch.arange(4)).loss.backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in layer.pgn_library.parameters())
    torch.testing.assert_close(answer(model.eval(), normalize(images(), MEAN, STD)), answer(tiny_vit(), plain))


@pytest.mark.parametrize(
    ("channels", "fields"),
    [
        (3, {"jpeg_quality": 90}),  # latent prompts
        (4, {"jpeg_quality": 90, "prompt_space": "pixel"}),
        (3, {"jpeg_quality": 0, "prompt_space": "pixel"}),
        (3, {"jpeg_quality": 101, "prompt_space": "pixel"}),
    ],
)
def test_jpeg_is_refused_where_there_is_none(channels, fields):
    scale = {"image_mean": [0.5] * channels, "image_std": [0.5] * channels, "num_virtual_tokens": None}
    with pytest.raises(ValueError, match="jpeg_quality|JPEG"):
        get_peft_model(tiny_vit(num_channels=channels), tiny_config(**fields, **scale))
