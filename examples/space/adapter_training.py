"""Train an adapter on labelled images, step by step, for somebody who watches and may stop it."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
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
from uploads import read_image

from pgn_peft import AdapterTrainer, CardFacts, Classifier, ImageCollator, PGNConfig
from pgn_peft.hub import plain_processor
from pgn_peft.training import head_alone, parameter_groups

KINDS = ("tokens", "tokens in every layer", "pixels of the image")
THREAD = "adapter-training"
ONE_AT_A_TIME = threading.Lock()
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
        curve: epochs, and accuracy on the images that are held out.
        alone: that of a linear head on the frozen model.
        classifier: the model as it is; None until the end.
        facts: for its card.
    """

    text: str
    curve: tuple[tuple[float, float], ...] = ()
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
        image = read_image(image, image.name) if isinstance(image, Path) else image
        pixel_values: Tensor = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": pixel_values, "labels": self.task.labels[place]}


class Watch(TrainerCallback):
    """Reports each step and evaluation, and stops training when it is asked to, or when its time is over.

    Args:
        say: takes the reports.
        stopped: whether to stop.
    """

    def __init__(self, say: Callable[[Report], None], stopped: Callable[[], bool]) -> None:
        self.say, self.stopped = say, stopped
        self.report = Report("")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say which step it is."""
        self._say(f"step {state.global_step} of {state.max_steps}")
        control.should_training_stop = control.should_training_stop or self.stopped()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Say how accurate the model is."""
        self.report.curve = (*self.report.curve, (state.epoch, metrics["eval_accuracy"]))
        self._say(f"epoch {state.epoch:.2g} of {args.num_train_epochs:.0f}")

    def _say(self, text: str) -> None:
        self.report.text = text
        self.say(replace(self.report))


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
    return (getattr(model.config, "hidden_size", None) or TINY_HIDDEN_SIZE + 1) <= TINY_HIDDEN_SIZE


def make_config(task: Task, model: Any, processor: Any) -> PGNConfig:
    """Return the configuration of a new adapter."""
    fields: dict[str, Any] = {"id2label": dict(enumerate(task.names))}
    if is_tiny(model):
        fields |= TINY
    if task.kind == "tokens in every layer":
        fields["prompt_depth"] = None
    if task.kind == "pixels of the image":
        fields.pop("num_virtual_tokens", None)
        size = getattr(processor, "crop_size", None) or processor.size
        height, width = size.get("height"), size.get("width")
        if height is None or height != width:
            raise ValueError(
                f"`kind` must be tokens for a model whose images are no squares of one size, but got {task.kind!r}. "
                "Choose another kind, or another model."
            )
        fields |= {
            "prompt_space": "pixel",
            "image_size": height,
            "image_mean": list(processor.image_mean),
            "image_std": list(processor.image_std),
        }
        # The server's own classes can stand for the task's where they have the same names.
        own = model.config.id2label
        if set(task.names) <= set(own.values()):
            places = {name: index for index, name in own.items()}
            fields |= {"head": "frozen", "label_mapping": [places[name] for name in task.names]}
    return PGNConfig(**fields)


def train(task: Task, folder: Path, stop: threading.Event, options: dict[str, Any] | None = None) -> Iterator[Report]:
    """Train an adapter in a thread of its own, one at a time, and report after each step.

    Args:
        task: what is trained.
        folder: for what `Trainer` writes.
        stop: ends training after the step; the adapter is kept as it is. It is set when nobody iterates any more.
        options: for `from_pretrained`.

    Yields:
        Reports; the last one has the classifier.

    Raises:
        ValueError, OSError, TypeError: the model cannot be loaded or adapted, or was stopped before its first step.
    """
    events: queue.Queue = queue.Queue()

    def run() -> None:
        try:
            while not ONE_AT_A_TIME.acquire(timeout=1):
                if stop.is_set():
                    return
            try:
                _train(task, folder, stop, options or {}, events.put)
            finally:
                ONE_AT_A_TIME.release()
        except Exception as error:
            events.put(error)
        finally:
            events.put(None)

    threading.Thread(target=run, name=THREAD, daemon=True).start()
    try:
        while (event := events.get()) is not None:
            if isinstance(event, Exception):
                raise event
            yield event
    finally:
        stop.set()  # the thread ends by itself: whoever closes the page must not wait for it


def _train(
    task: Task, folder: Path, stop: threading.Event, options: dict[str, Any], say: Callable[[Report], None]
) -> None:
    end = time.monotonic() + SECONDS

    def stopped() -> bool:
        return stop.is_set() or time.monotonic() > end

    def until_stopped(batches: Iterable) -> Iterator:
        for batch in batches:
            if stopped():
                raise ValueError(
                    f"`stop` must not be pressed before the first step, which must come within {SECONDS} seconds. "
                    "Use fewer images, or a smaller model."
                )
            yield batch

    say(Report("loading the model"))
    processor = plain_processor(AutoImageProcessor.from_pretrained(task.base, **options))
    base = AutoModelForImageClassification.from_pretrained(task.base, use_safetensors=True, **options)
    set_seed(0)
    config = make_config(task, base, processor)
    model = get_peft_model(base, config)
    rows, held_out = (Rows(task, chosen, processor) for chosen in divide(task.labels))
    collator = ImageCollator(len(task.names))
    say(Report(f"measuring a linear head on the frozen model, {len(rows) + len(held_out)} images"))
    loaders = (until_stopped(DataLoader(part, batch_size=BATCH, collate_fn=collator)) for part in (rows, held_out))
    alone = head_alone(model, *loaders).linear

    rate = 3e-3 if config.prompt_space == "pixel" or is_tiny(base) else 1e-3
    groups = parameter_groups(model, rate)
    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=task.epochs,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
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
    watch = Watch(say, stopped)
    watch.report.alone = alone
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
        callbacks=[watch],
    )
    trainer.train()  # evaluates also when it is stopped
    accuracy = watch.report.curve[-1][1]
    facts = CardFacts(task.name, split="held out", metrics={"accuracy": accuracy})
    classifier = Classifier(trainer.classifier.model.eval(), processor)
    text = summarize(accuracy, alone, len(held_out))
    say(replace(watch.report, text=text, classifier=classifier, facts=facts))


def summarize(accuracy: float, alone: float, number: int) -> str:
    """Say what prompts add to a linear head, and whether so many images can tell."""
    likely = (accuracy * number + 1) / (number + 2)  # of few images all may be right by chance
    standard_error = (likely * (1 - likely) / number) ** 0.5
    says = (
        f"accuracy {accuracy:.3f} on {number} images that were held out; a linear head without prompts has {alone:.3f}"
    )
    if abs(accuracy - alone) > standard_error:
        return says
    return f"{says}: too few images to tell the two apart (one standard error is {standard_error:.3f})"
