"""Compares the generator's gradients with float64 for many shapes. Run as a process by test_instruction_sets.py."""

import copy
from itertools import product

import torch

from pgn_peft.nn.generator import PromptGenerator

NORMS = ("batch", "group")
SHAPES = [
    *product(range(1, 9), (1, 2, 8, 33), (1, 2, 25), NORMS),  # width, side, batch size, norm
    *product(range(9, 33), (1, 9), (2,), NORMS),
    *product((4, 7, 16, 32), (64, 224), (2,), NORMS),
]
# Torch refuses to normalise a group of one value.
SHAPES = [shape for shape in SHAPES if shape[1] > 8 or shape[2] > 1 or shape[3] == "batch"]
# A ReLU whose input is nearly 0 can be on in one precision and off in the other.
TOLERANCE = 1e-3


def gradient(generator, images, direction):
    (generator(images) * direction).sum().backward()
    return torch.cat([parameter.grad.flatten().double() for parameter in generator.parameters()])


def relative_error(width, side, batch_size, norm):
    torch.manual_seed(0)
    generator = PromptGenerator(2, 3, width=width, norm=norm, mixing_init_std=1.0).train()
    for module in generator.modules():
        if hasattr(module, "eps"):
            module.eps = 1.0  # the gradient of a norm over two values is ill-conditioned with the usual 1e-5
    exact = copy.deepcopy(generator).double()
    images, direction = torch.randn(batch_size, 3, side, side), torch.randn(batch_size, 2, 3)
    expected = gradient(exact, images.double(), direction.double())
    found = gradient(generator, images, direction)
    return ((found - expected).norm() / expected.norm()).item()


if __name__ == "__main__":
    torch.set_num_threads(1)
    wrong = {shape: error for shape in SHAPES if not (error := relative_error(*shape)) <= TOLERANCE}
    print(f"{len(SHAPES)} shapes, {len(wrong)} wrong: {wrong}")
