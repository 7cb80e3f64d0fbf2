"""The collator stacks good examples and finds bad ones."""

import numpy as np
import pytest
import torch
from tiny_trainer import make_trainer, rows

from pgn_peft import ImageCollator


def examples(labels=(0, 1, 2), **replaced):
    rows = [{"pixel_values": torch.randn(3, 8, 8), "labels": label} for label in labels]
    rows[1] |= replaced
    return rows


def test_images_and_labels_are_stacked():
    rows = examples()
    batch = ImageCollator(num_labels=3)(rows)
    assert set(batch) == {"pixel_values", "labels"}
    assert torch.equal(batch["pixel_values"][1], rows[1]["pixel_values"])
    assert batch["labels"].tolist() == [0, 1, 2]
    assert batch["labels"].dtype == torch.int64


def test_interpolation_is_asked_for():
    assert ImageCollator(interpolate_pos_encoding=True)(examples())["interpolate_pos_encoding"] is True


def test_examples_without_labels_and_with_the_other_name():
    rows = [{"pixel_values": torch.zeros(3, 8, 8)} for _ in range(2)]
    assert set(ImageCollator(num_labels=3)(rows)) == {"pixel_values"}
    rows = [row | {"label": 1} for row in rows]
    assert ImageCollator(num_labels=3)(rows)["labels"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("labels", "shape"), [((0.5, 1.5, 2.5), (3,)), (([1.0, 0.0], [0.0, 1.0], [1.0, 1.0]), (3, 2))]
)
def test_regression_and_multi_label_targets_stay_floats(labels, shape):
    stacked = ImageCollator(num_labels=shape[1] if len(shape) > 1 else 1)(examples(labels))["labels"]
    assert stacked.dtype == torch.float32
    assert stacked.shape == shape
    assert stacked.tolist() == [list(label) if isinstance(label, list) else label for label in labels]


@pytest.mark.parametrize(
    ("replaced", "error", "message"),
    [
        ({"pixel_values": torch.full((3, 8, 8), float("nan"))}, ValueError, "finite, but got NaN.*example 1"),
        ({"pixel_values": torch.full((3, 8, 8), float("inf"))}, ValueError, "finite, but got NaN or inf.*example 1"),
        ({"pixel_values": torch.zeros(3, 8, 8, dtype=torch.uint8)}, TypeError, "torch.uint8 in example 1"),
        ({"pixel_values": torch.full((3, 8, 8), 255.0)}, ValueError, "normalised, but got 255 in example 1"),
        ({"pixel_values": torch.zeros(1, 8, 8)}, ValueError, r"got \(1, 8, 8\) in example 1 beside \(3, 8, 8\)"),
        ({"pixel_values": torch.zeros(1, 3, 8, 8)}, ValueError, r"\(C, H, W\), but got \(1, 3, 8, 8\) in example 1"),
        (
            {"pixel_values": None},
            TypeError,
            "tensor in every example, but got None in example 1.*pixel_values, labels",
        ),
        ({"pixel_values": "a.jpg"}, TypeError, "tensor in every example, but got 'a.jpg' in example 1"),
    ],
)
def test_bad_images_are_found(replaced, error, message):
    with pytest.raises(error, match="`pixel_values` must .*" + message):
        ImageCollator()(examples(**replaced))


def test_a_test_set_without_labels_is_predicted(tmp_path):
    """Data sets have -1 in place of labels that are not public."""
    trainer = make_trainer(tmp_path)
    outcome = trainer.predict([row | {"labels": -1} for row in rows(6)])
    assert outcome.predictions.shape == (6, 2)
    assert outcome.label_ids is None
    assert outcome.predictions == pytest.approx(trainer.predict(rows(6)).predictions, abs=1e-5)


@pytest.mark.parametrize("label", [3, -1])
def test_a_label_outside_the_head_is_found(label):
    with pytest.raises(ValueError, match=rf"`labels` must lie in 0..2, the range of the head, but got \[{label}\]"):
        ImageCollator(num_labels=3)(examples(labels=[0, label, 2]))
    ImageCollator()(examples(labels=[0, label, 2]))  # without a head's size there is nothing to compare with


def test_a_target_that_is_not_a_number_is_found():
    with pytest.raises(ValueError, match="`labels` must be finite, but got"):
        ImageCollator()(examples(labels=[0.5, float("nan"), 1.0]))


def test_integer_targets_of_several_labels_or_of_a_regression_become_floats():
    for number, labels in ((2, [[1, 0], [0, 1], [1, 1]]), (1, [3, 7, 2])):
        stacked = ImageCollator(num_labels=number)(examples(labels))["labels"]
        assert torch.equal(stacked, torch.tensor(labels, dtype=torch.float32))


def test_a_target_with_another_number_of_labels_is_found():
    with pytest.raises(ValueError, match=r"`labels` must have 3 numbers each, the size of the head, but got \(2,\)"):
        ImageCollator(num_labels=3)(examples([[1, 0], [0, 1], [1, 1]]))


@pytest.mark.parametrize("labels", [(None, 1, 2), (0, None, 2)])
def test_a_missing_label_among_others_is_found(labels):
    with pytest.raises(
        ValueError, match=f"`labels` must be there for all .* got None in example {labels.index(None)}"
    ):
        ImageCollator()(examples(labels))


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ((0, 2.0, 1), TypeError, "class indices, integers, for a head of 3 labels, but got 2.0 in example 1"),
        ((0.5, 0.5, 0.5), TypeError, "class indices, integers, for a head of 3 labels, but got 0.5 in example 0"),
        ((0, "cat", 1), TypeError, "numbers, but got 'cat' in example 1.*label2id"),
        (({"name": "cat"}, 0, 1), TypeError, "numbers, but got {'name': 'cat'} in example 0"),
        (([1, 0, 0], [1, 0], [0, 0, 1]), ValueError, r"one shape, but got \[1, 0\] in example 1 beside \[1, 0, 0\]"),
        ((np.array([1, 0, 0]), None, np.array([0, 0, 1])), ValueError, "for all .* got None in example 1"),
    ],
)
def test_what_is_no_label_of_the_head_is_found(labels, error, message):
    with pytest.raises(error, match="`labels` must .*" + message):
        ImageCollator(num_labels=3)(examples(labels))
