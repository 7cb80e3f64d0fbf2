"""`ImageCollator`: makes batches, and checks the values of images and labels.

Inside the model such checks would break a compiled graph. Here they run in the data loader's workers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Normalised images stay within +-3; pixels in 0..255 do not.
LARGEST_PLAUSIBLE_PIXEL = 50.0
UNLABELLED = -1  # stands for labels that are not public


@dataclass
class ImageCollator:
    """Stack examples into a batch for an image classifier.

    Args:
        num_labels: size of the head, against which labels are checked; None: no check.
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
            `pixel_values` (B, C, H, W) and, if the examples have them, `labels`: (B,) int64, or float32 (B,) or
            (B, n).

        Raises:
            TypeError: a label is not a number.
            ValueError: images hold NaN, infinity or pixels in 0..255, or a class is out of range.
        """
        images = torch.stack([torch.as_tensor(example["pixel_values"]) for example in examples])
        largest = images.abs().max().item()
        if not largest <= LARGEST_PLAUSIBLE_PIXEL:  # also False for NaN
            raise ValueError(
                f"The `pixel_values` are not normalised: the largest is {largest:g}. Run the image processor on "
                "images in 0..255; NaN comes from damaged images or transforms."
            )
        batch: dict[str, Any] = {"pixel_values": images}
        labels = [example.get("labels", example.get("label")) for example in examples]
        if any(label is not None for label in labels):
            try:
                stacked = torch.stack([torch.as_tensor(label) for label in labels])
            except (TypeError, ValueError, RuntimeError) as error:
                raise TypeError(
                    f"The labels {labels} are not all numbers. Use the number of the class, "
                    "model.config.label2id[name], and drop examples without a label."
                ) from error
            if stacked.ndim > 1 or stacked.is_floating_point() or self.num_labels == 1:
                batch["labels"] = stacked.float()  # several labels each, or a regression
            elif not bool((stacked == UNLABELLED).all()):
                # On a GPU torch would only say that an assertion failed.
                if self.num_labels is not None and not bool(((stacked >= 0) & (stacked < self.num_labels)).all()):
                    raise ValueError(
                        f"The head has the classes 0..{self.num_labels - 1}, but the labels are {stacked.tolist()}. "
                        "Make an adapter for the classes of the data set: PGNConfig(id2label=...)."
                    )
                batch["labels"] = stacked.long()
        if self.interpolate_pos_encoding:
            batch["interpolate_pos_encoding"] = True
        return batch
