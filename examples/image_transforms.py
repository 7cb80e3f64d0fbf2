"""How the images of `train_image_classifier.py` become `pixel_values`: augmentation, image processor, a cache between.

Everything here can be pickled, for the loader's workers on systems that start them afresh (macOS, Windows).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import DatasetDict, Features, Value
from image_folder import UprightImage
from torch import Tensor
from torchvision.transforms import v2

from pgn_peft.nn.images import to_pixels
from pgn_peft.nn.preprocessing import Preprocessing
from pgn_peft.version import __version__

AUGMENTATIONS = {
    "official": v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomSolarize(threshold=128, p=0.2),
        ]
    ),
    "flip": v2.RandomHorizontalFlip(),
    "none": v2.Identity(),
}
# Images in a piece while they are cached: 150 kB each at 224 px.
CACHED_AT_ONCE = 100
# Fewer are cached faster than processes start.
WORTH_SEVERAL_PROCESSES = 10_000


@dataclass(frozen=True)
class Transform:
    """Rows of images and labels to those of a batch.

    Args:
        processor: image processor of the model.
        augmentation: a key of `AUGMENTATIONS`.
        size: height and width of cached pixels; None: the images are encoded or decoded ones.
    """

    processor: Any
    augmentation: str = "none"
    size: tuple[int, int] | None = None

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, Any]:
        """Turn lists `image` (or `pixels`) and `label` into `pixel_values` (B, C, H, W), normalised, and `labels`."""
        augment: Callable = AUGMENTATIONS[self.augmentation]
        if self.size is None:
            images = [UprightImage().decode_example(row) for row in rows["image"]]
            pixel_values = self.processor(images=[augment(image) for image in images], return_tensors="pt")
        else:
            images = [augment(pixels_from_bytes(row, self.size)) for row in rows["pixels"]]
            # The processor's own arithmetic, so that nothing differs in the last bit.
            pixel_values = self.processor(images=images, do_resize=False, do_center_crop=False, return_tensors="pt")
        return {"pixel_values": pixel_values["pixel_values"], "labels": rows["label"]}


def pixels_from_bytes(row: bytes, size: tuple[int, int]) -> Tensor:
    """Read pixels (3, H, W) of 8 bits as the cache holds them."""
    return torch.frombuffer(bytearray(row), dtype=torch.uint8).view(3, *size)


def add_transforms(splits: dict[str, Any], processor: Any, augmentation: str) -> Transform:
    """Let each split turn its images into `pixel_values` as they are read, the training images augmented.

    Returns:
        The transform without augmentation.
    """
    cached = "pixels" in splits["train"].column_names
    size = Preprocessing.from_processor(processor).output_size if cached else None
    for split, rows in splits.items():
        rows.set_transform(Transform(processor, augmentation if split == "train" else "none", size))
    return Transform(processor, "none", size)


def cache_images(splits: DatasetDict, processor: Any, num_proc: int = 0) -> DatasetDict:
    """Decode, resize and crop all images once, and keep their pixels in an Arrow file of the `datasets` cache.

    The file is memory-mapped, and found again by later runs with the same images and the same size, crop and filter.

    Args:
        splits: with the columns `image` and `label`.
        processor: image processor of the model.
        num_proc: processes for large splits; 0: none but this one.

    Returns:
        Splits with the columns `pixels`, 8-bit (3, H, W) as bytes, and `label`.

    Raises:
        SystemExit: the processor does something else than resize, crop, rescale and normalise, or leaves images of
            different sizes.
    """
    try:
        steps = Preprocessing.from_processor(processor)
    except ValueError as error:
        raise SystemExit(f"`cache_images` must be false for this image processor, but got true. {error}") from error
    if steps.output_size is None:
        raise SystemExit(
            "`cache_images` must be false for an image processor that leaves images of different sizes, but got true. "
            "Use a processor with a height and a width, or with a centre crop."
        )
    # What pixels are normalised with makes no other pixels; another release of torch or of ours may.
    steps = dataclasses.replace(steps, image_mean=(), image_std=())
    cached = DatasetDict()
    for name, rows in splits.items():
        cached[name] = rows.map(
            _resize,
            batched=True,
            batch_size=CACHED_AT_ONCE,
            writer_batch_size=CACHED_AT_ONCE,
            remove_columns=["image"],
            features=Features({"pixels": Value("large_binary"), "label": rows.features["label"]}),
            fn_kwargs={"steps": steps, "versions": (torch.__version__, __version__)},
            with_rank=True,
            num_proc=num_proc if num_proc > 1 and len(rows) >= WORTH_SEVERAL_PROCESSES else None,
            desc=f"caching the images of {name}",
        )
        _check_first(rows, cached[name], processor, steps.output_size)
    return cached


def _resize(
    rows: dict[str, list[Any]], rank: int | None, steps: Preprocessing, versions: tuple[str, str]
) -> dict[str, list[Any]]:
    """`versions` is for the fingerprint only."""
    if rank is not None:
        torch.set_num_threads(1)  # in a forked process several can wait for each other for ever
    pixels = [steps.apply(to_pixels(image, 3)).contiguous().numpy().tobytes() for image in rows["image"]]
    return {"pixels": pixels, "label": rows["label"]}


def _check_first(rows, cached, processor: Any, size: tuple[int, int]) -> None:
    """Compare one image with what the processor makes of it: it may be of a kind that we have not seen."""
    wanted = Transform(processor)(rows[:1])["pixel_values"]
    if not torch.equal(Transform(processor, "none", size)(cached[:1])["pixel_values"], wanted):
        raise SystemExit(
            f"`cache_images` must be false for {type(processor).__name__}, but got true: it makes other pixels than "
            "our steps do. Leave the option out."
        )
