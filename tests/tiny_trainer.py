"""A tiny adapter's trainer."""

import torch
from conftest import tiny_config, tiny_vit
from peft import get_peft_model
from transformers import TrainingArguments, ViTImageProcessor

from pgn_peft import AdapterTrainer, ImageCollator

NAMES = {0: "cat", 1: "dog"}
PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32})


def rows(number=8):
    generator = torch.Generator().manual_seed(0)
    return [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": n % 2} for n in range(number)]


def make_trainer(
    folder,
    trainer_class=AdapterTrainer,
    base="user/vit",
    facts=None,
    processing_class=PROCESSOR,
    adapter_name="default",
    generator="resnet10",
    **more,
):
    config = tiny_config(id2label=NAMES, generator=generator)
    model = get_peft_model(tiny_vit(num_labels=10), config, adapter_name=adapter_name)
    model.peft_config[adapter_name].base_model_name_or_path = base
    options = {"num_train_epochs": 2, "eval_strategy": "epoch", "save_strategy": "epoch", "learning_rate": 1e-3}
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=4, remove_unused_columns=False, report_to="none", use_cpu=True,
        disable_tqdm=True, **(options | more),
    )  # fmt: skip
    own = {"facts": facts} if trainer_class is AdapterTrainer else {}
    return trainer_class(
        model,
        arguments,
        train_dataset=rows(),
        eval_dataset=rows(4),
        data_collator=ImageCollator(num_labels=2),
        compute_metrics=lambda outcome: {
            "accuracy": float((outcome.predictions.argmax(-1) == outcome.label_ids).mean())
        },
        processing_class=processing_class,
        **own,
    )
