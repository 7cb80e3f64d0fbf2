"""One call from an adapter to a classifier: what it answers, what it falls back to, what it refuses to open."""

import base64
import json
import logging
import pickle
import shutil
from io import BytesIO

import numpy as np
import pytest
import torch
import transformers
from conftest import answer, assert_nearly_equal, edit_json, move_adapter, tiny_config, tiny_vit
from peft import AutoPeftModel, LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, ViTForImageClassification, ViTImageProcessor

from pgn_peft import Classifier, load_classifier
from pgn_peft.hub.classifier import logger


def scores(entries):
    return [entry["score"] for entry in entries]


NAMES = {0: "cat", 1: "dog"}
RED = Image.new("RGB", (50, 40), "red")


def processor(side=32, **settings):
    return ViTImageProcessor(size={"height": side, "width": side}, **settings)


@pytest.fixture
def base(tmp_path):
    """A base with ten labels, and a processor that no adapter here was trained with."""
    tiny_vit(num_labels=10).save_pretrained(tmp_path / "vit")
    processor(32, image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def adapted(base, **config):
    vit = ViTForImageClassification.from_pretrained(base)
    return move_adapter(get_peft_model(vit, tiny_config(**({"id2label": NAMES} | config)))).eval()


@pytest.fixture
def model(base):
    return adapted(base)


@pytest.fixture
def saved(model, tmp_path):
    Classifier(model, processor()).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_it_answers_as_the_adapter_that_was_saved(model, saved, pixel_values):
    loaded, image_processor = load_classifier(saved)
    assert_nearly_equal(answer(loaded, pixel_values), answer(model, pixel_values))
    assert loaded.config.id2label == NAMES
    assert image_processor.image_mean == processor().image_mean
    assert not loaded.training
    assert not any(parameter.requires_grad for name, parameter in loaded.named_parameters() if "pgn_" in name)


# A timm model, one with two towers, and a plain one whose head is wider than its features.
@pytest.mark.parametrize(
    "architecture",
    ["TimmWrapperForImageClassification", "CLIPForImageClassification", "Dinov2WithRegistersForImageClassification"],
)
def test_other_architectures(architecture, tmp_path, pixel_values):
    tiny_vit(architecture, num_labels=10).save_pretrained(tmp_path / "base")
    vit = getattr(transformers, architecture).from_pretrained(tmp_path / "base")
    model = move_adapter(get_peft_model(vit, tiny_config(id2label=NAMES))).eval()
    Classifier(model, processor(48)).save_pretrained(tmp_path / "adapter")
    loaded = load_classifier(tmp_path / "adapter")
    assert_nearly_equal(answer(loaded.model, pixel_values), answer(model, pixel_values))
    assert {entry["label"] for entry in loaded.pipeline()(RED)} == {"cat", "dog"}


def test_the_saved_processor_wins_over_a_stale_one_in_another_file(model, tmp_path):
    """Transformers reads processor_config.json first (huggingface/transformers#42085)."""
    folder = tmp_path / "adapter"
    folder.mkdir()

    def leave_a_stale_one():
        stale = {"image_processor": processor(64).to_dict(), "processor_class": "CLIPProcessor"}
        (folder / "processor_config.json").write_text(json.dumps(stale), encoding="utf-8")

    leave_a_stale_one()
    Classifier(model, processor(32)).save_pretrained(folder)
    assert AutoImageProcessor.from_pretrained(folder).size["height"] == 32
    leave_a_stale_one()
    assert load_classifier(folder).image_processor.size["height"] == 32


def test_both_pipelines_use_the_adapters_processor(model, saved, caplog):
    inputs = processor()(images=RED, return_tensors="pt")
    expected = answer(model, **inputs).softmax(-1)[0].tolist()
    loaded = load_classifier(saved)
    by_hand = transformers.pipeline("image-classification", model=loaded.model, image_processor=loaded.image_processor)
    for classify in (loaded.pipeline(), by_hand, Classifier(model, processor()).pipeline(batch_size=2)):
        scores = {entry["label"]: entry["score"] for entry in classify(RED)}
        assert [scores["cat"], scores["dog"]] == pytest.approx(expected, abs=1e-6)
    assert "not supported" not in caplog.text


def test_a_pipeline_reads_16_bit_images_from_every_source(model, tmp_path):
    ramp = np.linspace(0, 65535, 32 * 32).reshape(32, 32).astype(np.uint16)
    Image.fromarray(ramp).save(tmp_path / "grey.png")
    content = (tmp_path / "grey.png").read_bytes()
    classify = Classifier(model, processor()).pipeline()
    expected = classify(Image.fromarray((ramp / 257).round().astype(np.uint8)))
    encoded = base64.b64encode(content).decode()
    sources = (str(tmp_path / "grey.png"), encoded, f"data:image/png;base64,{encoded}", Image.open(BytesIO(content)))
    for image in sources:
        assert_nearly_equal(torch.tensor(scores(classify(image))), torch.tensor(scores(expected)))
    with pytest.raises(ValueError, match="nowhere.png"):
        classify("nowhere.png")


def test_a_pipeline_answers_a_regression_with_plain_numbers(base):
    """Transformers 5.22 puts a sigmoid on a single output, whatever the problem is."""
    model = adapted(base, id2label={0: "age"}, problem_type="regression")
    with torch.no_grad():
        model.get_base_model().classifier.pgn_head["default"].bias.fill_(40)
    (entry,) = Classifier(model, processor()).pipeline()(RED)
    assert entry["score"] == pytest.approx(answer(model, **processor()(images=RED, return_tensors="pt")).item())
    assert entry["score"] > 30


def test_gradio_takes_a_pipeline(model):
    """Gradio 6.31 makes the page, but its button needs Transformers 4: it asks for text pipelines that are gone."""
    gradio = pytest.importorskip("gradio", reason="gradio is not installed")
    assert gradio.Interface.from_pipeline(Classifier(model, processor()).pipeline())


@pytest.mark.parametrize("size", [{"height": 48, "width": 48}, {"shortest_edge": 40}])
def test_an_adapter_of_another_image_size_needs_no_argument(model, tmp_path, size):
    image_processor = ViTImageProcessor(size=size)
    inputs = image_processor(images=RED, return_tensors="pt")
    expected = answer(model, **inputs, interpolate_pos_encoding=True)
    Classifier(model, image_processor).save_pretrained(tmp_path / "adapter")
    loaded = load_classifier(tmp_path / "adapter")
    torch.testing.assert_close(answer(loaded.model, **inputs), expected)
    scores = {entry["label"]: entry["score"] for entry in loaded.pipeline()(RED)}
    assert scores["cat"] == pytest.approx(expected.softmax(-1)[0, 0].item(), abs=1e-6)
    assert "interpolate_pos_encoding=True" in (tmp_path / "adapter/README.md").read_text(encoding="utf-8")
    hooks = len(loaded.model._forward_pre_hooks)
    loaded.pipeline()
    assert len(loaded.model._forward_pre_hooks) == hooks


def test_an_adapter_in_pixel_space(base, tmp_path, pixel_values):
    norms = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    model = adapted(base, prompt_space="pixel", num_virtual_tokens=None, **norms)
    Classifier(model, processor()).save_pretrained(tmp_path / "adapter")
    loaded = load_classifier(tmp_path / "adapter")
    assert_nearly_equal(answer(loaded.model, pixel_values), answer(model, pixel_values), valid_pixels=True)


def test_a_frozen_head_with_a_label_mapping(base, tmp_path, pixel_values):
    model = adapted(base, head="frozen", label_mapping=[7, 2])
    Classifier(model, processor()).save_pretrained(tmp_path / "adapter")
    loaded = load_classifier(tmp_path / "adapter").model
    assert loaded.config.id2label == NAMES
    assert_nearly_equal(answer(loaded, pixel_values), answer(model, pixel_values))


def test_without_a_processor_of_its_own_it_takes_the_bases_and_says_so(saved, base, caplog):
    (saved / "preprocessor_config.json").unlink()
    with caplog.at_level(logging.WARNING, logger=logger.name):
        loaded = load_classifier(saved)
    assert list(loaded.image_processor.image_mean) == [0.1, 0.2, 0.3]
    assert f"{saved} has no image processor of its own; taking that of its base model, {base}" in caplog.text
    (base / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match="Can't load image processor"):
        load_classifier(saved)


def test_the_base_can_be_a_local_copy(saved, base, tmp_path, pixel_values):
    expected = answer(load_classifier(saved).model, pixel_values)
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(OSError, match=f"'{base}'.* pass its place, load_classifier.*base_model_name_or_path="):
        load_classifier(saved)
    assert_nearly_equal(answer(load_classifier(saved, base_model_name_or_path=moved).model, pixel_values), expected)


def test_subfolder_of_a_local_directory(saved, tmp_path):
    loaded = load_classifier(tmp_path, subfolder="adapter")
    assert loaded.model.config.id2label == NAMES
    with pytest.raises(OSError, match="There is no adapter_config.json in .*`subfolder`"):
        load_classifier(tmp_path)


def test_dtype_and_device_map_reach_the_base(saved, pixel_values):
    model = load_classifier(saved, dtype=torch.bfloat16, device_map="cpu").model
    assert model.dtype == torch.bfloat16
    own = {parameter.dtype for name, parameter in model.named_parameters() if "pgn_" in name}
    assert own == {torch.float32}
    assert answer(model, pixel_values.bfloat16()).isfinite().all()
    with pytest.raises(ValueError, match="nowhere"):
        load_classifier(saved, device_map="nowhere")


def test_the_saved_files_are_peft_own_and_load_everywhere(model, saved, tmp_path, pixel_values):
    model.save_pretrained(tmp_path / "peft")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (saved, tmp_path / "peft"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    configs = [
        json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        for folder in (saved, tmp_path / "peft")
    ]
    for config in configs:
        config.pop("checksums", None)
    assert configs[0] == configs[1]
    assert_nearly_equal(answer(AutoPeftModel.from_pretrained(str(saved)), pixel_values), answer(model, pixel_values))
    load_classifier(saved).save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again/adapter_model.safetensors")
    assert all(torch.equal(ours[name], again[name]) for name in ours)


def test_the_active_one_of_several_adapters_is_saved(model, tmp_path, pixel_values):
    model.add_adapter("pets", tiny_config(id2label={0: "hamster", 1: "fish", 2: "parrot"}))
    model.set_adapter("pets")
    move_adapter(model, seed=2).eval()
    Classifier(model, processor()).save_pretrained(tmp_path / "pets")
    loaded = load_classifier(tmp_path / "pets").model
    assert loaded.config.num_labels == 3
    assert_nearly_equal(answer(loaded, pixel_values), answer(model, pixel_values))


def test_what_cannot_be_saved_is_refused(model, tmp_path):
    with pytest.raises(TypeError, match="This ViTForImageClassification carries no PGN adapter"):
        Classifier(tiny_vit(), processor()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(TypeError, match="`image_processor` is not an image processor"):
        Classifier(model, None).save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_other_adapters_are_refused_in_words(base, tmp_path):
    lora = get_peft_model(ViTForImageClassification.from_pretrained(base), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="is an adapter of another method"):
        load_classifier(tmp_path / "lora")
    vit = transformers.ViTModel.from_pretrained(base)
    get_peft_model(vit, tiny_config()).save_pretrained(tmp_path / "features")
    with pytest.raises(ValueError, match="has no labels and answers with features"):
        load_classifier(tmp_path / "features")


# Adapters that are not trusted.


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def sprung(saved, base, tmp_path):
    """Pickles and code wherever a loader might look; the file that exists once any of them was read."""
    sprung = tmp_path / "sprung"
    for folder in (saved, base):
        for name in ("adapter_model.bin", "pytorch_model.bin", "training_args.bin"):
            (folder / name).write_bytes(pickle.dumps(Trap(sprung)))
        (folder / "code.py").write_text(f"open({str(sprung)!r}, 'w')\nclass Model: pass\n", encoding="utf-8")
        for name in ("config.json", "preprocessor_config.json"):
            settings = json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).exists() else {}
            names = ("AutoConfig", "AutoModelForImageClassification", "AutoImageProcessor")
            (folder / name).write_text(
                json.dumps(settings | {"auto_map": dict.fromkeys(names, "code.Model")}), encoding="utf-8"
            )
    (saved / "config.json").unlink()
    edit_json(saved / "adapter_config.json")
    return sprung


def test_neither_pickles_nor_code_are_read(saved, sprung, pixel_values):
    loaded = load_classifier(saved)
    assert loaded.pipeline()(RED)
    assert not sprung.exists()


def test_pickled_weights_and_bases_that_are_adapters_are_refused(saved, base, sprung, tmp_path):
    weights = base / "model.safetensors"
    weights.rename(tmp_path / "weights")
    with pytest.raises(OSError, match="is an adapter, or lacks config.json or weights in safetensors"):
        load_classifier(saved)
    (tmp_path / "weights").rename(weights)
    shutil.copy(saved / "adapter_config.json", base)
    with pytest.raises(OSError, match="is an adapter, or lacks config.json"):
        load_classifier(saved)
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(
        OSError,
        match=r"There is no adapter_model.safetensors in .* Pickled weights \(adapter_model.bin\) are not read",
    ):
        load_classifier(saved)
    assert not sprung.exists()


def test_a_class_that_a_file_names_is_not_imported(saved, tmp_path, monkeypatch):
    sprung = tmp_path / "sprung"
    (tmp_path / "transformers_trap.py").write_text(
        f"open({str(sprung)!r}, 'w')\nclass Model: pass\n", encoding="utf-8"
    )
    monkeypatch.syspath_prepend(tmp_path)
    file = saved / "adapter_config.json"
    mapping = {"base_model_class": "Model", "parent_library": "transformers_trap"}
    edit_json(file, auto_mapping=mapping)
    load_classifier(saved)
    assert not sprung.exists()


def test_a_kernel_that_a_file_names_is_not_fetched(saved, base):
    file = base / "config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"attn_implementation": "kernels-community/evil"}),
        encoding="utf-8",
    )
    assert load_classifier(saved).model.config._attn_implementation in ("sdpa", "eager")


def test_a_compiled_model_is_saved_as_the_one_inside(model, tmp_path, pixel_values):
    compiled = torch.compile(model, backend="eager")
    Classifier(compiled, processor()).save_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "plain")
    vit = model.get_base_model()
    vit.vit = torch.compile(vit.vit, backend="eager")
    Classifier(model, processor()).save_pretrained(tmp_path / "parts")
    plain = load_file(tmp_path / "plain/adapter_model.safetensors")
    for name in ("saved", "parts"):
        saved = load_file(tmp_path / name / "adapter_model.safetensors")
        assert saved.keys() == plain.keys()
        assert all(torch.equal(saved[name], plain[name]) for name in plain)
    assert {entry["label"] for entry in Classifier(compiled, processor()).pipeline()(RED)} == {"cat", "dog"}


def test_a_pipeline_of_a_model_in_training_mode_predicts_in_eval_mode(model):
    expected = Classifier(model, processor()).pipeline()(RED)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert Classifier(model.train(), processor()).pipeline()(RED) == expected
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
