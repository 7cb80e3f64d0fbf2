"""Runs of `Trainer` that tell what each process holds at the end. tests/test_many_processes.py runs this.

torchrun --nproc_per_node 2 tests/recorded_runs.py FOLDER
"""

import sys
from pathlib import Path

import torch
from conftest import tiny_config, tiny_vit
from peft import get_peft_model
from safetensors.torch import save_file
from torch import distributed
from transformers import Trainer, TrainingArguments

from pgn_peft import AdapterTrainer, ImageCollator
from pgn_peft.training import SyncBatchNormCallback

PROBLEMS = ("single_label_classification", "multi_label_classification", "regression", "smoothed")


def run(problem, accumulated_batches):
    """Train by plain gradient descent on 4 images in each batch; return the adapter and the loss of an evaluation.

    Unclipped and with group norm: so gradients of the wrong scale show, and processes with different images agree.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(32, 3, 32, 32, generator=generator)
    labels = torch.randint(3, (32,), generator=generator)
    fields = {"num_labels": 3}
    if problem == "multi_label_classification":
        labels = torch.randint(2, (32, 3), generator=generator).float()
        fields["problem_type"] = problem
    if problem == "regression":
        labels, fields = labels.float(), {"num_labels": 1}
    rows = [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]
    torch.manual_seed(0)
    model = get_peft_model(tiny_vit(), tiny_config(generator_norm="group", **fields))
    options = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0, "max_steps": 3, "save_strategy": "no"}
    options |= {"gradient_accumulation_steps": accumulated_batches}
    options |= {"label_smoothing_factor": 0.2} if problem == "smoothed" else {}
    trainer = Trainer(
        model,
        arguments("unused", **options),
        train_dataset=rows,
        eval_dataset=rows[:16],
        data_collator=ImageCollator(),
    )
    trainer.train()
    return adapter_of(trainer) | {"eval_loss": torch.tensor(trainer.evaluate()["eval_loss"])}


def run_with_batch_norm(folder):
    """Train with batch norm, whose statistics differ between processes unless they are broadcast."""
    generator = torch.Generator().manual_seed(0)
    rows = [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": n % 2} for n in range(16)]
    trainer = AdapterTrainer(
        get_peft_model(tiny_vit(), tiny_config(num_labels=2)),
        arguments(folder, num_train_epochs=1, learning_rate=1e-2, save_strategy="epoch"),
        train_dataset=rows,
        data_collator=ImageCollator(num_labels=2),
        callbacks=[SyncBatchNormCallback()],
    )
    trainer.train()
    return adapter_of(trainer)


def arguments(folder, **options):
    fixed = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "report_to": "none", "use_cpu": True}
    return TrainingArguments(str(folder), disable_tqdm=True, **fixed, **options)


def adapter_of(trainer):
    state = trainer.model.state_dict()
    return {name.replace(".default.", "."): tensor.clone() for name, tensor in state.items() if "pgn_" in name}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    runs = {problem: run(problem, 2) for problem in PROBLEMS} | {"batch_norm": run_with_batch_norm(folder / "run")}
    for name, tensors in runs.items():
        save_file(tensors, folder / f"{name}-{distributed.get_rank()}.safetensors")
    distributed.destroy_process_group()
