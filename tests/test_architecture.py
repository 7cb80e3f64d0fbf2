"""Which part of the package may import which. Imports inside of functions and for type checkers count too."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pgn_peft

ROOT = Path(pgn_peft.__file__).parent

# part -> the parts that it may import
ALLOWED = {
    "version": set(),
    "nn": set(),
    "utils": set(),
    "prompter": {"nn", "utils", "version"},
    "tuner": {"nn", "utils", "version"},
    "registration": {"tuner"},
    "texts": {"nn", "tuner", "utils"},
    "inversion": {"nn", "prompter", "tuner"},
    "hub": {"nn", "tuner", "utils"},
    "training": {"hub", "nn", "tuner", "utils"},
    "official": {"nn", "tuner", "utils"},
    "inspection": {"nn", "tuner", "utils"},
}


def name_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in ROOT.rglob("*.py")}


def imports(path):
    """Names of the package's modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= submodules & MODULES.keys() or {node.module}
    return {name for name in found if name.startswith("pgn_peft.")}


def part_of(module):
    return module.split(".")[1]


def test_a_part_imports_only_what_lies_below_it():
    for module, path in MODULES.items():
        if module != "pgn_peft":
            part = part_of(module)
            beyond = {name for name in imports(path) if part_of(name) not in ALLOWED[part] | {part}}
            assert not beyond, f"{module} imports {beyond}"


def test_all_parts_are_listed():
    assert {part_of(module) for module in MODULES if module != "pgn_peft"} == ALLOWED.keys()


def test_no_modules_import_each_other_in_a_circle():
    TopologicalSorter({module: imports(path) for module, path in MODULES.items()}).prepare()


# names -> the parts or modules that may use them
HOMES = [
    ({"transformers", "peft", "accelerate"}, {"tuner", "registration", "hub", "training", "inversion", "official"}),
    ({"PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING"}, {"registration"}),
    ({"ViTForImageClassification", "Dinov2ForImageClassification"}, {"backbones"}),
]


def test_only_its_home_knows_a_name():
    for module, path in MODULES.items():
        known = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant):
                known.add(node.value)
            elif isinstance(node, ast.Name):
                known.add(node.id)
            elif isinstance(node, ast.Attribute):
                known.add(node.attr)
            elif isinstance(node, ast.ImportFrom):
                known.add(node.module.split(".")[0])
            elif isinstance(node, ast.Import):
                known.add(node.names[0].name.split(".")[0])
        for names, homes in HOMES:
            if names & known and module != "pgn_peft":
                assert homes & set(module.split(".")), f"{module} knows {names & known}"
