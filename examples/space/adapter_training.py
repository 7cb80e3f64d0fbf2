"""Train an adapter on labelled images, step by step, for somebody who watches and may stop it."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from PIL import Image
from sklearn.metrics import accuracy_score
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from pgn_peft import AdapterTrainer, CardFacts, Classifier, ImageCollator, PGNConfig
from pgn_peft.hub import plain_processor
from pgn_peft.nn.image_files import open_image
from pgn_peft.nn.preprocessing import Preprocessing
from pgn_peft.training import head_alone, parameter_groups

KINDS = ("tokens", "tokens in every layer", "pixels of the image")
THREAD = "adapter-training"
BATCH = 16
SECONDS = 600
MOST_EPOCHS = 30
# A Vision Transformer of 64 numbers for each token needs less of everything.
TINY = {
    "num_virtual_tokens": 8,
    "library_size": 32,
    "generator_width": 8,
    "generator_image_size": None,
    "initializer_range": 0.5,
}
TINY_HIDDEN_SIZE = 64


@dataclass
class Report:
    """How a run stands.

    Args:
        text: in words.
        curve: accuracy on the images that are held out, by epoch.
        alone: that of a linear head on the frozen model.
        classifier: the model as it is; None until the end.
        facts: for its card.
    """

    text: str
    curve: list[float] = field(default_factory=list)
    alone: float | None = None
    classifier: Classifier | None = None
    facts: CardFacts = field(default_factory=CardFacts)


@dataclass
class Task:
    """What is trained.

    Args:
        images: opened, or the paths of their files.
        labels: their classes, indices of `names`.
        names: of the classes.
        base: id or folder of the frozen model.
        kind: one of `KINDS`.
        epochs: passes over the images.
        name: of the images, for the card.
    """

    images: list[Image.Image | Path]
    labels: list[int]
    names: list[str]
    base: str
    kind: str = KINDS[0]
    epochs: int = 8
    name: str = "images of the user's own"

    def __post_init__(self) -> None:
        if not self.base.strip():
            raise ValueError("`base` must be the id or folder of a model, but got nothing. Name one.")
        if self.kind not in KINDS:
            raise ValueError(f"`kind` must be one of {', '.join(KINDS)}, but got {self.kind!r}. Choose one of these.")
        if not 1 <= self.epochs <= MOST_EPOCHS:
            raise ValueError(f"`epochs` must lie in 1..{MOST_EPOCHS}, but got {self.epochs}. Choose another number.")


class Rows(Dataset):
    """Some of a task's images, as the model takes them."""

    def __init__(self, task: Task, chosen: list[int], processor: Any) -> None:
        self.task, self.chosen, self.processor = task, chosen, processor

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `pixel_values` (C, H, W) and `labels`."""
        place = self.chosen[index]
        image = self.task.images[place]
        image = open_image(image) if isinstance(image, Path) else image
        pixel_values: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixel_values, "labels": self.task.labels[place]}


class Watch(TrainerCallback):
    """Reports each evaluation, and stops training when asked to, or when its time is over."""

    def __init__(self, events: queue.Queue, stop: threading.Event) -> None:
        self.events, self.stop, self.end = events, stop, time.monotonic() + SECONDS

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say which step it is."""
        self.events.put((f"step {state.global_step} of {state.max_steps}", None))
        if self.stop.is_set() or time.monotonic() > self.end:
            control.should_training_stop = True

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Say how accurate the model is."""
        self.events.put((f"epoch {state.epoch:.0f} of {args.num_train_epochs:.0f}", metrics["eval_accuracy"]))


def divide(labels: list[int]) -> tuple[list[int], list[int]]:
    """Choose the images to train on and those that are held out: of each class a fifth, and one at least."""
    of_class: dict[int, list[int]] = {}
    for index in random.Random(0).sample(range(len(labels)), len(labels)):
        of_class.setdefault(labels[index], []).append(index)
    train: list[int] = []
    held_out: list[int] = []
    for indices in of_class.values():
        number = max(1, round(len(indices) / 5))
        held_out += indices[:number]
        train += indices[number:]
    return train, held_out


def is_tiny(model: Any) -> bool:
    """Whether a model is as small as the demo's."""
    return getattr(model.config, "hidden_size", TINY_HIDDEN_SIZE + 1) <= TINY_HIDDEN_SIZE


def make_config(task: Task, model: Any, preprocessing: Preprocessing) -> PGNConfig:
    """Return the configuration of a new adapter."""
    fields: dict[str, Any] = {"id2label": dict(enumerate(task.names))}
    if is_tiny(model):
        fields |= TINY
    if task.kind == "tokens in every layer":
        fields["prompt_depth"] = None
    if task.kind == "pixels of the image":
        fields.pop("num_virtual_tokens", None)
        height, width = preprocessing.output_size or (0, 1)
        if height != width:
            raise ValueError(
                f"`kind` must be tokens for a model whose images are no squares of one size, but got {task.kind!r}. "
                "Choose another kind, or another model."
            )
        fields |= {
            "prompt_space": "pixel",
            "image_size": height,
            "image_mean": list(preprocessing.image_mean),
            "image_std": list(preprocessing.image_std),
        }
        # The server's own classes can stand for the task's where they have the same names.
        own = model.config.id2label
        if set(task.names) <= set(own.values()):
            places = {name: index for index, name in own.items()}
            fields |= {"head": "frozen", "label_mapping": [places[name] for name in task.names]}
    return PGNConfig(**fields)


def train(task: Task, folder: Path, stop: threading.Event) -> Iterator[Report]:
    """Train an adapter in a thread of its own, and report after each step.

    Args:
        task: what is trained.
        folder: for what `Trainer` writes.
        stop: ends training after the step; the adapter is kept as it is.

    Yields:
        Reports; the last one has the classifier. If the iteration is given up, training stops.

    Raises:
        ValueError, OSError, TypeError: the model cannot be loaded or adapted.
    """
    yield Report("loading the model")
    processor = plain_processor(AutoImageProcessor.from_pretrained(task.base))
    preprocessing = Preprocessing.from_processor(processor)
    base = AutoModelForImageClassification.from_pretrained(task.base)
    set_seed(0)
    config = make_config(task, base, preprocessing)
    model = get_peft_model(base, config)
    rows, held_out = (Rows(task, chosen, processor) for chosen in divide(task.labels))
    collator = ImageCollator(len(task.names))
    yield Report(f"measuring a linear head on the frozen model, {len(rows) + len(held_out)} images")
    loaders = (DataLoader(part, batch_size=BATCH, collate_fn=collator) for part in (rows, held_out))
    alone = head_alone(model, *loaders).linear

    rate, library = (3e-3, 30) if config.prompt_space == "pixel" else (1e-3, 10 if config.prompt_depth == 1 else 1)
    if is_tiny(base):
        rate = 3e-3
    groups = parameter_groups(model, rate, library_learning_rate=library * rate, head_learning_rate=3 * rate)
    events: queue.Queue = queue.Queue()
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=task.epochs,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=100,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        eval_strategy="epoch",
        save_strategy="no",
        logging_strategy="no",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    trainer = AdapterTrainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=held_out,
        data_collator=collator,
        processing_class=processor,
        compute_metrics=lambda outcome: {
            "accuracy": accuracy_score(outcome.label_ids, outcome.predictions.argmax(axis=-1))
        },
        optimizers=(torch.optim.AdamW(groups), None),
        callbacks=[Watch(events, stop)],
    )

    def run() -> None:
        try:
            trainer.train()  # evaluates also when it is stopped
            events.put(None)
        except Exception as error:
            events.put(error)

    thread = threading.Thread(target=run, name=THREAD, daemon=True)
    thread.start()
    curve: list[float] = []
    try:
        while (event := events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            text, accuracy = event
            if accuracy is not None:
                curve.append(accuracy)
            yield Report(text, list(curve), alone)
    finally:
        stop.set()
        thread.join()
    facts = CardFacts(task.name, split="held out", metrics={"accuracy": curve[-1]})
    yield Report(_summary(curve[-1], alone, len(held_out)), curve, alone, trainer.classifier, facts)


def _summary(accuracy: float, alone: float, number: int) -> str:
    chance = (accuracy * (1 - accuracy) / number) ** 0.5
    says = (
        f"accuracy {accuracy:.3f} on {number} images that were held out; a linear head without prompts has {alone:.3f}"
    )
    return (
        says
        if accuracy - alone > chance
        else f"{says}: prompts add nothing here yet (one standard error is {chance:.3f})"
    )
