"""The benchmark's choice of few training images, and the far domains that it makes."""

import random

import bench
import far_domains
import numpy as np
import pytest
import torch
from scipy import ndimage


def test_few_images_of_each_class_are_chosen_by_the_seed():
    labels = torch.tensor([2] * 9 + [0] * 5 + [1] * 2)
    few = bench.few_of_each_class(labels, 3, seed=0)
    assert labels[few].bincount().tolist() == [3, 2, 3]  # all there are of class 1
    assert len(few.unique()) == 8
    assert torch.equal(few, bench.few_of_each_class(labels, 3, seed=0))
    assert not torch.equal(few.sort()[0], bench.few_of_each_class(labels, 3, seed=1).sort()[0])
    assert labels[few].tolist() != sorted(labels[few].tolist())  # in random order


@pytest.mark.parametrize("number", [1, 8])
def test_as_many_shapes_are_drawn_as_the_class_says(number):
    for seed in range(20):
        image = np.asarray(far_domains.draw_shapes(number, random.Random(seed))).astype(int)
        assert ndimage.label(np.ptp(image, axis=2) > 0)[1] == number  # the background is grey


def test_shuffled_blocks_are_the_same_pixels_elsewhere_in_the_same_order_for_all_images():
    pixels = torch.arange(2 * 3 * 16 * 16).view(2, 3, 16, 16)
    shuffled = far_domains.shuffle_blocks(pixels)
    assert not torch.equal(shuffled, pixels)
    assert torch.equal(shuffled.flatten().sort()[0], pixels.flatten())
    assert torch.equal(shuffled[1, 2] - shuffled[0, 0], torch.full((16, 16), int(pixels[1, 2, 0, 0])))
    assert torch.equal(shuffled[0, 0, :2, :2].flatten() - shuffled[0, 0, 0, 0], torch.tensor([0, 1, 16, 17]))
