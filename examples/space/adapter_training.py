"""Train an adapter with the parts of the training script, and report each step to somebody who may stop it."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import DatasetDict
from image_data import add_transforms, class_names
from peft import get_peft_model
from train_image_classifier import Arguments, compare, make_trainer, measure_head_alone, square_side
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainerCallback, set_seed

from pgn_peft import Classifier, ModelCardInfo, PGNConfig
from pgn_peft.hub import plain_processor
from pgn_peft.training import LinearProbe

KINDS = ("tokens", "tokens in every layer", "pixels of the image")
THREAD = "adapter-training"
BATCH = 16
SECONDS = 600
MOST_EPOCHS = 30
# A Vision Transformer of 64 numbers for each token needs less of everything.
TINY = {"library_size": 32, "generator_width": 8, "generator_image_size": None, "initializer_range": 0.5}
TINY_HIDDEN_SIZE = 64


@dataclass
class Report:
    """How a run stands.

    Args:
        text: in words.
        curve: epochs, and accuracy on the images that are held out.
        alone: accuracy of a linear head on the frozen model.
        classifier: the trained model; None until the end.
        facts: for its card.
    """

    text: str
    curve: tuple[tuple[float, float], ...] = ()
    alone: LinearProbe | None = None
    classifier: Classifier | None = None
    facts: ModelCardInfo = field(default_factory=ModelCardInfo)


class Watch(TrainerCallback):
    """Reports each step and evaluation, and stops training when it is asked to, or when its time is over."""

    def __init__(self, say: Callable[[Report], None], stop: threading.Event) -> None:
        self.say, self.stop, self.end = say, stop, time.monotonic() + SECONDS
        self.report = Report("")

    def stopped(self) -> bool:
        """Whether to stop."""
        return self.stop.is_set() or time.monotonic() > self.end

    def tell(self, text: str, **changes: Any) -> None:
        """Report how the run stands."""
        self.report = replace(self.report, text=text, **changes)
        self.say(self.report)

    def check_before_first_step(self, rows: Iterable[Any]) -> Iterator[Any]:
        """Pass rows on, unless the run is stopped before it has trained anything."""
        for row in rows:
            if self.stopped():
                raise ValueError(
                    f"There was no training step within {SECONDS} seconds. Use fewer images or a smaller model."
                )
            yield row

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say which step it is."""
        self.tell(f"step {state.global_step} of {state.max_steps}")
        control.should_training_stop = control.should_training_stop or self.stopped()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        """Say how accurate the model is."""
        text = f"epoch {state.epoch:.2g} of {args.num_train_epochs:.0f}"
        self.tell(text, curve=(*self.report.curve, (state.epoch, metrics["eval_accuracy"])))


def is_tiny(model: Any) -> bool:
    """Whether a model is as small as the demo's."""
    return (getattr(model.config, "hidden_size", None) or TINY_HIDDEN_SIZE + 1) <= TINY_HIDDEN_SIZE


def make_config(kind: str, names: list[str], model: Any, processor: Any) -> PGNConfig:
    """Return the configuration of a new adapter of one of `KINDS`."""
    fields: dict[str, Any] = {"id2label": dict(enumerate(names))} | (TINY if is_tiny(model) else {})
    if kind == KINDS[2]:
        fields |= {
            "prompt_space": "pixel",
            "image_size": square_side(processor),
            "image_mean": list(processor.image_mean),
            "image_std": list(processor.image_std),
        }
        # The server's own classes can stand for the task's where they have the same names.
        places = {name: index for index, name in model.config.id2label.items()}
        if set(names) <= set(places):
            fields |= {"head": "frozen", "label_mapping": [places[name] for name in names]}
    else:
        fields["prompt_depth"] = "all" if kind == KINDS[1] else 1
        fields |= {"num_virtual_tokens": 8} if is_tiny(model) else {}
    return PGNConfig(**fields)


def train(
    splits: DatasetDict,
    base: str,
    kind: str,
    epochs: int,
    folder: Path,
    stop: threading.Event,
    name: str = "images of the user's own",
    options: dict[str, Any] | None = None,
) -> Iterator[Report]:
    """Train an adapter in a thread of its own, and report after each step.

    Args:
        splits: train and validation, as `load_splits` returns them.
        base: id or folder of the frozen model.
        kind: one of `KINDS`.
        epochs: passes over the images.
        folder: for what `Trainer` writes.
        stop: ends training after the step; the adapter is kept as it is. It is set when nobody iterates any more.
        name: of the images, for the card.
        options: for `from_pretrained`.

    Yields:
        Reports; the last one has the classifier.
    """
    if kind not in KINDS or not 1 <= epochs <= MOST_EPOCHS:
        raise ValueError(f"Choose one of {', '.join(KINDS)}, and 1 to {MOST_EPOCHS} epochs.")
    events: queue.Queue = queue.Queue()
    watch = Watch(events.put, stop)

    def run() -> None:
        try:
            _train(splits, base, kind, epochs, folder, name, options or {}, watch)
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
    splits: DatasetDict,
    base: str,
    kind: str,
    epochs: int,
    folder: Path,
    name: str,
    options: dict[str, Any],
    watch: Watch,
) -> None:
    watch.tell("loading the model")
    processor = plain_processor(AutoImageProcessor.from_pretrained(base, **options))
    backbone = AutoModelForImageClassification.from_pretrained(base, use_safetensors=True, **options)
    set_seed(0)
    config = make_config(kind, class_names(splits["train"]), backbone, processor)
    model = get_peft_model(backbone, config)
    arguments = Arguments(
        str(folder),
        learning_rate=3e-3 if config.prompt_space == "pixel" or is_tiny(backbone) else 1e-3,
        num_train_epochs=epochs,
        per_device_train_batch_size=BATCH,
        per_device_eval_batch_size=BATCH,
        save_strategy="no",
        load_best_model_at_end=False,
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_num_workers=0,
    )
    without_augmentation = add_transforms(splits, processor)
    trainer = make_trainer(model, splits, arguments, processor, callbacks=[watch])
    number = len(splits["validation"])
    watch.tell(f"measuring a linear head on the frozen model, {len(splits['train']) + number} images")
    collator = trainer.data_collator
    trainer.data_collator = lambda rows: collator([*watch.check_before_first_step(rows)])
    alone = measure_head_alone(trainer, without_augmentation)
    trainer.data_collator = collator
    watch.report.alone = alone
    trainer.train()  # evaluates also when it is stopped
    accuracy = watch.report.curve[-1][1]
    facts = ModelCardInfo(name, split="held out", metrics={"accuracy": accuracy})
    text = f"accuracy {accuracy:.3f} on {number} images that were held out: {compare(accuracy, alone, None, number)}"
    watch.tell(text, classifier=Classifier(trainer.classifier.model.eval(), processor), facts=facts)
