"""Class labels: validation of `id2label`, and the labels in a model's config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")


def normalize_id2label(id2label: Mapping[Any, Any]) -> dict[int, str]:
    """Return `id2label` in order with integer keys, which JSON turns into strings.

    Args:
        id2label: class index to name; keys 0..n-1 as integers or their decimal strings, in any order.

    Returns:
        The same labels, keyed by the integers 0..n-1 in ascending order.

    Raises:
        TypeError: `id2label` is not a dictionary, or a name is not a string.
        ValueError: `id2label` is empty, its keys are not exactly 0..n-1, or a name cannot be encoded as UTF-8.
    """
    if not isinstance(id2label, Mapping) or not all(isinstance(name, str) for name in id2label.values()):
        raise TypeError(f"`id2label` is {id2label!r}. Write a dictionary of names: id2label=dict(enumerate(names)).")
    labels = {int(key): name for key, name in id2label.items() if str(key).isdecimal()}
    if not labels or len(labels) != len(id2label) or sorted(labels) != list(range(len(labels))):
        raise ValueError(f"`id2label` has the keys {list(id2label)!r}, not 0 to n-1. Number the classes from 0.")
    for name in labels.values():
        name.encode()  # names of folders, and hence of classes, can hold invalid characters: fail before training
    return dict(sorted(labels.items()))


def number_labels(num_labels: int) -> dict[int, str]:
    """Name classes by their number, as Transformers does."""
    return {index: f"LABEL_{index}" for index in range(num_labels)}


@dataclass(frozen=True)
class Labels:
    """The labels of a classification head: names by class index, and Transformers' `problem_type`."""

    id2label: dict[int, str]
    problem_type: str | None = None

    @classmethod
    def of(cls, model_config: Any) -> Labels | None:
        """Read the labels in `model_config`, a `PretrainedConfig`; None for anything else."""
        id2label = getattr(model_config, "id2label", None)
        if id2label is None:
            return None
        # Names can be numbers there. An empty dictionary means no labels: a backbone for features.
        id2label = normalize_id2label({key: str(name) for key, name in id2label.items()}) if id2label else {}
        return cls(id2label, getattr(model_config, "problem_type", None))

    def show_in(self, model_config: Any) -> None:
        """Write these labels into `model_config`: `id2label`, `label2id`, hence `num_labels`, and `problem_type`."""
        model_config.id2label = dict(self.id2label)
        model_config.label2id = {name: index for index, name in self.id2label.items()}
        model_config.problem_type = self.problem_type
