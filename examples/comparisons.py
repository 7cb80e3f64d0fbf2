"""What `train_image_classifier.py` compares an adapter with: a head alone, and the prompts of other images."""

from __future__ import annotations

from datasets import Dataset
from torch.utils.data import DataLoader

from pgn_peft import AdapterTrainer
from pgn_peft.inspection import prompts_of_other_images
from pgn_peft.training import HeadAlone, head_alone


def measure_head_alone(trainer: AdapterTrainer, train: Dataset, validation: Dataset) -> HeadAlone:
    """Measure what a linear head on the frozen model reaches on validation, before anything is trained."""
    arguments = trainer.args
    loaders = (
        DataLoader(
            rows,
            batch_size=arguments.per_device_eval_batch_size,
            collate_fn=trainer.data_collator,
            num_workers=arguments.dataloader_num_workers,
        )
        for rows in (train, validation)
    )
    model = trainer.accelerator.unwrap_model(trainer.model)
    alone = head_alone(model, *loaders)
    if trainer.is_world_process_zero():
        print(f"without prompts: a linear head on the frozen model has a validation accuracy of {alone.linear:.3f}")
        if alone.own is not None:
            own = "zero-shot classification" if model.peft_config["default"].head == "text" else "the model's own head"
            print(f"without prompts: {own} has {alone.own:.3f}")
    return alone


def measure_with_other_prompts(trainer: AdapterTrainer, validation: Dataset) -> float | None:
    """Measure the accuracy on validation when each image gets the prompts of another; None for static prompts."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if model.peft_config["default"].generator == "static":
        return None
    with prompts_of_other_images(model):
        return trainer.predict(validation.shuffle(seed=0), metric_key_prefix="other").metrics["other_accuracy"]


def compare(accuracy: float, alone: HeadAlone, with_other_prompts: float | None, images: int) -> str:
    """Say what prompts add to a linear head, and what prompts for each image add to prompts; one line each."""
    likely = (accuracy * images + 1) / (images + 2)  # of few images all may be right by chance
    chance = (likely * (1 - likely) / images) ** 0.5  # one standard error
    gain = accuracy - alone.linear
    says = f"{gain:+.3f} compared with a linear head without prompts"
    if gain <= chance:
        says += f": prompts add nothing here (differences up to {chance:.3f} are chance)"
    if with_other_prompts is None:
        return says
    gain = accuracy - with_other_prompts
    says += f"\n{gain:+.3f} compared with the prompts of other images"
    if gain <= chance:
        says += ": prompts need not depend on the image here, --generator static is smaller"
    return says
