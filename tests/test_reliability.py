"""Files of adapters: edited or rewritten they load, damaged they are refused (a part of benchmarks/faults.py)."""

import json
import shutil

import fault_files
import fault_images
import pytest
import torch
from conftest import PIXEL, answer, assert_same, move_adapter, refused, tiny_config, tiny_vit
from fault_outcomes import Tally
from peft import AutoPeftModel, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, ViTForImageClassification, ViTImageProcessor

from pgn_peft import Classifier, PGNConfig, load_classifier

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """A tiny base model with adapters and a prompter."""
    return fault_files.Material(tmp_path_factory.mktemp("material"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("campaign", "cases"),
    [
        (fault_files.damaged_files, 32),
        (fault_files.other_types, 40),
        (fault_files.path_tricks, 40),
        (fault_images.all_images, 6),
    ],
)
def test_no_damage_is_accepted_in_silence(campaign, cases, material):
    tally = Tally()
    campaign(tally, material, cases, seed=1)
    assert not tally.wrong
    assert sum(counts.total() for counts in tally.counts.values()) >= cases


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter, its processor and its card; its base lies in `tmp_path / "base"`."""
    tiny_vit().save_pretrained(tmp_path / "base")
    base = ViTForImageClassification.from_pretrained(tmp_path / "base")
    model = move_adapter(get_peft_model(base, tiny_config(id2label={0: "cat", 1: "dog"}))).eval()
    Classifier(model, ViTImageProcessor(size={"height": 32, "width": 32})).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit_config(folder, **fields):
    file = folder / CONFIG
    settings = json.loads(file.read_text(encoding="utf-8")) | fields
    file.write_text(json.dumps(settings), encoding="utf-8")


def edit_weights(folder, change):
    tensors = {name: change(name, tensor) for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def move_base(folder):
    shutil.move(folder.parent / "base", folder.parent / "moved")
    edit_config(folder, base_model_name_or_path=str(folder.parent / "moved"))


def count_in(dtype, shape=()):
    """A change of BatchNorm's counters, as averaging tools leave them."""
    return lambda name, tensor: torch.zeros(shape, dtype=dtype) if "num_batches_tracked" in name else tensor


def write_with_carriage_returns(folder):
    text = (folder / CONFIG).read_text(encoding="utf-8")
    (folder / CONFIG).write_text(text.replace("\n", "\r\n"), encoding="utf-8", newline="")


# What people and tools do to saved files, each with the tolerance of the answers afterwards.
EDITS = {
    "the base is moved": (move_base, 1e-5),
    "a label is renamed": (lambda folder: edit_config(folder, id2label={"0": "cat", "1": "hound"}), 1e-5),
    "a revision is added": (lambda folder: edit_config(folder, revision="main"), 1e-5),
    "an unknown key is added": (lambda folder: edit_config(folder, from_another_tool=1), 1e-5),
    "cloned with carriage returns": (write_with_carriage_returns, 1e-5),
    "the same weights in another file": (lambda folder: edit_weights(folder, lambda name, tensor: tensor), 1e-5),
    "weights in bfloat16": (
        lambda folder: edit_weights(folder, lambda name, t: t.bfloat16() if t.is_floating_point() else t),
        0.1,
    ),
    "all tensors in half precision": (lambda folder: edit_weights(folder, lambda name, tensor: tensor.half()), 0.05),
    "counters are floats": (lambda folder: edit_weights(folder, count_in(torch.float32)), 1e-5),
    "counters are empty": (lambda folder: edit_weights(folder, count_in(torch.int64, (0,))), 1e-5),
}


@pytest.mark.xfail(raises=(ValueError, AssertionError), reason="checksums still refuse edited files")
@pytest.mark.filterwarnings("ignore::UserWarning")  # of PEFT, about the unknown key
@pytest.mark.parametrize("edit", EDITS)
def test_files_are_meant_to_be_edited(edit, saved, pixel_values):
    expected = answer(load_classifier(saved).model, pixel_values)
    change, tolerance = EDITS[edit]
    change(saved)
    for load in (
        lambda: load_classifier(saved).model,
        lambda: AutoPeftModel.from_pretrained(saved),
        lambda: PeftModel.from_pretrained(tiny_vit(), saved),
        lambda: AutoModelForImageClassification.from_pretrained(saved),
    ):
        model = load().eval()
        assert_same(answer(model, pixel_values), expected, tolerance)
        assert model.config.id2label[1] == ("hound" if "renamed" in edit else "dog")


@pytest.mark.xfail(raises=FileNotFoundError, reason="reading a config still asks for the weights")
@pytest.mark.parametrize("fields", [{}, PIXEL], ids=["latent", "pixel"])
def test_a_config_is_read_without_weights_and_is_the_recipe_of_another_adapter(fields, tmp_path):
    get_peft_model(tiny_vit(), tiny_config(**fields)).save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    config = PGNConfig.from_pretrained(tmp_path)
    model = get_peft_model(tiny_vit(), config)
    assert model.peft_config["default"].hidden_size == 32


def test_one_run_at_a_time_writes_to_an_output_folder(tmp_path):
    from train_image_classifier import writing_to

    with writing_to(str(tmp_path), False, True):
        second = writing_to(str(tmp_path), True, True)
        with pytest.raises(SystemExit, match="output_dir"):
            second.__enter__()
        with writing_to(str(tmp_path), False, False):  # another process of the same run
            pass
    (tmp_path / ".training.lock").touch()  # of a run that was killed
    with writing_to(str(tmp_path), False, True):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("subfolder", ["../other", "/other"])
def test_a_subfolder_lies_inside(subfolder, saved):
    shutil.copytree(saved, saved.parent / "other")
    with refused(ValueError, "subfolder"):
        load_classifier(saved, subfolder=subfolder)
