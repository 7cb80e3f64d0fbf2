"""Answers do not depend on the addresses of weights, which differ between files, copies and processes."""

import pytest
import torch
from conftest import PIXEL, answer, assert_same, move_adapter, tiny_config, tiny_vit
from peft import PeftModel, get_peft_model

ALIGNMENT = 64  # bytes, of what torch allocates


def at_shifted_addresses(tensors, shift):
    """Copy tensors into one piece of memory, each `shift` bytes behind a multiple of 64 bytes."""
    sizes = [-(-(tensor.nbytes + shift) // ALIGNMENT) * ALIGNMENT for tensor in tensors.values()]
    memory = torch.empty(sum(sizes) + ALIGNMENT, dtype=torch.uint8)
    position = -memory.data_ptr() % ALIGNMENT
    copies = {}
    for (name, tensor), size in zip(tensors.items(), sizes, strict=True):
        # PyTorch has no views of 8-byte integers at 4 bytes.
        start = position + shift // tensor.itemsize * tensor.itemsize
        copies[name] = memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        position += size
    return copies


@pytest.mark.parametrize("form", [{}, {"prompt_depth": "all"}, PIXEL], ids=["latent", "every layer", "pixel"])
def test_weights_at_any_address_give_the_same_answers(form, pixel_values, tmp_path):
    model = move_adapter(get_peft_model(tiny_vit(), tiny_config(**form))).eval()
    expected = answer(model, pixel_values)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path, low_cpu_mem_usage=True)
    in_pixels = form == PIXEL
    assert_same(answer(loaded, pixel_values), expected, valid_pixels=in_pixels)
    tensors = loaded.state_dict()
    for shift in (0, 4, 16, 32):
        copies = at_shifted_addresses(tensors, shift)
        assert {tensor.data_ptr() % ALIGNMENT for tensor in copies.values() if tensor.is_floating_point()} == {shift}
        loaded.load_state_dict(copies, assign=True)
        for name, tensor in loaded.state_dict().items():
            assert tensor.data_ptr() == copies[name].data_ptr(), name
        assert_same(answer(loaded, pixel_values), expected, valid_pixels=in_pixels)
