"""A mapping from a task's classes to a model's own classes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def frequency_mapping(
    logits: Tensor, labels: Tensor, num_labels: int, id2label: Mapping[int, str] | None = None
) -> list[int]:
    """Map each of a task's classes to a class of the model, by how often the model predicts it.

    The most frequent pair of task class and model class is fixed first, then the next of the remaining ones; where
    counts are equal, the mean probability decides. The mapping is one to one.

    Args:
        logits: (N, M), of the unmodified model for training images.
        labels: (N,) the images' classes, 0..`num_labels`-1.
        num_labels: number of the task's classes, at most M.
        id2label: the model's labels. Classes whose name another class has too are left out then, because a server
            answers with names (in ImageNet "crane" is a bird and a machine).

    Returns:
        For each of the task's classes the index of the model's, all different: `PGNConfig(label_mapping=...)`.

    Raises:
        ValueError: the model has fewer classes than the task, a label is out of range, or a class has no images.

    Source: the frequency-based mapping of visual prompting (Tsai et al. 2020; Chen et al. 2022).
    """
    names = [] if id2label is None else [id2label[index] for index in range(len(id2label))]
    usable = torch.tensor([names.count(names[i]) < 2 if names else True for i in range(logits.shape[1])])
    if num_labels > int(usable.sum()):
        raise ValueError(
            f"`num_labels` must be at most {int(usable.sum())}, the number of the model's classes with names of their "
            f"own, but got {num_labels}. Use a model with more classes, or head='trained'."
        )
    counted = torch.bincount(labels, minlength=num_labels) if labels.numel() and labels.min() >= 0 else None
    if counted is None or len(counted) > num_labels or not bool((counted > 0).all()):
        raise ValueError(
            f"`labels` must hold each of the classes 0..{num_labels - 1}, but got {sorted(set(labels.tolist()))}. "
            "Give training images of every class."
        )
    votes = torch.zeros(num_labels, logits.shape[1], dtype=torch.float64)
    votes.index_put_((labels, logits.argmax(dim=1)), torch.ones(len(labels), dtype=torch.float64), accumulate=True)
    probability = logits.double().softmax(dim=1)
    votes += torch.stack([probability[labels == label].mean(dim=0) for label in range(num_labels)])
    votes[:, ~usable] = -1.0
    mapping = [0] * num_labels
    for _ in range(num_labels):
        label, server_class = divmod(int(votes.argmax()), votes.shape[1])
        mapping[label] = server_class
        votes[label] = -2.0
        votes[:, server_class] = -2.0
    return mapping
