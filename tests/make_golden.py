"""Make tests/golden: adapters as the version that made them saves them, and what they answer.

    python tests/make_golden.py

It was run with pgn_peft 0.1.0. Run it again only to add an adapter under a new name: those that are there stay as they
are, because they stand for adapters that people have.
"""

from pathlib import Path

import torch
from conftest import move_adapter, tiny_config, tiny_vit
from peft import get_peft_model
from safetensors.torch import save_file
from transformers import ViTForImageClassification

GOLDEN = Path(__file__).parent / "golden"
PIXEL = {
    "prompt_space": "pixel",
    "num_virtual_tokens": None,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
}
# name -> fields of the adapter, under the names that the version had which saved it
ADAPTERS = {
    "generated": {"id2label": {0: "cat", 1: "dog", 2: "owl"}},
    "every_layer": {"prompt_depth": None, "slot_prompts": True, "num_labels": 2},
    "static": {"generator": "static", "num_labels": 2},
    "factorised": {"generator_rank": 2, "generator_norm": "group", "num_labels": 2},
    "additive": PIXEL | {"num_labels": 2},
    "tile": PIXEL
    | {"generator": "static", "head": "frozen", "label_mapping": [3, 1], "id2label": {0: "wet", 1: "dry"}},
}


def golden_images():
    """Two images (2, 3, 32, 32), the same on every machine."""
    return torch.arange(2 * 3 * 32 * 32, dtype=torch.float64).sin().float().view(2, 3, 32, 32)


def base_of(name):
    """The folder of the base model of an adapter."""
    return "base" if name == "generated" else "base_of_two_layers"


def main():
    for folder, layers in (("base", 1), ("base_of_two_layers", 2)):
        if not (GOLDEN / folder).exists():
            base = tiny_vit(hidden_size=16, num_hidden_layers=layers, intermediate_size=32)
            base.save_pretrained(GOLDEN / folder)
    for name, fields in ADAPTERS.items():
        folder = GOLDEN / name
        if folder.exists():
            continue
        base = base_of(name)
        model = get_peft_model(ViTForImageClassification.from_pretrained(GOLDEN / base), tiny_config(**fields))
        move_adapter(model).eval()
        model.peft_config["default"].base_model_name_or_path = base  # rather than a folder of this machine
        model.save_pretrained(folder)
        folder.joinpath("README.md").unlink()  # PEFT's template
        with torch.no_grad():
            save_file({"logits": model(golden_images()).logits}, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
