"""Class labels: how they are written down, and which of them a model's config shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def normalize_id2label(id2label: Mapping[Any, Any]) -> dict[int, str]:
    """Return `id2label` with the integer keys that JSON turns into strings, in order.

    Args:
        id2label: class index to name; keys 0..n-1 as integers or their decimal strings, in any order.

    Returns:
        The same labels, keyed by the integers 0..n-1 in ascending order.

    Raises:
        TypeError: it is not a mapping, a key is no integer, or a name is no string.
        ValueError: it is empty, or the keys are not exactly 0..n-1.
    """
    if not isinstance(id2label, Mapping):
        raise TypeError(
            f"`id2label` must be a dictionary of class index to name, but got {id2label!r}. "
            "Write id2label=dict(enumerate(names))."
        )
    if not id2label:
        raise ValueError("`id2label` must name a class at least, but got {}. Leave it out to keep the model's labels.")
    labels: dict[int, str] = {}
    for key, name in id2label.items():
        if not isinstance(name, str):
            raise TypeError(f"`id2label` must hold strings, but got {name!r} for class {key!r}. Use str(name).")
        if not name.isascii():
            _check_encodable(name)
        try:
            index = int(key)
        except (TypeError, ValueError):
            index = None
        if index is None or isinstance(key, (bool, float)):
            raise TypeError(f"`id2label` must have integer keys, but got {key!r}. Write dict(enumerate(names)).")
        labels[index] = name
    if len(labels) != len(id2label) or sorted(labels) != list(range(len(labels))):
        raise ValueError(
            f"`id2label` must have the keys 0 to n-1, each once, but got {list(id2label)!r}. "
            "Number the classes as the data set's labels do."
        )
    return dict(sorted(labels.items()))


def _check_encodable(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        # Python reads the names of files, and so of classes, into such text where their encoding is another.
        raise ValueError(
            f"`id2label` must hold text that can be written to a file, but got {name!r}: {error}. Rename the class."
        ) from error


@dataclass(frozen=True)
class Labels:
    """What a classification head answers with: names by class index, and Transformers' `problem_type`."""

    id2label: dict[int, str]
    problem_type: str | None = None

    @classmethod
    def of(cls, model_config: Any) -> Labels | None:
        """Read the labels that `model_config` (a `PretrainedConfig`) shows; None where it is not one."""
        id2label = getattr(model_config, "id2label", None)
        if id2label is None:
            return None
        # Transformers writes no labels as {}: a backbone for features.
        return cls(normalize_id2label(id2label) if id2label else {}, getattr(model_config, "problem_type", None))

    def show_in(self, model_config: Any) -> None:
        """Make `model_config` show these labels: `id2label`, `label2id`, hence `num_labels`, and `problem_type`."""
        model_config.id2label = dict(self.id2label)
        model_config.label2id = {name: index for index, name in self.id2label.items()}
        model_config.problem_type = self.problem_type


def frequency_mapping(
    logits: Tensor, labels: Tensor, num_labels: int, id2label: Mapping[int, str] | None = None
) -> list[int]:
    """Find which of a model's classes can stand for each of a task's, by how often it answers with them.

    The pair of task class and model class that occurs most often is fixed first, then the next of those that are left;
    where counts are equal, the mean probability decides. It is one to one.

    Args:
        logits: (N, M) the unmodified model's answers to training images.
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
