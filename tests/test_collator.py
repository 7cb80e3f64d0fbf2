"""The collator stacks good examples and finds bad ones."""

import pytest
import torch
from tiny_trainer import make_trainer, rows

from pgn_peft import ImageCollator


def examples(labels=(0, 1, 2), **replaced):
    made = [{"pixel_values": torch.randn(3, 8, 8), "labels": label} for label in labels]
    made[1] |= replaced
    return made


def test_images_and_classes_are_stacked():
    made = examples()
    batch = ImageCollator(num_labels=3, interpolate_pos_encoding=True)(made)
    assert set(batch) == {"pixel_values", "labels", "interpolate_pos_encoding"}
    assert torch.equal(batch["pixel_values"][1], made[1]["pixel_values"])
    assert batch["labels"].tolist() == [0, 1, 2]
    assert batch["labels"].dtype == torch.int64


def test_examples_without_labels_and_with_the_other_name():
    made = [{"pixel_values": torch.zeros(3, 8, 8)} for _ in range(2)]
    assert set(ImageCollator(num_labels=3)(made)) == {"pixel_values"}
    assert ImageCollator(num_labels=3)([row | {"label": 1} for row in made])["labels"].tolist() == [1, 1]


def test_regression_and_multi_label_targets_are_floats():
    for labels in ([0.5, 1.5, 2.5], [3, 7, 2], [[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [[1, 0], [0, 1], [1, 1]]):
        stacked = ImageCollator(num_labels=2 if isinstance(labels[0], list) else 1)(examples(labels))["labels"]
        assert torch.equal(stacked, torch.tensor(labels, dtype=torch.float32))
        assert stacked.dtype == torch.float32


def test_images_that_are_not_normalised_are_found():
    for value in (float("nan"), float("inf"), 255.0):
        with pytest.raises(ValueError, match=f"`pixel_values` are not normalised: the largest is {value:g}"):
            ImageCollator()(examples(pixel_values=torch.full((3, 8, 8), value)))


def test_a_class_that_the_head_does_not_have_is_found():
    for label in (3, -1):
        with pytest.raises(ValueError, match=rf"The head has the classes 0..2, but the labels are \[0, {label}, 2\]"):
            ImageCollator(num_labels=3)(examples(labels=[0, label, 2]))
        ImageCollator()(examples(labels=[0, label, 2]))  # without a head's size there is nothing to compare with


def test_a_label_that_is_no_number_is_found():
    for label in ("cat", {"name": "cat"}, None):
        with pytest.raises(TypeError, match="The labels .* are not all numbers.*label2id"):
            ImageCollator(num_labels=3)(examples((0, label, 1)))


def test_a_test_set_without_labels_is_predicted(tmp_path):
    """Data sets have -1 in place of labels that are not public."""
    trainer = make_trainer(tmp_path)
    expected = pytest.approx(trainer.predict(rows(6)).predictions, abs=1e-5)
    for unlabelled in (-1, torch.tensor(-1)):
        outcome = trainer.predict([row | {"labels": unlabelled} for row in rows(6)])
        assert outcome.label_ids is None
        assert outcome.predictions == expected
