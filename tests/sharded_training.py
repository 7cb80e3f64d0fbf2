"""Three steps of training, sharded over several processes. tests/test_many_processes.py runs this.

torchrun --nproc_per_node 2 tests/sharded_training.py FOLDER [zero3]

By torch's FSDP2, or by DeepSpeed's ZeRO-3, which must be installed, and told that there are only CPUs:
DS_ACCELERATOR=cpu.
"""

import os
import sys
from pathlib import Path

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
    "deep": {"prompt_depth": "all", "prompt_dropout": 0.0},  # random, and so not the same in each process
    "pixel": {
        "prompt_space": "pixel",
        "num_virtual_tokens": None,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
}


def main(folder, sharding="fsdp2"):
    """Train an adapter of each kind, and save it."""
    train = with_zero3 if sharding == "zero3" else with_fsdp2
    for kind in KINDS:
        adapter = train_kind(kind, train)
        if int(os.environ["RANK"]) == 0:
            torch.save(adapter, Path(folder, f"{kind}.pt"))
    distributed.destroy_process_group()


def train_kind(kind, train):
    """Train an adapter, and return its tensors."""
    torch.manual_seed(0)
    # Group norm: batch norm has other statistics in each process.
    config = tiny_config(id2label={0: "cat", 1: "dog"}, generator_norm="group", **KINDS[kind])
    model = get_peft_model(tiny_vit(), config).train()
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(STEPS, IMAGES, 3, 32, 32, generator=generator)
    labels = torch.randint(2, (STEPS, IMAGES), generator=generator)
    own = slice(rank * IMAGES // size, (rank + 1) * IMAGES // size)
    state = train(model, list(zip(images[:, own], labels[:, own], strict=True)), size)
    return get_peft_model_state_dict(model, state_dict=state)


def optimizer_of(model):
    return torch.optim.SGD([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1)


def with_fsdp2(model, batches, size):
    """Train, sharded if there are several processes; return the whole state."""
    if size > 1:
        if not distributed.is_initialized():
            distributed.init_process_group("gloo")
        mesh = init_device_mesh("cpu", (size,))
        for layer in layers_of(model):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = optimizer_of(model)
    for images, labels in batches:
        model(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def with_zero3(model, batches, size):
    """Train by DeepSpeed; return the whole state."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    settings = {
        "train_micro_batch_size_per_gpu": IMAGES // size,
        "zero_optimization": {"stage": 3},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0,  # by default 1
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer_of(model), config=settings)
    for images, labels in batches:
        engine.backward(engine(pixel_values=images, labels=labels).loss)
        engine.step()
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}


if __name__ == "__main__":
    main(*sys.argv[1:])
