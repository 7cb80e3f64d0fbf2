"""`ImageCollator`: makes batches, and checks the values of images and labels.

Inside the model such checks would break the compiled graph; here they run in the loader's workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Normalised images stay within +-3; pixels in 0..255 do not.
LARGEST_PLAUSIBLE_PIXEL = 50.0
UNLABELLED = -1  # what data sets have in place of a class that is not public


@dataclass
class ImageCollator:
    """Stack examples into a batch for an image classifier.

    Args:
        num_labels: size of the head; checked against the labels where given.
        interpolate_pos_encoding: also pass `interpolate_pos_encoding=True` to the model, for images of another size
            than the backbone's own.
    """

    num_labels: int | None = None
    interpolate_pos_encoding: bool = False

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Make a batch.

        Args:
            examples: each with `pixel_values` (C, H, W), floating point and normalised, and optionally `labels` or
                `label`: a class index, a number (regression) or n numbers (multi-label). A class of -1 in all
                examples means that there are no labels.

        Returns:
            `pixel_values` (B, C, H, W) and, where the examples have them, `labels`: (B,) int64, or float32 (B,) or
            (B, n).

        Raises:
            TypeError: a label is not a number.
            ValueError: images hold NaN, infinity or pixels in 0..255, or a class is out of range.
        """
        images = [torch.as_tensor(example["pixel_values"]) for example in examples]
        for index, image in enumerate(images):
            largest = image.abs().max().item()
            if not largest <= LARGEST_PLAUSIBLE_PIXEL:  # also False for NaN
                raise ValueError(
                    f"The `pixel_values` of example {index} are not normalised: the largest is {largest:g}. Run the "
                    "image processor on images in 0..255; NaN comes from damaged images or transforms."
                )
        batch: dict[str, Any] = {"pixel_values": torch.stack(images)}
        labels = [example.get("labels", example.get("label")) for example in examples]
        if any(label is not None for label in labels):
            stacked = torch.stack([_read_label(index, label) for index, label in enumerate(labels)])
            if stacked.ndim > 1 or stacked.is_floating_point() or self.num_labels == 1:
                batch["labels"] = stacked.float()  # several labels each, or a regression
            elif not bool((stacked == UNLABELLED).all()):
                batch["labels"] = self._check_classes(stacked).long()
        if self.interpolate_pos_encoding:
            batch["interpolate_pos_encoding"] = True
        return batch

    def _check_classes(self, labels: Tensor) -> Tensor:
        """Refuse classes that the head does not have: a GPU would only say that an assertion failed."""
        num_labels = self.num_labels
        if num_labels is not None and not bool(((labels >= 0) & (labels < num_labels)).all()):
            raise ValueError(
                f"The head has the classes 0..{num_labels - 1}, but the labels are {labels.tolist()}. Make an adapter "
                "for the classes of the data set: PGNConfig(id2label=...)."
            )
        return labels


def _read_label(index: int, label: Any) -> Tensor:
    try:
        return torch.as_tensor(label)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"The label {label!r} of example {index} is not a number. Use the number of the class, "
            "model.config.label2id[name], and drop examples without a label."
        ) from error
