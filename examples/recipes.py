"""The twelve data sets of the paper, as `--dataset NAME` of the scripts: where they are and which columns they have.

Measured with `benchmarks/adaptation.py` on small subsets of them: EuroSAT and CIFAR-100. The others have not been run:
ids, columns and class counts were read off their pages. A local folder of the same name takes precedence.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """A data set, and how its classes are put into words.

    Args:
        dataset: id on the Hub.
        num_classes: number of classes.
        prompt: sentence with a class name in the braces, for models with a text tower (CLIP).
        configuration: of the data set; None: its only one.
        image_column: column with the images.
        label_column: column with the classes.
        note: what is particular about it.
    """

    dataset: str
    num_classes: int
    prompt: str = "a photo of a {}."
    configuration: str | None = None
    image_column: str = "image"
    label_column: str = "label"
    note: str = ""


RECIPES = {
    "cifar100": Recipe("uoft-cs/cifar100", 100, image_column="img", label_column="fine_label"),
    "cifar10": Recipe("uoft-cs/cifar10", 10, image_column="img"),
    "flowers102": Recipe("dpdl-benchmark/oxford_flowers102", 102, "a photo of a {}, a type of flower."),
    "food101": Recipe("ethz/food101", 101, "a photo of {}, a type of food.", note="no test: validation is the rest"),
    "eurosat": Recipe("tanganke/eurosat", 10, "a satellite photo of {}."),
    "sun397": Recipe("tanganke/sun397", 397, "a photo of a {}, a type of scene."),
    "ucf101": Recipe("flwrlabs/ucf101", 101, "a photo of a person doing {}.", note="every frame of each video"),
    "svhn": Recipe("ufldl-stanford/svhn", 10, 'a photo of the number "{}".', configuration="cropped_digits"),
    "oxford_pets": Recipe("timm/oxford-iiit-pet", 37, "a photo of a {}, a type of pet."),
    "dtd": Recipe("tanganke/dtd", 47, "a photo of a {} texture."),
    "resisc45": Recipe("tanganke/resisc45", 45, "a satellite photo of {}."),
    "clevr_count": Recipe(
        "clip-benchmark/wds_vtab-clevr_count_all", 8, "a photo of {} objects.", image_column="webp", label_column="cls"
    ),
}
