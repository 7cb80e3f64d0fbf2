"""Registration: repeated, reloaded, in conflict, with an old PEFT."""

import importlib
import subprocess
import sys

import peft
import pytest
from conftest import refused, tiny_config, tiny_vit
from peft import mapping

import pgn_peft
from pgn_peft import registration

MAPPINGS = (
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING,
    mapping.PEFT_TYPE_TO_TUNER_MAPPING,
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING,
)


@pytest.fixture
def unregistered(monkeypatch):
    for entries in MAPPINGS:
        monkeypatch.delitem(entries, "PGN")


def test_importing_registers_and_the_string_in_a_file_finds_it():
    assert [entries["PGN"] for entries in MAPPINGS] == [pgn_peft.PGNConfig, pgn_peft.PGNModel, "pgn_"]
    assert pgn_peft.PGNConfig().peft_type.value == "PGN"


def test_registering_twice_and_reloading_are_harmless():
    registration.register()
    importlib.reload(registration).register()
    importlib.reload(pgn_peft)
    assert [entries["PGN"] for entries in MAPPINGS] == [pgn_peft.PGNConfig, pgn_peft.PGNModel, "pgn_"]
    peft.get_peft_model(tiny_vit(), tiny_config())


@pytest.mark.slow
def test_importing_anew_leaves_a_working_method():
    # In a process of its own, since it replaces the classes under the other tests' feet.
    code = """
import sys, pgn_peft, peft
first = pgn_peft.PGNConfig
for name in [name for name in sys.modules if name.partition(".")[0] == "pgn_peft"]:
    del sys.modules[name]
import pgn_peft
assert pgn_peft.PGNConfig is not first
from transformers import ViTConfig, ViTForImageClassification
vit = ViTForImageClassification(ViTConfig(image_size=32, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))
model = peft.get_peft_model(vit, pgn_peft.PGNConfig(num_labels=3))
print(type(model.base_model).__name__, model.config.num_labels)
"""
    outcome = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert outcome.stdout.strip() == "PGNModel 3"


@pytest.mark.usefixtures("unregistered")
def test_another_plug_in_with_the_name_is_refused(monkeypatch):
    class OtherConfig:
        pass

    monkeypatch.setitem(mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "PGN", OtherConfig)
    with refused(ImportError, "PGN", "OtherConfig"):
        registration.register()


def test_a_peft_below_the_floor_is_refused(monkeypatch):
    monkeypatch.setattr(registration, "version", lambda package: "0.20.0")
    with refused(ImportError, "0.21", "0.20.0"):
        registration.check_peft()


@pytest.mark.slow
def test_without_peft_the_package_still_imports():
    code = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, package=None: None if name == "peft" else find(name, package)
import sys, pgn_peft, pgn_peft.nn.generator, pgn_peft.nn.library
print(pgn_peft.__version__, "peft" in sys.modules, "transformers" in sys.modules)
"""
    outcome = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8"
    )
    assert outcome.stdout.split() == [pgn_peft.__version__, "False", "False"]
