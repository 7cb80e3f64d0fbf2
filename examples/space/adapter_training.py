"""Try methods in the order of their cost, as the training script does, and report each step."""

from __future__ import annotations

import tempfile
from functools import partial
from typing import Any

from background import Report, Stopped, Watch
from datasets import DatasetDict
from image_data import add_transforms, class_names
from peft import get_peft_model
from train_image_classifier import hold_out
from transformers import AutoImageProcessor, AutoModelForImageClassification, TrainerCallback, TrainingArguments
from transformers.utils import logging

from pgn_peft import Classifier, ImageCollator, ModelCardInfo, PGNConfig
from pgn_peft.hub import plain_processor
from pgn_peft.hub.image_processors import makes_another_size
from pgn_peft.training import Ladder
from pgn_peft.tuner.adapters import prompt_layer
from pgn_peft.utils.markdown import markdown_table

BATCH = 16
MINUTES, MOST_MINUTES = 2, 10


class Steps(TrainerCallback):
    """Reports each training step."""

    def __init__(self, ladder: Ladder, watch: Watch) -> None:
        self.ladder, self.watch = ladder, watch

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Say which method and which step it is."""
        name = self.ladder.rungs[len(self.ladder.results)].name
        self.watch.report = Report(f"{name}: step {state.global_step} of {state.max_steps}", table(self.ladder))


def table(ladder: Ladder) -> str:
    """Return the results until now in Markdown. No method here changes the base, so that its column is left out."""
    rows = [{name: value for name, value in row.items() if name != "base untouched"} for row in ladder.rows()]
    return markdown_table(rows) if rows else ""


def train(splits: DatasetDict, base: str, minutes: float, name: str, options: dict[str, Any], watch: Watch) -> None:
    """Try methods from a linear head to generated prompts; the last report has the classifier.

    Args:
        splits: train and validation, as `load_splits` returns them.
        base: id or folder of the frozen model.
        minutes: for all methods together.
        name: of the images, for the card.
        options: for `from_pretrained`.
        watch: ends the training after a step; what was chosen until then is kept.
    """
    watch.report = Report("loading the model")
    logging.disable_progress_bar()  # each training loads the model again
    processor = plain_processor(AutoImageProcessor.from_pretrained(base, **options))
    load = partial(AutoModelForImageClassification.from_pretrained, base, use_safetensors=True, **options)
    labels = class_names(splits["train"])
    hold_out(splits)
    plain, validation = add_transforms(splits, processor), splits.get("validation")
    layer = prompt_layer(get_peft_model(load(), PGNConfig(num_labels=len(labels))))
    collator = ImageCollator(len(labels), makes_another_size(layer, processor))

    def collate(rows: list[Any]) -> dict[str, Any]:
        watch.check()  # between steps, and where there are none
        return collator(rows)

    # Not in the visitor's folder, which may be removed while a model is written.
    with tempfile.TemporaryDirectory(prefix="pgn-ladder-") as folder:
        ladder = Ladder(
            load,
            splits["train"],
            dict(enumerate(labels)),
            folder,
            plain=plain,
            validation=validation,
            data_collator=collate,
            arguments=TrainingArguments(folder, per_device_train_batch_size=BATCH, dataloader_pin_memory=False),
            budget_minutes=minutes,
        )
        watch.report = Report(f"{ladder.rungs[0].name}: {len(plain)} training images")
        try:
            for result in ladder.climb([Steps(ladder, watch)]):
                watch.report = Report(f"{result.name}: {result.choice}", table(ladder))
        except Stopped:
            if not ladder.results:
                raise ValueError("There was no result yet. Wait longer, or use fewer images.") from None
        chosen = ladder.chosen
        images = (
            f"{len(plain)} images in cross-validation" if validation is None else f"{len(validation)} held-out images"
        )
        text = f"Chosen: {chosen.name}, accuracy {chosen.accuracy:.3f} on {images}. "
        text += "It is the cheapest within one standard error of the best."
        facts = ModelCardInfo(name, training_log=ladder.rows())
        watch.report = Report(text, table(ladder), Classifier(ladder.load(), processor), facts)
