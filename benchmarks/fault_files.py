"""Damaged files of adapters and prompters, JSON of other types, and names with path tricks. See `faults.py`."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fault_outcomes import WRONG, Tally
from fault_outcomes import judge as judge_outcome
from peft import AutoPeftModel, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessor

from pgn_peft import Classifier, ImagePrompter, PGNConfig, load_classifier, make_prompter

WEIGHTS, CONFIG, PROCESSOR = "adapter_model.safetensors", "adapter_config.json", "preprocessor_config.json"
PROMPTER_WEIGHTS, PROMPTER_CONFIG = "prompter.safetensors", "prompter_config.json"
IMAGE = Image.effect_noise((40, 36), 80).convert("RGB")
PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SCALE = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
SMALL = {"library_size": 6, "generator_width": 4, "generator_image_size": 16}
TEXT = '0123456789abcdefghijklmnopqrstuvwxyz"{}[]:,. -'
FORMS = {
    "generated": {"num_virtual_tokens": 3, "id2label": {0: "cat", 1: "dog", 2: "owl"}},
    "pixel": {"prompt_space": "pixel", **SCALE, "head": "frozen", "label_mapping": [3, 1], "num_labels": 2},
    "module": {"generator": "static", "slot_prompts": False, "num_labels": 2, "modules_to_save": ["vit.layernorm"]},
}


@dataclass
class Material:
    """A tiny base model, and undamaged adapters and a prompter on it, each in a folder.

    Args:
        root: a folder for all of them.
        hub: the Hub of this process, of `loopback_hub`.
    """

    root: Path
    hub: Any = None

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
        config = ViTConfig(image_size=32, patch_size=8, num_labels=5, initializer_range=0.3, **sizes)
        self.base_model = ViTForImageClassification(config).eval()
        self.base_model.save_pretrained(self.root / "base")
        self.processor = ViTImageProcessor(size={"height": 32, "width": 32}, **SCALE)
        for name in FORMS:
            Classifier(self.adapted(name), self.processor).save_pretrained(self.root / name)
        make_prompter(self.adapted("pixel"), self.processor).save_pretrained(self.root / "prompter")

    def base(self) -> ViTForImageClassification:
        """Return another copy of the base model."""
        return ViTForImageClassification.from_pretrained(self.root / "base").eval()

    def adapted(self, name: str, seed: int = 1) -> PeftModel:
        """Make a model with an adapter whose weights are all random, so that a changed one shows."""
        model = get_peft_model(self.base(), PGNConfig(**SMALL, **FORMS[name]))
        model.peft_config["default"].base_model_name_or_path = str(self.root / "base")
        generator = torch.Generator().manual_seed(seed)
        for key, tensor in model.state_dict().items():
            if ("pgn_" in key or "modules_to_save" in key) and tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(0.5 + noise if "running_var" in key else noise - 0.5)
        return model.eval()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(PIXELS).logits


@torch.no_grad()
def classify(folder: Path) -> Tensor:
    """Load an adapter with its processor, and classify an image from beginning to end."""
    model, processor = load_classifier(folder)
    return model(processor(images=IMAGE, return_tensors="pt")["pixel_values"]).logits


def load_beside(folder: Path, material: Material) -> Tensor:
    """Load an adapter as a second one."""
    model = material.adapted("generated", seed=2)
    model.load_adapter(folder, adapter_name="second")
    model.set_adapter("second")
    return logits(model)


def load_over(folder: Path, material: Material, form: str) -> Tensor:
    """Load an adapter's weights onto the name of another one like it, as `Trainer` does with its checkpoints."""
    model = material.adapted(form, seed=2)
    model.load_adapter(folder, adapter_name="default")
    return logits(model)


def load_with_transformers(folder: Path, material: Material) -> Tensor:
    model = material.base()
    model.load_adapter(str(folder))
    return logits(model)


def checked_config(folder: Path) -> dict[str, Any]:
    return PGNConfig.from_pretrained(str(folder)).to_dict()


def prompt(folder: Path) -> Tensor:
    return ImagePrompter.from_pretrained(folder).pixel_values(IMAGE)


def strict_doors(material: Material) -> dict[str, Callable[[Path], Any]]:
    """Return the ways to load an adapter that compare everything."""
    return {
        "`load_classifier`": classify,
        "`PeftModel.from_pretrained`": lambda folder: logits(PeftModel.from_pretrained(material.base(), folder)),
        "`PeftModel.load_adapter`": lambda folder: load_beside(folder, material),
        "`AutoPeftModel.from_pretrained`": lambda folder: logits(AutoPeftModel.from_pretrained(str(folder))),
        "`PGNConfig.from_pretrained`": checked_config,
    }


def other_doors(material: Material) -> dict[str, Callable[[Path], Any]]:
    """Return Transformers' own, which never show us the weights."""
    auto = AutoModelForImageClassification
    return {
        "Transformers' `load_adapter`": lambda folder: load_with_transformers(folder, material),
        "Transformers' `from_pretrained`": lambda folder: logits(auto.from_pretrained(str(folder))),
    }


def judge(load: Callable[[Path], Any], folder: Path, expected: Any) -> tuple[str, str]:
    """Load from a damaged folder, and say what came of it."""
    return judge_outcome(lambda: load(folder), lambda found: equal(found, expected))


def equal(found: Any, expected: Any) -> bool:
    """Compare results: tensors to a few units in the last place, since weights can lie at another address."""
    if isinstance(expected, Tensor):
        return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    return found == expected


# Damaged bytes.


def damage(content: bytes, regions: list[tuple[int, int]], rng: random.Random) -> tuple[str, bytes]:
    """Change a file's bytes somewhere, and say how.

    Args:
        content: the file.
        regions: begin and end of its parts, one of which is chosen.
        rng: source of the choice.
    """
    begin, end = rng.choice(regions)
    place = rng.randrange(begin, max(end, begin + 1))
    length = min(rng.choice((1, 2, 8, 64, 512)), len(content) - place)
    before, hit, after = content[:place], content[place : place + length], content[place + length :]
    kind = rng.choice(("bit", "bit", "byte", "text", "random", "zeros", "cut", "drop", "insert", "repeat", "append"))
    changed = {
        "bit": lambda: before + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :],
        "byte": lambda: before + rng.randbytes(1) + content[place + 1 :],
        "text": lambda: before + rng.choice(TEXT).encode() + content[place + 1 :],
        "random": lambda: before + rng.randbytes(length) + after,
        "zeros": lambda: before + bytes(length) + after,
        "cut": lambda: before,
        "drop": lambda: before + after,
        "insert": lambda: before + rng.randbytes(length) + hit + after,
        "repeat": lambda: before + hit + hit + after,
        "append": lambda: content + rng.randbytes(length),
    }[kind]()
    if changed == content:
        return damage(content, regions, rng)
    return f"{kind} of {length} at {place} of {len(content)}", changed


def regions_of(file: Path) -> list[tuple[int, int]]:
    """Cut a file into the parts that damage is spread over: of safetensors length, header and each tensor."""
    size = file.stat().st_size
    if file.suffix != ".safetensors":
        return [(0, size)]
    content = file.read_bytes()
    header = int.from_bytes(content[:8], "little")
    offsets = [entry["data_offsets"] for name, entry in json.loads(content[8 : 8 + header]).items() if name[0] != "_"]
    tensors = [(8 + header + begin, 8 + header + end) for begin, end in offsets]
    # As much damage in length and header together as in the tensors, which are many.
    return [(0, 8), (8, 8 + header)] * max(1, len(tensors) // 2) + tensors


def damaged_files(tally: Tally, material: Material, cases: int, seed: int) -> None:
    """Damage one file a case, and load what it belongs to in every way."""
    rng = random.Random(seed)
    strict, others, over = strict_doors(material), other_doors(material), "`PeftModel.load_adapter` onto a name in use"
    doors = {
        form: strict | others | {over: lambda folder, form=form: load_over(folder, material, form)} for form in FORMS
    }
    expected = {(form, door): load(material.root / form) for form in FORMS for door, load in doors[form].items()}
    prompted = prompt(material.root / "prompter")
    targets = [(form, file) for form in FORMS for file in (WEIGHTS, WEIGHTS, WEIGHTS, CONFIG, CONFIG, PROCESSOR)]
    targets += [("prompter", PROMPTER_WEIGHTS), ("prompter", PROMPTER_CONFIG)] * 2
    for index in range(cases):
        form, name = targets[index % len(targets)]
        folder = copy_of(material, form)
        how, content = damage((folder / name).read_bytes(), regions_of(folder / name), rng)
        (folder / name).write_bytes(content)
        case = f"case {index}, {form}/{name}, {how}"
        if form == "prompter":
            tally.add("`ImagePrompter.from_pretrained`", case, judge(prompt, folder, prompted))
            continue
        for door, load in doors[form].items():
            if (name == PROCESSOR and load is not classify) or (name == CONFIG and door == over):
                continue  # which does not read it
            unguarded = door == over or (form == "module" and door in others and name == WEIGHTS)
            row = f"{door}, `modules_to_save`" if unguarded and door != over else door
            tally.add(row, case, judge(load, folder, expected[form, door]), guarded=not unguarded)


# JSON of other types.

VALUES = [
    *(None, True, False, 0, -1, 7, 2.5, math.inf, math.nan, 10**30, "", "text"),
    *([], [None], [1, "a"], [[1]], {}, {"a": 1}),
]
OPTIONAL = ("image_size", "shortest_edge", "size", "crop_size", "rank")  # of a prompter
TYPES = {field.name: str(field.type) for field in dataclasses.fields(PGNConfig)}


def places(settings: Any, path: tuple = ()) -> Iterator[tuple]:
    """Walk over all places in a JSON value, containers and what is in them."""
    if path:
        yield path
    if isinstance(settings, (dict, list)):
        for key, value in settings.items() if isinstance(settings, dict) else enumerate(settings):
            yield from places(value, (*path, key))


def at(settings: Any, path: tuple) -> Any:
    return at(settings[path[0]], path[1:]) if path else settings


def replaced(settings: Any, path: tuple, value: Any) -> Any:
    """Return a copy with another value in a place."""
    copy = json.loads(json.dumps(settings))
    at(copy, path[:-1])[path[-1]] = value
    return copy


def is_possible(value: Any, original: Any, path: tuple, name: str) -> bool:
    """Whether a value is of the type of its place in a file, so that it is an edit and no fault."""
    declared = TYPES.get(path[0], "") if len(path) == 1 and name == CONFIG else ""
    if value is None:
        return original is None or "None" in declared or path[-1] in OPTIONAL or str(path[-1]).startswith("do_")
    if isinstance(value, bool) or isinstance(original, bool):
        return isinstance(value, bool) and (isinstance(original, bool) or "bool" in declared)
    if name == PROCESSOR and path in (("image_mean",), ("image_std",), ("size",)):  # one for all channels or sides
        return isinstance(value, (int, float)) and math.isfinite(value)
    if isinstance(value, (int, float)):
        if isinstance(original, float):
            return math.isfinite(value)
        return isinstance(value, int) and (isinstance(original, int) or "int" in declared)
    if isinstance(value, str):
        return isinstance(original, str) or "str" in declared
    return False


def other_types(tally: Tally, material: Material, cases: int, seed: int) -> None:
    """Give each field of each JSON file values of other types, without checksums, as a stranger's file could have."""
    doors = strict_doors(material) | other_doors(material)
    files = [(form, file) for form in FORMS for file in (CONFIG, PROCESSOR)] + [("prompter", PROMPTER_CONFIG)]
    todo = []
    for form, name in files:
        settings = json.loads((material.root / form / name).read_text(encoding="utf-8"))
        settings.pop("checksums", None)
        for path in places(settings):
            values = [value for value in VALUES if not is_possible(value, at(settings, path), path, name)]
            todo += [(form, name, path, value, json.dumps(replaced(settings, path, value))) for value in values]
        todo += [(form, name, (), value, json.dumps(value)) for value in (None, True, 7, "text", [], [settings], {})]
        todo += [(form, name, (), text[:9], text) for text in ("", "[" * 10**5, "{", "nul", "9" * 10**4, "\ufeff{}")]
    random.Random(seed).shuffle(todo)
    expected = {
        (form, door): load(material.root / form)
        for form in FORMS
        for door, load in doors.items()
        if load is not checked_config
    }
    prompted = prompt(material.root / "prompter")
    for form, name, path, value, text in todo[:cases]:
        folder = copy_of(material, form)
        edit_json(folder / (PROMPTER_CONFIG if form == "prompter" else CONFIG), checksums=None)
        (folder / name).write_text(text, encoding="utf-8")
        case = f"{form}/{name}, {'.'.join(map(str, path)) or 'all of it'} = {value!r:.40}"
        if form == "prompter":
            tally.add("`ImagePrompter.from_pretrained`", case, judge(prompt, folder, prompted))
            continue
        for door, load in doors.items():
            # What becomes of a configuration without its weights is seen elsewhere; nobody else reads a processor.
            if load is not checked_config and (name == CONFIG or load is classify):
                tally.add(door, case, judge(load, folder, expected[form, door]))


def copy_of(material: Material, form: str) -> Path:
    """Make a copy of a folder, to be damaged."""
    folder = material.root / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    return Path(shutil.copytree(material.root / form, folder))


def edit_json(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | fields), encoding="utf-8")


# Names with path tricks.

TRICKS = [
    *("..", "../outside", "../../outside", "a/../../outside", "/", "~", ".", "", " ", "a/b", "%2e%2e/outside"),
    *("a\\b", "..\\outside", "C:\\outside", "\0", "a\0b", "a\nb", "a" * 300, "\udc80", "\u202egnp", "\N{SNOWMAN}"),
    *("file:///etc/passwd", "https://localhost/x", "user/..", "user/name/../..", "user/*", "*", "name.", "con"),
    *("-rf", "$HOME", "`id`", "|", "<script>"),
]


def listing(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if not path.is_symlink())
    return {str(path): path.read_bytes() if path.is_file() else b"" for path in files}


def path_tricks(tally: Tally, material: Material, cases: int, seed: int) -> None:
    """Use each trick wherever a name goes, and see that nothing outside of the folder is written or taken.

    Accepted and right: what was asked for happened, and nothing outside of the folder that was named changed.
    """
    inside, outside = material.root / "case/inside", material.root / "case/outside"
    names = [*TRICKS, str(outside), f"../{outside.name}"]

    def fresh(form: str = "generated") -> Path:
        shutil.rmtree(inside, ignore_errors=True)
        shutil.copytree(material.root / form, inside)
        edit_json(inside / (PROMPTER_CONFIG if form == "prompter" else CONFIG), checksums=None)
        return inside

    def restore() -> None:
        shutil.rmtree(outside, ignore_errors=True)
        shutil.copytree(material.root / "generated", outside)

    def nothing_outside() -> bool:
        found = listing(material.root / "case")
        return {path: content for path, content in found.items() if not path.startswith(str(inside))} == seen

    def adapter_name(name: str) -> None:
        model = get_peft_model(material.base(), PGNConfig(num_labels=2, **SMALL), adapter_name=name)
        model.save_pretrained(inside)
        Classifier(model, material.processor).save_pretrained(inside)

    def second_adapter_name(name: str) -> None:
        model = material.adapted("generated")
        model.load_adapter(fresh(), adapter_name=name)
        model.save_pretrained(inside)

    def subfolder(name: str) -> bool:
        load_classifier(fresh(), subfolder=name)
        return inside.joinpath(name).resolve().is_relative_to(inside.resolve())

    def adapter_id(name: str) -> bool:
        load_classifier(name)
        return Path(name) == outside

    def prompter_id(name: str) -> None:
        ImagePrompter.from_pretrained(name)

    def field(key: str, wrap: Callable[[str], Any]) -> Callable[[str], None]:
        def load(name: str) -> Any:
            edit_json(fresh() / CONFIG, **{key: wrap(name)})
            return classify(inside)

        return load

    def tensor_name(name: str) -> None:
        tensors = load_file(fresh() / WEIGHTS)
        save_file(tensors | {name: torch.zeros(1)}, inside / WEIGHTS, metadata={"format": "pt"})
        classify(inside)

    def label(name: str) -> bool:
        model = get_peft_model(material.base(), PGNConfig(id2label={0: name, 1: "dog"}, **SMALL))
        model.peft_config["default"].base_model_name_or_path = str(material.root / "base")
        Classifier(model, material.processor).save_pretrained(fresh())
        loaded = load_classifier(inside)
        return loaded.model.config.id2label[0] == name and loaded.pipeline()(IMAGE)[0]["label"] in (name, "dog")

    def linked(name: str) -> None:
        fresh()
        (inside / WEIGHTS).unlink()
        (inside / WEIGHTS).symlink_to(name or ".")
        classify(inside)

    restore()  # a whole adapter that nobody asked for
    seen = listing(material.root / "case")
    doors: dict[str, Callable[[str], Any]] = {
        "name of an adapter": adapter_name,
        "name of a second adapter": second_adapter_name,
        "`subfolder`": subfolder,
        "id of an adapter": adapter_id,
        "id of a prompter": prompter_id,
        "`base_model_name_or_path` in a file": field("base_model_name_or_path", str),
        "`revision` in a file": field("revision", str),
        "`target_modules` in a file": field("target_modules", lambda name: [name]),
        "`modules_to_save` in a file": field("modules_to_save", lambda name: [name]),
        "`auto_mapping` in a file": field(
            "auto_mapping", lambda name: {"base_model_class": name, "parent_library": name}
        ),
        "name of a tensor in a file": tensor_name,
        "name of a class": label,
        "link in place of the weights": linked,
    }
    todo = [(row, act, name) for row, act in doors.items() for name in names]
    random.Random(seed).shuffle(todo)
    for row, act, name in sorted(todo[:cases], key=lambda case: case[0]):
        fresh()
        outcome = judge_outcome(
            lambda act=act, name=name: act(name), lambda answer: answer is not False and nothing_outside()
        )
        if not nothing_outside():
            outcome = (WRONG, f"something outside was changed; {outcome[1]}")
            shutil.rmtree(material.root / "case")
            restore()
        tally.add(row, f"{row} {name!r:.60}", outcome)
