"""PEFT's own tests of what all its methods have in common, run on PGN from a checkout of PEFT.

The environment variable PEFT_CHECKOUT names a clone of PEFT's repository, or its unpacked source archive, of the
version that is installed.
"""

import importlib
import importlib.util
import inspect
import os
import sys
import types
from pathlib import Path

import peft
import pytest
import torch
from conftest import tiny_vit
from transformers import ViTForImageClassification

from pgn_peft import PGNConfig

CHECKOUT = os.environ.get("PEFT_CHECKOUT")
if not CHECKOUT:
    pytest.skip("PEFT_CHECKOUT names no checkout of PEFT, whose own tests run here", allow_module_level=True)

MERGING = "a PGN adapter cannot be merged"
TEXT = "for models of text: it generates or embeds token ids"
OTHER_METHODS = "for other methods: "
NOT_APPLICABLE = {
    "merge_layers": MERGING,
    "merge_layers_fp16": MERGING,
    "merge_layers_is_idempotent": MERGING,
    "merge_layers_multi": MERGING,
    "merge_layers_nan": MERGING,
    "safe_merge": MERGING,
    "generate": TEXT,
    "generate_half_prec": TEXT,
    "generate_pos_args": TEXT,
    "generate_with_mixed_adapter_batches_and_beam_search": TEXT,
    "mixed_adapter_batches": TEXT + "; tests/test_mixed_batch.py tests mixed batches of images",
    "passing_input_embeds_works": TEXT,
    "adding_multiple_adapters_with_bias_raises": OTHER_METHODS + "the config has no `bias`",
    "training_layer_indexing": OTHER_METHODS + "the config has no `layers_to_transform`",
    "training_prompt_learning_tasks": OTHER_METHODS + "PEFT's prompt learning",
    "weighted_combination_of_adapters": OTHER_METHODS + "LoRA and IA3",
    "lora_conversion": OTHER_METHODS + "those that add to weights",
}
# The values that PEFT's test files give to further arguments. Pickled files (safe_serialization=False) are not among
# them, since PGN refuses to load these.
FURTHER_ARGUMENTS = {
    "add_adapter_no_autocast_adapter_dtype": [{"dtype": torch.float16}, {"dtype": torch.bfloat16}],
    "training_gradient_checkpointing": [{"use_reentrant": True}, {"use_reentrant": False}],
}
KINDS = {
    "latent": {},
    "static": {"generator": "static"},
    "deep": {"prompt_depth": "all"},
    "pixel": {"prompt_space": "pixel", "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "num_virtual_tokens": None},
}


def import_common_tester():
    """PEFT's tests are no package that is installed, and import diffusers, of which PGN needs nothing."""
    package = types.ModuleType("peft_tests")
    package.__path__ = [str(Path(CHECKOUT, "tests"))]
    sys.modules["peft_tests"] = package
    stub = None if importlib.util.find_spec("diffusers") else types.ModuleType("diffusers")
    if stub:
        stub.StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})
        sys.modules["diffusers"] = stub
    try:
        return importlib.import_module("peft_tests.testing_common").PeftCommonTester
    finally:
        if stub:
            del sys.modules["diffusers"]


class Generates(ViTForImageClassification):
    """`_test_disable_adapter` reads the scores of the first token that a model generates."""

    def generate(self, pixel_values, **kwargs):
        return types.SimpleNamespace(scores=[self(pixel_values).logits])


class Tester(import_common_tester()):
    transformers_class = ViTForImageClassification

    def prepare_inputs_for_testing(self):
        generator = torch.Generator().manual_seed(0)
        return {"pixel_values": torch.randn(4, 3, 32, 32, generator=generator).to(self.torch_device)}


class PixelsAsTokenIds(Tester):
    """`_test_prepare_for_training` embeds its inputs under the name of token ids; ViT's embeddings take pixels."""

    def prepare_inputs_for_testing(self):
        return {"input_ids": super().prepare_inputs_for_testing()["pixel_values"]}


class LogitsAsScores(Tester):
    transformers_class = Generates


TESTERS = {"prepare_for_training": PixelsAsTokenIds, "disable_adapter": LogitsAsScores}
TESTS = [
    name.removeprefix("_test_")
    for name, test in inspect.getmembers(Tester)
    if name.startswith("_test_") and "model_id" in inspect.signature(test).parameters  # the others are parts of these
]


@pytest.fixture(scope="module")
def model_id(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-vit")
    tiny_vit().save_pretrained(folder)
    return str(folder)


CASES = [
    pytest.param(name, further, id="-".join([name, *map(str, further.values())]))
    for name in TESTS
    for further in FURTHER_ARGUMENTS.get(name, [{}])
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("name", "further"), CASES)
def test_common(name, further, kind, model_id):
    if name in NOT_APPLICABLE:
        pytest.skip(NOT_APPLICABLE[name])
    sizes = {"num_virtual_tokens": 3, "library_size": 6, "generator_width": 4, "generator_image_size": None}
    test = getattr(TESTERS.get(name, Tester)(), "_test_" + name)
    test(model_id, PGNConfig, sizes | KINDS[kind], **further)


def test_the_checkout_is_of_the_installed_version():
    source = Path(CHECKOUT, "src", "peft", "__init__.py").read_text(encoding="utf-8")
    assert f'__version__ = "{peft.__version__}"' in source
