"""The benchmark's choice of few training images."""

import bench
import torch


def test_few_images_of_each_class_are_chosen_by_the_seed():
    labels = torch.tensor([2] * 9 + [0] * 5 + [1] * 2)
    few = bench.few_of_each_class(labels, 3, seed=0)
    assert labels[few].bincount().tolist() == [3, 2, 3]  # all there are of class 1
    assert len(few.unique()) == 8
    assert torch.equal(few, bench.few_of_each_class(labels, 3, seed=0))
    assert not torch.equal(few.sort()[0], bench.few_of_each_class(labels, 3, seed=1).sort()[0])
    assert labels[few].tolist() != sorted(labels[few].tolist())  # in random order
