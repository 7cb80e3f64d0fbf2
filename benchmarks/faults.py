"""Edit and damage files, kill processes, and count whether what docs/reliability.md promises holds.

    python benchmarks/faults.py
    python benchmarks/faults.py --campaign edits weights

Everything runs on a tiny ViT, offline. A case is kept if the promise was kept, and broken otherwise; broken ones are
listed, and make the exit status 1. The campaigns:

- edits: a configuration that was edited (moved base, renamed label, revision, unknown keys) loads, through every
  loader, with one more warning at most
- weights: rewritten weights load (another file, half precision throughout, counters of other types); a cut file, and a
  tensor that is missing, of another shape or NaN, are refused
- images: images of every mode are read right or refused; cut files are refused
- kills: a save that is killed before any of its file operations leaves the old or the new content in each file (Linux)
- names: names of adapters and folders that are paths lead nowhere outside of the folder

`--smoke`: a few cases of each.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench import markdown
from peft import PeftModel, get_peft_model
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessor
from transformers.utils import logging as transformers_logging

from pgn_peft import Classifier, ImagePrompter, PGNConfig, load_classifier, make_prompter

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SCALE = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
FORMS = {
    "latent": {"num_virtual_tokens": 3, "id2label": {0: "cat", 1: "dog", 2: "owl"}},
    "every layer": {"num_virtual_tokens": 3, "prompt_depth": "all", "num_labels": 2},
    "pixel": {"prompt_space": "pixel", **SCALE, "num_labels": 2},
}
REFUSALS = (ValueError, TypeError, OSError, RuntimeError, SafetensorError)
TRICKS = ["..", "../outside", "../../outside", "a/../../outside", "/", "~", "a/b", "a\\b", "C:\\outside", "\0", "a\nb"]
TRICKS += ["a" * 300, "\udc80", "file:///etc/passwd", "user/name/../..", "*", "$HOME", "-rf", "<script>"]


@dataclass
class Tally:
    """Kept and broken promises, by row of the table."""

    counts: dict[str, Counter] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def add(self, row: str, case: str, fault: str | None) -> None:
        """Count a case; `fault` says what went wrong."""
        self.counts.setdefault(row, Counter())["kept" if fault is None else "broken"] += 1
        if fault is not None:
            self.broken.append(f"{row}: {case}: {fault}")

    def accepted(self, row: str, case: str, act: Callable[[], Any], is_right: Callable[[Any], bool]) -> None:
        """Count an act that must end with the right result."""
        try:
            self.add(row, case, None if is_right(act()) else "accepted, with another result")
        except Exception as error:
            self.add(row, case, describe(error))

    def refused(self, row: str, case: str, act: Callable[[], Any]) -> None:
        """Count an act that must be refused."""
        try:
            act()
            self.add(row, case, "accepted")
        except Exception as error:
            self.add(row, case, None if isinstance(error, REFUSALS) else describe(error))


def describe(error: Exception) -> str:
    """Write an exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


class Material:
    """A tiny base model and an adapter of each form on it, saved with an image processor in a folder of its own.

    Args:
        root: a folder for all of them.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.processor = root, ViTImageProcessor(size={"height": 32, "width": 32}, **SCALE)
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        config = ViTConfig(image_size=32, patch_size=8, num_labels=5, initializer_range=0.3, **sizes)
        ViTForImageClassification(config).save_pretrained(root / "base")
        for form in FORMS:
            self.classifier(form).save_pretrained(root / form)

    def base(self) -> ViTForImageClassification:
        """Return another copy of the base model."""
        return ViTForImageClassification.from_pretrained(self.root / "base").eval()

    def classifier(self, form: str, seed: int = 1, **fields: Any) -> Classifier:
        """Make an adapter whose weights are all random, so that a changed one changes the answers."""
        small = {"library_size": 6, "generator_width": 4, "generator_image_size": 16}
        model = get_peft_model(self.base(), PGNConfig(**(small | FORMS[form] | fields)))
        model.peft_config["default"].base_model_name_or_path = str(self.root / "base")
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in model.state_dict().items():
            if "pgn_" in name and tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(0.5 + noise if "running_var" in name else noise - 0.5)
        return Classifier(model.eval(), self.processor)

    def copy_of(self, form: str) -> Path:
        """Return a copy of an adapter's folder, to be changed."""
        folder = self.root / "case" / "inside"
        shutil.rmtree(folder.parent, ignore_errors=True)
        return Path(shutil.copytree(self.root / form, folder))

    def loaders(self) -> dict[str, Callable[[Path], Tensor]]:
        """Return the ways to load an adapter, each from a folder to logits."""
        auto = AutoModelForImageClassification
        return {
            "load_classifier": lambda folder: logits(load_classifier(folder).model),
            "PeftModel": lambda folder: logits(PeftModel.from_pretrained(self.base(), folder)),
            "Transformers": lambda folder: logits(auto.from_pretrained(str(folder))),
        }


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Answer the same pixels each time."""
    return model.eval()(PIXELS).logits


def near(expected: Tensor, tolerance: float = 1e-4) -> Callable[[Tensor], bool]:
    """Return a comparison of logits; half precision rounds weights by 2^-8 or less."""
    return lambda found: found.shape == expected.shape and torch.allclose(found, expected, rtol=0, atol=tolerance)


def edits(tally: Tally, material: Material, few: bool) -> None:
    """Edit a configuration in the ways that people and tools do, and load it everywhere."""
    moved = material.root / "moved base"
    shutil.copytree(material.root / "base", moved, dirs_exist_ok=True)
    changes: dict[str, dict[str, Any]] = {
        "moved base": {"base_model_name_or_path": str(moved)},
        "renamed label": {"id2label": {"0": "kitten", "1": "dog", "2": "owl"}},
        "revision": {"revision": "main"},
        "an unknown key": {"unsloth_fixed": True},
        "two unknown keys": {"loftq_config": {}, "trained_by": "me", "peft_version": "0.99"},
    }
    for form, (door, load) in product(list(FORMS)[: 1 if few else None], material.loaders().items()):
        expected, before = counted(partial(load, material.root / form))
        for case, fields in changes.items():
            if form == "latent" or "id2label" not in fields:
                folder = material.copy_of(form)
                config = json.loads((folder / CONFIG).read_text(encoding="utf-8")) | fields
                (folder / CONFIG).write_text(json.dumps(config, indent=2), encoding="utf-8")
                tally.accepted(
                    f"edited configurations load: {door}",
                    f"{form}, {case}",
                    partial(counted, partial(load, folder)),
                    lambda found, e=expected, b=before: near(e)(found[0]) and found[1] <= b + 1,
                )


def counted(act: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """Return a result and the number of warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = act()
    return result, len(caught)


def weights(tally: Tally, material: Material, few: bool) -> None:
    """Rewrite and damage the weights of every form, and load them everywhere."""

    def changed(is_meant: Callable[[str, Tensor], bool], change: Callable[[Tensor], Tensor]) -> Callable:
        return lambda found: {n: change(t) if is_meant(n, t) else t for n, t in found.items()}

    def is_counter(name: str, tensor: Tensor) -> bool:
        return "num_batches" in name

    def in_library(name: str, tensor: Tensor) -> bool:
        return "pgn_library" in name

    rewritten: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
        "another file": lambda found: dict(reversed(found.items())),
        "bfloat16 throughout": changed(lambda *_: True, Tensor.bfloat16),
        "half throughout": changed(lambda *_: True, Tensor.half),
        "counters as floats": changed(is_counter, Tensor.float),
        "counters of shape (0,)": changed(is_counter, lambda _: torch.zeros(0)),
    }
    damaged: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {
        "a missing tensor": lambda found: {n: t for n, t in found.items() if not in_library(n, t)},
        "another shape": changed(in_library, lambda tensor: torch.cat([tensor, tensor])),
        "NaN": changed(in_library, lambda tensor: torch.full_like(tensor, torch.nan)),
    }
    for form, (door, load) in product(list(FORMS)[: 1 if few else None], material.loaders().items()):
        for case, change in (rewritten | damaged).items():
            folder = material.copy_of(form)
            save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})
            if case in damaged:
                tally.refused(f"damaged weights are refused: {door}", f"{form}, {case}", partial(load, folder))
                continue
            model = material.classifier(form).model
            for name, tensor in model.state_dict().items():
                if "pgn_" in name and tensor.is_floating_point() and "throughout" in case:
                    tensor.copy_(change({name: tensor})[name])
            row = f"rewritten weights load: {door}"
            tally.accepted(row, f"{form}, {case}", partial(load, folder), near(logits(model), 1e-3))
        for tenth in range(0, 10, 5 if few else 1):
            folder = material.copy_of(form)
            content = (folder / WEIGHTS).read_bytes()
            (folder / WEIGHTS).write_bytes(content[: len(content) * tenth // 10])
            case = f"{form}, cut to {tenth} tenths"
            tally.refused(f"damaged weights are refused: {door}", case, partial(load, folder))


def image_of(mode: str, pixels: np.ndarray) -> Image.Image:
    """Make an image of a mode that stands for RGB pixels (H, W, 3); for grey modes those of the first channel."""
    grey = pixels[:, :, 0]
    if mode in ("I;16", "F"):
        return Image.fromarray(grey.astype(np.uint16) * 257 if mode == "I;16" else grey.astype(np.float32) / 255)
    return Image.fromarray(pixels if mode.startswith("RGB") else grey).convert(mode)


def images(tally: Tally, material: Material, few: bool) -> None:
    """Read images of all modes, in memory and from whole and cut files."""
    make_prompter(material.classifier("pixel").model, material.processor).save_pretrained(material.root / "prompter")
    prompter = ImagePrompter.from_pretrained(material.root / "prompter")
    pixels = np.random.default_rng(0).integers(0, 256, (36, 40, 3), dtype=np.uint8)
    row = "images are read right or refused"
    unknown = Image.new("I", (40, 36), 70_000)  # 32 bits, of which nobody knows the largest value
    tally.refused(row, "I", partial(prompter.pixel_values, unknown))
    for mode, formats in {
        "L": "PNG TIFF",
        "LA": "PNG",
        "RGB": "PNG TIFF WEBP",
        "I;16": "PNG TIFF",
        "F": "TIFF",
    }.items():
        image = image_of(mode, pixels)
        expected = prompter.pixel_values(pixels if mode == "RGB" else pixels[:, :, :1].repeat(3, 2))
        tally.accepted(row, mode, partial(prompter.pixel_values, image), near(expected, 0.05))
        for name in formats.split():
            file = io.BytesIO()
            image.save(file, name, lossless=True)
            content = file.getvalue()
            tally.accepted(row, f"{name}, {mode}", partial(read, prompter, content), near(expected, 0.05))
            for tenth in range(1, 10, 8 if few else 1):
                cut = content[: len(content) * tenth // 10]
                case = f"{name}, {mode}, {tenth} tenths"
                tally.refused("cut image files are refused", case, partial(read, prompter, cut))


def read(prompter: ImagePrompter, content: bytes) -> Tensor:
    """Read and prompt an encoded image."""
    return prompter.pixel_values(Image.open(io.BytesIO(content)))


def kills(tally: Tally, material: Material, few: bool) -> None:
    """Kill a save over an earlier adapter before each of its file operations, and look at every file."""
    first, second = (material.classifier("latent", seed) for seed in (3, 4))
    old, new, folder = (material.root / name for name in ("old", "new", "killed"))
    for classifier, copy in ((first, old), (second, new)):
        classifier.save_pretrained(folder)  # whose name is in the card
        shutil.copytree(folder, copy)
    contents = [{file.name: file.read_bytes() for file in copy.iterdir()} for copy in (old, new)]
    finished, place = False, 0
    while not finished:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(old, folder)
        child = os.fork()
        if not child:
            save_until(place, second, folder)
        finished = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        found = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
        wrong = [name for name in contents[0] if found.get(name) not in [content.get(name) for content in contents]]
        fault = f"neither old nor new: {wrong}" if wrong else None
        tally.add("a killed save leaves old or new files", f"before operation {place}", fault)
        place += 7 if few else 1


def save_until(place: int, classifier: Classifier, folder: Path) -> None:
    """Save, and kill this process before its n-th file operation in the folder."""
    left = place

    def count(event: str, arguments: tuple) -> None:
        nonlocal left
        if event.startswith(("os.", "open", "shutil.", "tempfile.")) and str(folder) in str(arguments):
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1

    sys.addaudithook(count)
    with contextlib.suppress(Exception):
        classifier.save_pretrained(folder)
        os._exit(0)
    os._exit(1)


def names(tally: Tally, material: Material, few: bool) -> None:
    """Use path tricks as names, and see that nothing outside of the folder is written or loaded."""

    def save(name: str, folder: Path) -> None:
        get_peft_model(material.base(), PGNConfig(num_labels=2), adapter_name=name).save_pretrained(folder)

    def load(name: str, folder: Path) -> None:
        load_classifier(folder, subfolder=name)
        assert folder.joinpath(name).resolve().is_relative_to(folder.resolve()), "loaded from outside"

    for act in (save, load):
        for name in TRICKS[:: 6 if few else 1]:
            folder = material.copy_of("latent")
            shutil.copytree(folder, folder.parent / "outside")  # a whole adapter that nobody asked for
            before, fault = set(material.root.rglob("*")), None
            try:
                act(name, folder)
            except Exception as error:
                fault = None if isinstance(error, REFUSALS) else describe(error)
            changed = [path for path in before ^ set(material.root.rglob("*")) if not path.is_relative_to(folder)]
            tally.add("names stay inside", f"{act.__name__} {name!r:.60}", f"changed: {changed}" if changed else fault)


CAMPAIGNS = {"edits": edits, "weights": weights, "images": images, "kills": kills, "names": names}


def main(command_line: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--campaign", nargs="+", choices=CAMPAIGNS, default=list(CAMPAIGNS))
    parser.add_argument("--smoke", action="store_true", help="a few cases of each")
    options = parser.parse_args(command_line)
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    transformers_logging.disable_progress_bar()
    tally = Tally()
    with tempfile.TemporaryDirectory() as folder:
        material = Material(Path(folder))
        for name in options.campaign:
            CAMPAIGNS[name](tally, material, options.smoke)
    logging.disable(logging.NOTSET)
    figures = ([row, counts.total(), counts["kept"], counts["broken"]] for row, counts in tally.counts.items())
    print(markdown([["promise", "cases", "kept", "broken"], *figures]))
    for line in tally.broken:
        print(f"BROKEN {line}")
    print(f"\nbroken: {len(tally.broken)} of {sum(counts.total() for counts in tally.counts.values())}")
    return int(bool(tally.broken))


if __name__ == "__main__":
    sys.exit(main())
