"""Model and adapter as one graph: compiled, exported, and in ONNX, for batches of any size."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import answer, move_adapter, tiny_config, tiny_vit
from peft import get_peft_model
from transformers import ViTImageProcessor

from pgn_peft import Classifier
from pgn_peft.tuner.adapters import prompt_layer

NAMES = {0: "cat", 1: "dog", 2: "owl"}
PIXEL = {"prompt_space": "pixel", "num_virtual_tokens": None, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
FORMS = {
    "latent": {},
    "resized": {"generator_image_size": 16},
    "group norm": {"generator_norm": "group"},
    "factorised": {"generator_rank": 2},
    "static": {"generator": "static"},
    "deep": {"prompt_depth": "all"},
    "averaged": {"prompt_depth": "all"},  # on a DINOv2, where prompts leave the tokens after the last layer
    "canvas": PIXEL,
    "dense": PIXEL | {"prompt_layout": "additive"},
}


def make(form, **config):
    base = tiny_vit("Dinov2ForImageClassification" if form == "averaged" else "ViTForImageClassification")
    return move_adapter(get_peft_model(base, tiny_config(**(FORMS[form] | {"id2label": NAMES} | config)))).eval()


def images(count, side=32):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def processor(side=32):
    return ViTImageProcessor(size={"height": side, "width": side})


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values=pixel_values).logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "config", "batches"),
    # Two graphs where there is a generator: torch chooses its convolution on CPUs by whether there are 16 images.
    [
        ("latent", {}, [(2, (3, 15)), (16, (40, 5))]),
        ("averaged", {"generator": "static"}, [(2, (7,))]),
        ("canvas", {"generator": "static"}, [(2, (7,))]),
        ("dense", {}, [(2, (7,))]),
    ],
)
def test_one_graph_trains_as_the_model_for_any_batch_size(form, config, batches):
    torch.compiler.reset()
    # Transformers' loss writes the problem type into the model's config in the first step, unless it is there.
    model = make(form, **config, problem_type="single_label_classification").train()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    # In pixel space a rounding to 8 bits can fall to the other side.
    tolerance = {"atol": 1e-2, "rtol": 1e-2} if form in ("canvas", "dense") else {"atol": 1e-5, "rtol": 1e-4}

    def step(count):
        losses = []
        for each in (compiled, eager):
            losses.append(each(pixel_values=images(count), labels=torch.arange(count) % 3).loss)
            losses[-1].backward()
        torch.testing.assert_close(*losses, **tolerance)

    for first, others in batches:
        step(first)
        with torch.compiler.set_stance("fail_on_recompile"):
            for count in others:
                step(count)
    for (name, parameter), expected in zip(model.named_parameters(), eager.parameters(), strict=True):
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected.grad, **tolerance, msg=name)
    for (name, buffer), expected in zip(model.named_buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(buffer, expected, **tolerance, msg=name)


# The other forms are exported to ONNX below, which begins with such a program.
@pytest.mark.parametrize("form", ["group norm", "factorised", "static"])
def test_an_exported_program_answers_as_the_model(form):
    model = make(form)
    batch = {0: torch.export.Dim("batch", min=1, max=1024)}
    with torch.no_grad():
        program = torch.export.export(Logits(model), (images(3),), dynamic_shapes=(batch,))
    for count in (1, 2, 20):
        torch.testing.assert_close(program.module()(images(count)), answer(model, images(count)))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["resized", "deep", "canvas", "dense"])
def test_onnx_gives_the_same_logits(form, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = make(form)
    Classifier(model, processor()).export_onnx(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert json.loads(session.get_modelmeta().custom_metadata_map["id2label"]) == {
        str(label): name for label, name in NAMES.items()
    }
    for count in (1, 2, 20):
        expected = answer(model, images(count))
        (logits,) = session.run(["logits"], {"pixel_values": images(count).numpy()})
        # In pixel space a rounding to 8 bits can fall to the other side.
        assert (
            np.abs(logits - expected.numpy()).max() < (2e-2 if form in ("canvas", "dense") else 1e-4) * expected.std()
        )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["latent", "averaged"])
def test_onnx_at_another_size_than_the_backbones(form, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = make(form).train()
    Classifier(model, processor(48)).export_onnx(tmp_path / "model.onnx")
    assert model.training
    assert prompt_layer(model).pgn_generator["default"].training
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (logits,) = session.run(None, {"pixel_values": images(2, side=48).numpy()})
    expected = answer(model.eval(), images(2, side=48), interpolate_pos_encoding=True)
    np.testing.assert_allclose(logits, expected.numpy(), atol=1e-4)


def test_the_frozen_embeddings_leave_no_graph(pixel_values):
    layer = prompt_layer(make("latent").train())
    assert not layer.base_layer(pixel_values).requires_grad
    assert layer(pixel_values).requires_grad


def test_a_model_without_an_adapter_is_not_exported(tmp_path):
    with pytest.raises(TypeError, match="must carry a PGN adapter, but got ViTForImageClassification"):
        Classifier(tiny_vit(), processor()).export_onnx(tmp_path / "model.onnx")
