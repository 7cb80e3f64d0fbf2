"""Model and adapter as one graph: compiled, exported, and in ONNX, for batches of any size."""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import answer, move_adapter, tiny_config, tiny_vit
from peft import get_peft_model
from transformers import ViTImageProcessor

from pgn_peft import Classifier, make_prompter
from pgn_peft.nn.functional import resize
from pgn_peft.tuner.adapters import prompt_layer

NAMES = {0: "cat", 1: "dog", 2: "owl"}
SCALE = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
PIXELS = {"prompt_space": "pixel", "prompt_layout": "additive", "num_virtual_tokens": None} | SCALE
FORMS = {
    "first layer": {},
    "every layer": {"prompt_depth": "all", "generator_norm": "group", "generator_rank": 2},
    "pixels": PIXELS,
}


def make(architecture="ViTForImageClassification", sizes=(), **config):
    base = tiny_vit(architecture, **dict(sizes))
    return move_adapter(get_peft_model(base, tiny_config(**({"id2label": NAMES} | config)))).eval()


def images(count, side=32):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def processor(side=32):
    return ViTImageProcessor(size={"height": side, "width": side})


def onnxruntime_answer(file, inputs):
    (outputs,) = pytest.importorskip("onnxruntime").InferenceSession(file).run(None, inputs)
    return outputs


def openvino_answer(file, inputs):
    core = pytest.importorskip("openvino").Core()
    # On CPUs that have it, the default precision is bfloat16.
    model = core.compile_model(core.read_model(file), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return model(inputs)[0]


RUNTIMES = [onnxruntime_answer, openvino_answer]


def has_resize(graph):
    return any(node.op_type == "Resize" for node in graph.graph.node)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixel_values):
        return self.model(pixel_values=pixel_values).logits


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "batches"),
    # Two graphs where there is a generator: torch chooses its convolution on CPUs by whether there are 16 images.
    [("first layer", [(2, (3,)), (16, (40,))]), ("pixels", [(2, (7,))])],
)
def test_one_graph_trains_as_the_model_for_any_batch_size(form, batches):
    torch.compiler.reset()
    # Transformers' loss writes the problem type into the model's config in the first step, unless it is there.
    model = make(**FORMS[form], generator_image_size=16, problem_type="single_label_classification").train()
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    # In pixel space a rounding to 8 bits can fall to the other side.
    tolerance = {"atol": 1e-2, "rtol": 1e-2} if form == "pixels" else {"atol": 1e-5, "rtol": 1e-4}

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


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.slow if number else ()) for number, form in enumerate(FORMS)]
)
def test_runtimes_answer_as_the_model(form, tmp_path):
    """OpenVINO ignores the antialiasing of a Resize node: openvino#35893."""
    model = make(**FORMS[form], generator_image_size=16)
    file = tmp_path / "model.onnx"
    Classifier(model, processor()).export_onnx(file)
    graph = pytest.importorskip("onnx").load(file)
    assert not has_resize(graph)
    metadata = {entry.key: entry.value for entry in graph.metadata_props}
    assert json.loads(metadata["id2label"]) == {str(label): name for label, name in NAMES.items()}
    for runtime in RUNTIMES:
        for count in (1, 20):
            expected = answer(model, images(count))
            logits = runtime(file, {"pixel_values": images(count).numpy()})
            # In pixel space a rounding to 8 bits can fall to the other side.
            tolerance = (2e-2 if form == "pixels" else 1e-4) * expected.std().item()
            np.testing.assert_allclose(logits, expected.numpy(), atol=tolerance, rtol=0, err_msg=runtime.__name__)


@pytest.mark.slow
def test_runtimes_prompt_images_as_the_prompter(tmp_path):
    prompter = make_prompter(make(**PIXELS, generator_image_size=16), processor())
    file = tmp_path / "prompter.onnx"
    prompter.export_onnx(file)
    assert not has_resize(pytest.importorskip("onnx").load(file))
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = prompter(pixels).numpy().astype(int)
    for runtime in RUNTIMES:
        change = np.abs(runtime(file, {"image": pixels.numpy()}).astype(int) - expected)
        assert change.max() <= 1, runtime.__name__
        assert change.mean() < 1e-3, runtime.__name__  # a rounding to 8 bits can fall to the other side


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["ViTForImageClassification", "Dinov2WithRegistersForImageClassification"])
def test_runtimes_resize_position_embeddings_as_the_backbone(architecture, tmp_path):
    """Bicubic, antialiased or not. Embeddings of more than 8,192 numbers are not folded into constants."""
    sizes = {"image_size": 128, "hidden_size": 64, "num_hidden_layers": 1}
    model = make(architecture, sizes.items()).train()
    file = tmp_path / "model.onnx"
    Classifier(model, processor(144)).export_onnx(file)
    assert model.training
    assert prompt_layer(model).pgn_generator["default"].training
    assert not has_resize(pytest.importorskip("onnx").load(file))
    expected = answer(model.eval(), images(2, side=144), interpolate_pos_encoding=True)
    for runtime in RUNTIMES:
        logits = runtime(file, {"pixel_values": images(2, side=144).numpy()})
        np.testing.assert_allclose(logits, expected.numpy(), atol=1e-3, err_msg=runtime.__name__)


def test_an_exported_resize_is_torchs_antialiased_interpolation():
    sides = [(224, 64), (64, 32), (32, 16), (224, 96), (48, 100), (31, 7), (500, 333), (4, 14)]
    for before, after in sides:
        pixels = torch.rand(2, 3, before, before + 4, generator=torch.Generator().manual_seed(0))
        size = (after, after + 1)
        exported = torch.export.export(Resize(size), (pixels,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        assert not any("upsample" in str(node.target) for node in exported.graph.nodes)
        # In double precision: in single precision torch's weights are wrong by up to 2e-5 where the ratio is inexact.
        expected = torch.nn.functional.interpolate(pixels.double(), size=size, mode="bilinear", antialias=True)
        torch.testing.assert_close(exported.module()(pixels).double(), expected, atol=1e-6, rtol=0)
        torch.testing.assert_close(resize(pixels, size).double(), expected, atol=3e-5, rtol=0)


class Resize(torch.nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, pixels):
        return resize(pixels, self.size)


@pytest.mark.slow
def test_the_older_exporter_takes_the_model_too(tmp_path):
    """It has no antialiased interpolation: pytorch#121623."""
    model = make(generator_image_size=16)
    with torch.no_grad():
        torch.onnx.export(
            Logits(model).eval(),
            (images(2),),
            tmp_path / "model.onnx",
            dynamo=False,
            input_names=["pixel_values"],
            dynamic_axes={"pixel_values": {0: "batch"}},
        )
    logits = onnxruntime_answer(tmp_path / "model.onnx", {"pixel_values": images(5).numpy()})
    np.testing.assert_allclose(logits, answer(model, images(5)).numpy(), atol=1e-4)


def test_a_model_without_an_adapter_is_not_exported(tmp_path):
    with pytest.raises(TypeError, match="ViTForImageClassification"):
        Classifier(tiny_vit(), processor()).export_onnx(tmp_path / "model.onnx")
