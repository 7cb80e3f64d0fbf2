"""`ImageCollator`: makes batches, and checks the values of images and labels.

Inside the model such checks would break the compiled graph; here they run in the loader's workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Normalised images stay within +-3; pixels in 0..255 do not.
LARGEST_PLAUSIBLE_PIXEL = 50.0


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
                `label`: a class index, a number (regression) or n numbers (multi-label), for all examples or none. A
                class of -1 in all of them is none.

        Returns:
            `pixel_values` (B, C, H, W) and, where the examples have them, `labels`: (B,) int64, or float32 (B,) or
            (B, n).

        Raises:
            TypeError: an image is not there or not a floating-point tensor, or a label is not a number, or not an
                integer where the head has several classes.
            ValueError: images differ in shape, hold NaN, infinity or pixels in 0..255, or a label is out of range.
        """
        for index, example in enumerate(examples):
            if not isinstance(example.get("pixel_values"), (Tensor, np.ndarray, list)):
                raise TypeError(
                    f"`pixel_values` must be a tensor in every example, but got {example.get('pixel_values')!r} in "
                    f"example {index}, which has the keys {', '.join(example)}. Run the image processor on it."
                )
        images = [torch.as_tensor(example["pixel_values"]) for example in examples]
        for index, image in enumerate(images):
            _check_image(index, image, images[0])
        batch: dict[str, Any] = {"pixel_values": torch.stack(images)}
        labels = [example.get("labels", example.get("label")) for example in examples]
        if any(label is not None and not _is_unlabelled(label) for label in labels):
            batch["labels"] = self._stack_labels(labels)
        if self.interpolate_pos_encoding:
            batch["interpolate_pos_encoding"] = True
        return batch

    def _stack_labels(self, labels: list[Any]) -> Tensor:
        tensors = [_read_label(index, label) for index, label in enumerate(labels)]
        for index, tensor in enumerate(tensors):
            if tensor.shape != tensors[0].shape:
                raise ValueError(
                    f"`labels` must all have one shape, but got {labels[index]!r} in example {index} beside "
                    f"{labels[0]!r}. Give one class each, or one number for each label."
                )
            if tensor.ndim == 0 and tensor.is_floating_point() and (self.num_labels or 1) > 1:
                raise TypeError(
                    f"`labels` must be class indices, integers, for a head of {self.num_labels} labels, but got "
                    f"{tensor.item()!r} in example {index}. Convert it with int(label), or give {self.num_labels} "
                    "numbers each if an image can have several labels."
                )
        stacked = torch.stack(tensors)
        if not torch.isfinite(stacked).all():
            raise ValueError(f"`labels` must be finite, but got {stacked.tolist()}. Drop those examples.")
        if stacked.ndim > 1:  # one number for each label: multi-label or regression
            if self.num_labels is not None and stacked.shape[1:] != (self.num_labels,):
                raise ValueError(
                    f"`labels` must have {self.num_labels} numbers each, the size of the head, but got "
                    f"{tuple(stacked.shape[1:])}. Give one for each of the adapter's labels."
                )
            return stacked.float()
        if stacked.is_floating_point() or self.num_labels == 1:
            return stacked.float()
        if self.num_labels is not None:
            outside = [int(label) for label in stacked if not 0 <= label < self.num_labels]
            if outside:
                raise ValueError(
                    f"`labels` must lie in 0..{self.num_labels - 1}, the range of the head, but got {outside}. "
                    "The data set has other labels than the adapter; make one with PGNConfig(id2label=...) of these."
                )
        return stacked.long()


def _is_unlabelled(label: Any) -> bool:
    """Whether a label is -1, which data sets have in place of a class where it is not public."""
    return isinstance(label, Integral) and label == -1


def _read_label(index: int, label: Any) -> Tensor:
    if label is None:
        raise ValueError(
            f"`labels` must be there for all examples of a batch or for none, but got None in example {index}. Drop "
            "examples without a label."
        )
    try:
        return torch.as_tensor(label)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"`labels` must be numbers, but got {label!r} in example {index}. Give the number of the class, "
            "model.config.label2id[name], instead of its name."
        ) from error


def _check_image(index: int, image: Tensor, first: Tensor) -> None:
    if not image.is_floating_point():
        raise TypeError(
            f"`pixel_values` must be normalised floating-point images, but got {image.dtype} in example {index}. Run "
            "the image processor on it."
        )
    if image.ndim != 3:
        raise ValueError(
            f"`pixel_values` must have the axes (C, H, W), but got {tuple(image.shape)} in example {index}. Take the "
            "batch axis off: processor(...)['pixel_values'][0]."
        )
    if image.shape != first.shape:
        raise ValueError(
            f"`pixel_values` must all have one shape (C, H, W), but got {tuple(image.shape)} in example {index} "
            f"beside {tuple(first.shape)}. Resize the images and convert them to the same number of channels."
        )
    if not torch.isfinite(image).all():
        raise ValueError(
            f"`pixel_values` must be finite, but got NaN or infinity in example {index} of the batch. Look at the "
            "image and at the transforms; a division by a standard deviation of zero does this."
        )
    if image.abs().max() > LARGEST_PLAUSIBLE_PIXEL:
        raise ValueError(
            f"`pixel_values` must be normalised, but got {image.abs().max():g} in example {index}, which looks like "
            "pixels in 0..255. Run the image processor on it."
        )
