"""Real weights and real images, where the machine has them."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import answer, assert_same, move_adapter
from datasets import load_dataset
from peft import AutoPeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoImageProcessor, CLIPVisionModelWithProjection, ViTForImageClassification, pipeline

from pgn_peft import PGNConfig, use_texts

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
    model = get_peft_model(base, PGNConfig(id2label=labels, library_size=256, prompt_depth=1))
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
    assert_same(answer(loaded, images), expected)
    assert torch.equal(answer(model.unload(), images), before)

    classify = pipeline("image-classification", model=str(tmp_path), image_processor=str(tmp_path))
    answers = classify(eurosat["image"][0], top_k=10)
    assert {entry["label"] for entry in answers} == set(labels.values())
    assert answers[0]["label"] == labels[expected[0].argmax().item()]


@pytest.mark.slow
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


@pytest.mark.slow
def test_clips_texts_classify_real_images(shared, tmp_path):
    """CLIP ViT-B/16 with int8-rounded weights at 112 px; on all validation images it has 0.434."""
    unpack = [sys.executable, str(shared / "tools/unpack_models.py"), str(tmp_path), "clip-vit-base-patch16-vision"]
    subprocess.run(unpack, check=True)
    folder = tmp_path / "clip-vit-base-patch16-vision"
    rows = load_dataset("parquet", data_files=str(shared / "data/tinyimagenet50/validation.parquet"), split="train")
    rows = rows.shuffle(seed=0).select(range(40))
    classes = json.loads((shared / "data/tinyimagenet50/classes.json").read_text(encoding="utf-8"))["imagenet_index"]
    texts = load_file(folder / "imagenet1k_text_embeds.safetensors")["a_photo_of_a"][classes].float()
    processor = AutoImageProcessor.from_pretrained(
        folder, size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112}
    )
    images = processor(images=[image.convert("RGB") for image in rows["image"]], return_tensors="pt")["pixel_values"]
    tower = CLIPVisionModelWithProjection.from_pretrained(folder)
    with torch.no_grad():
        embeds = tower(images, interpolate_pos_encoding=True).image_embeds
    expected = 100 * torch.nn.functional.normalize(embeds, dim=-1) @ texts.mT
    labels = dict(enumerate(rows.features["label"].names))
    model = get_peft_model(tower, PGNConfig(head="text", id2label=labels)).eval()
    use_texts(model, texts)
    with model.disable_adapter(), torch.no_grad():
        found = model(pixel_values=images, interpolate_pos_encoding=True).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert 0.25 < (found.argmax(-1) == torch.tensor(rows["label"])).float().mean() < 0.65
