"""Three steps of training, in one process or with torch's FSDP2 in several. tests/test_many_processes.py runs this.

python tests/sharded_training.py adapter.pt KIND
torchrun --nproc_per_node 2 tests/sharded_training.py adapter.pt KIND
"""

import os
import sys

import torch
from conftest import layers_of, tiny_config, tiny_vit
from peft import get_peft_model, get_peft_model_state_dict
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

STEPS, IMAGES = 3, 8
KINDS = {
    "latent": {},
    "deep": {"prompt_depth": None},
    "pixel": {
        "prompt_space": "pixel",
        "num_virtual_tokens": None,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
}


def main(file, kind):
    torch.manual_seed(0)
    # Group norm: batch norm has other statistics in each process.
    config = tiny_config(id2label={0: "cat", 1: "dog"}, generator_norm="group", **KINDS[kind])
    model = get_peft_model(tiny_vit(), config).train()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        distributed.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (size,))
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(STEPS, IMAGES, 3, 32, 32, generator=generator)
    labels = torch.randint(2, (STEPS, IMAGES), generator=generator)
    optimizer = torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)
    own = slice(rank * IMAGES // size, (rank + 1) * IMAGES // size)
    for batch, targets in zip(images, labels, strict=True):
        model(pixel_values=batch[own], labels=targets[own]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        torch.save(get_peft_model_state_dict(model, state_dict=whole), file)
    if size > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
