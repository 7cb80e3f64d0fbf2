"""Real weights and real images, where the machine has them."""

import pytest
import torch
from conftest import answer, assert_nearly_equal, move_adapter
from datasets import load_dataset
from peft import AutoPeftModel, get_peft_model
from transformers import AutoImageProcessor, ViTForImageClassification, pipeline

from pgn_peft import PGNConfig

pytestmark = pytest.mark.shared


@pytest.fixture(scope="module")
def eurosat(shared):
    return load_dataset("parquet", data_files=str(shared / "data/eurosat/validation.parquet"), split="train[:24]")


@pytest.fixture(scope="module")
def deit(shared):
    return shared / "models/deit-tiny-patch16-224"


def test_a_1000_label_checkpoint_becomes_a_10_label_classifier_and_back(deit, eurosat, tmp_path):
    processor = AutoImageProcessor.from_pretrained(deit)
    images = processor(images=eurosat["image"][:4], return_tensors="pt")["pixel_values"]
    base = ViTForImageClassification.from_pretrained(deit)
    before = answer(base, images)
    labels = dict(enumerate(eurosat.features["label"].names))
    model = get_peft_model(base, PGNConfig(id2label=labels, library_size=256))
    trainable, _ = model.get_nb_trainable_parameters()
    # The official size for width 768, with a library of DeiT-Tiny's width, and the head.
    assert trainable == 1_032_304 - 256 * (768 - 192) + 16 * 192 + 10 * 193
    move_adapter(model).eval()
    expected = answer(model, images)
    assert expected.shape == (4, 10)
    with model.disable_adapter():
        assert torch.equal(answer(model, images), before)
        assert len(model.config.id2label) == 1000
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = AutoPeftModel.from_pretrained(tmp_path)
    assert_nearly_equal(answer(loaded, images), expected)
    assert torch.equal(answer(model.unload(), images), before)

    classify = pipeline("image-classification", model=str(tmp_path), image_processor=str(tmp_path))
    answers = classify(eurosat["image"][0], top_k=10)
    assert {entry["label"] for entry in answers} == set(labels.values())
    assert answers[0]["label"] == labels[expected[0].argmax().item()]


def test_a_few_steps_lower_the_loss_at_112_pixels(deit, eurosat):
    torch.manual_seed(0)
    processor = AutoImageProcessor.from_pretrained(deit, size={"height": 112, "width": 112})
    images = processor(images=list(eurosat["image"]), return_tensors="pt")["pixel_values"]
    targets = torch.tensor(eurosat["label"])
    model = get_peft_model(
        ViTForImageClassification.from_pretrained(deit), PGNConfig(num_labels=10, library_size=64)
    ).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(8):
        loss = model(images, labels=targets, interpolate_pos_encoding=True).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
