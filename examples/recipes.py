"""The twelve data sets of the paper, as `--dataset NAME` of the scripts: where they are and which columns they have.

Measured with `benchmarks/adaptation.py` on small subsets of them: EuroSAT and CIFAR-100. The others have not been run:
ids, columns and class counts were read off their pages. A local folder of the same name takes precedence.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """A data set on the Hub, and its columns.

    Args:
        dataset: id on the Hub.
        configuration: of the data set; None: its only one.
        image_column: column with the images.
        label_column: column with the classes.
    """

    dataset: str
    configuration: str | None = None
    image_column: str = "image"
    label_column: str = "label"


RECIPES = {
    "cifar100": Recipe("uoft-cs/cifar100", image_column="img", label_column="fine_label"),
    "cifar10": Recipe("uoft-cs/cifar10", image_column="img"),
    "flowers102": Recipe("dpdl-benchmark/oxford_flowers102"),
    "food101": Recipe("ethz/food101"),
    "eurosat": Recipe("tanganke/eurosat"),
    "sun397": Recipe("tanganke/sun397"),
    "ucf101": Recipe("flwrlabs/ucf101"),
    "svhn": Recipe("ufldl-stanford/svhn", configuration="cropped_digits"),
    "oxford_pets": Recipe("timm/oxford-iiit-pet"),
    "dtd": Recipe("tanganke/dtd"),
    "resisc45": Recipe("tanganke/resisc45"),
    "clevr_count": Recipe("clip-benchmark/wds_vtab-clevr_count_all", image_column="webp", label_column="cls"),
}
