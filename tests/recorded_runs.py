"""Runs of train_image_classifier.py that tell what each process saw and what it held at the end.

As a script, with `examples` in PYTHONPATH, it does all runs of a file in the processes of one launch, because a launch
takes longer than a run.
"""

import json
import sys
import zlib
from pathlib import Path

from safetensors.torch import save_file


def recorded_run(command):
    """Train; return the images of each step (a number for each, from its pixels), the adapter, and any error."""
    import train_image_classifier as script

    images, trainers = [], []
    make = script.make_trainer

    def make_recorded(*arguments):
        trainer = make(*arguments)
        train = trainer.training_step

        def training_step(model, inputs, *more):
            step = trainer.state.global_step
            images.extend([step, zlib.crc32(image.numpy().tobytes())] for image in inputs["pixel_values"])
            return train(model, inputs, *more)

        trainer.training_step = training_step
        trainers.append(trainer)
        return trainer

    script.make_trainer = make_recorded
    error = None
    try:
        script.main([str(word) for word in command])
    except ValueError as raised:
        error = str(raised)
    finally:
        script.make_trainer = make
    model = trainers[0].model
    tensors = {name.replace(".default.", "."): t.clone() for name, t in model.state_dict().items() if "pgn_" in name}
    return {"images": images, "error": error, "tensors": tensors, "precision": trainers[0].accelerator.mixed_precision}


def several_labels(steps_to_accumulate):
    """Train on images with several labels each, where the loss is no sum that could be divided by their number."""
    import torch
    from conftest import tiny_config, tiny_vit
    from peft import get_peft_model
    from transformers import TrainingArguments

    from pgn_peft import AdapterTrainer, ImageCollator

    generator = torch.Generator().manual_seed(0)
    rows = [
        {
            "pixel_values": torch.randn(3, 32, 32, generator=generator),
            "labels": torch.randint(2, (3,), generator=generator).float(),
        }
        for _ in range(32)
    ]
    torch.manual_seed(0)
    config = tiny_config(generator_norm="group", num_labels=3, problem_type="multi_label_classification")
    trainer = AdapterTrainer(
        get_peft_model(tiny_vit(), config),
        TrainingArguments(
            "unused",
            optim="sgd",
            learning_rate=0.1,
            max_grad_norm=0,
            max_steps=3,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            gradient_accumulation_steps=steps_to_accumulate,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=rows,
        eval_dataset=rows[:16],
        data_collator=ImageCollator(num_labels=3),
    )
    trainer.train()
    loss = torch.tensor(trainer.evaluate()["eval_loss"])
    tensors = {name: t.clone() for name, t in trainer.model.state_dict().items() if "pgn_" in name}
    return {"images": [], "error": None, "tensors": tensors | {"eval_loss": loss}}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    runs = json.loads((folder / "runs.json").read_text(encoding="utf-8"))
    records = {name: recorded_run(command) for name, command in runs.items()} | {"several_labels": several_labels(2)}
    from torch import distributed

    for name, record in records.items():
        stem = f"{name}-{distributed.get_rank()}"
        save_file(record.pop("tensors"), folder / f"{stem}.safetensors")
        (folder / f"{stem}.json").write_text(json.dumps(record), encoding="utf-8")
