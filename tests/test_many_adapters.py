"""Loading, activating and deleting adapters over and over leaves nothing behind."""

import gc
import weakref

import pytest
import torch
from conftest import PIXEL, answer, move_adapter, own_adapter_methods, tiny_config, tiny_vit
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

KINDS = {"generated": {"num_labels": 2}, "static": {"generator": "static", "head": "frozen"}, "pixel": PIXEL}


@pytest.fixture
def folders(tmp_path):
    """A folder with an adapter for each kind."""
    for kind, fields in KINDS.items():
        model = get_peft_model(tiny_vit(), tiny_config(**fields))
        move_adapter(model).save_pretrained(tmp_path / kind)
    return {kind: tmp_path / kind for kind in KINDS}


def census(model):
    """Count hooks, and whatever the layers hold by adapter."""
    count = {}
    modules = list(model.modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    count["hooks"] = sum(len(getattr(module, kind)) for module in modules for kind in hooks)
    for layer in modules:
        if isinstance(layer, BaseTunerLayer):
            # Whatever the layer holds that has a size, known to it today or added tomorrow.
            sized = {name: len(value) for name, value in vars(layer).items() if isinstance(value, (dict, list, set))}
            containers = {name: len(getattr(layer, name)) for name in layer.adapter_layer_names}
            count[type(layer).__name__] = sized | containers
    count["configs"] = len(model.peft_config)
    return count


@pytest.mark.parametrize("through", ["PEFT", pytest.param("Transformers", marks=own_adapter_methods)])
def test_a_loop_of_load_set_delete_leaks_nothing(through, folders, pixel_values):
    if through == "PEFT":
        model = PeftModel.from_pretrained(tiny_vit(), folders["generated"], adapter_name="first")
    else:
        model = tiny_vit()
        model.load_adapter(str(folders["generated"]), adapter_name="first")
    expected = answer(model, pixel_values)
    own = []  # what belongs to the adapters that were deleted: modules and tensors

    def go_round(turn):
        for kind, folder in folders.items():
            name = f"{kind}{turn}"
            model.load_adapter(str(folder), adapter_name=name)
            model.set_adapter(name)
            answer(model, pixel_values)
            parts = [module for path, module in model.named_modules() if f".{name}" in path]
            own.extend(weakref.ref(item) for part in parts for item in (part, *part.parameters(), *part.buffers()))
            if through == "PEFT":
                answer(model, pixel_values, adapter_names=[name] * 4)
            model.set_adapter("first")
            model.delete_adapter(name)

    go_round(0)  # what is made once, such as caches, is no leak
    before = census(model)
    for turn in range(1, 4):
        go_round(turn)
    assert census(model) == before
    gc.collect()
    assert len(own) > 100
    assert not [found for found in (reference() for reference in own) if found is not None]
    assert torch.equal(answer(model, pixel_values), expected)
