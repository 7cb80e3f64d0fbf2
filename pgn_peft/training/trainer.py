"""`AdapterTrainer`: a `Trainer` whose pushes hold adapter, image processor and card, and no pickles."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import CommitInfo, HfApi
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments
from transformers.modelcard import extract_hyperparameters_from_trainer, parse_log_history
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import HubStrategy, TrainOutput
from transformers.utils.hub import PushInProgress

from pgn_peft.hub import publishing
from pgn_peft.hub.classifier import Classifier
from pgn_peft.hub.model_card import CardFacts
from pgn_peft.nn.preprocessing import check_image_processor
from pgn_peft.training.distributed import check_processes_meet
from pgn_peft.tuner.adapters import unwrap
from pgn_peft.utils.files import replacing
from pgn_peft.utils.values import filled

logger = logging.getLogger(__name__)

FINE_TUNING_RATE = TrainingArguments.__dataclass_fields__["learning_rate"].default
STRATEGIES = (HubStrategy.END, HubStrategy.EVERY_SAVE)

# Whether label smoothing divides by the number of labels in all accumulated batches, which it does not in Transformers
# 5.10. (huggingface/transformers#46731)
SMOOTHING_COUNTS_LABELS = "num_items_in_batch" in inspect.signature(LabelSmoother.__call__).parameters


class AdapterTrainer(Trainer):
    """Transformers' `Trainer`, whose pushes hold the adapter, its image processor and a card, and no pickles.

    Also corrects losses of regression and of several labels per image, which `Trainer` multiplies by the number of
    processes and of accumulated batches, as that of Transformers 5.10 does with label smoothing.

    The card's hyperparameters, its table of evaluations and, where the data set has a name, the last evaluation's
    metrics come from the run.

    Args:
        *args: as for `Trainer`.
        facts: facts for the card; they take precedence over those of the run.
        **kwargs: as for `Trainer`; `processing_class` must be the image processor to push.

    Raises:
        TypeError: `push_to_hub` is set, and `processing_class` is not an image processor.
        ValueError: `hub_strategy` is one that publishes whole checkpoints, the base model is a folder that nobody
            else has, evaluations would round the weights (`bf16_full_eval`, `fp16_full_eval`), or processes that were
            launched together have not joined one group.
    """

    hub_model_id: Any  # Trainer annotates neither, and begins with None
    push_in_progress: Any

    def __init__(
        self, model: nn.Module | None = None, *args: Any, facts: CardFacts | None = None, **kwargs: Any
    ) -> None:
        inner = None if model is None else unwrap(model)  # None: `model_init` makes the model
        if inner is not None and inner is not model:
            # Trainer would save the names of the wrapper, and load no checkpoint into it.
            logger.warning(
                "Compiling the model again, in place and with torch's default options. Pass the plain model and "
                "TrainingArguments(torch_compile=True, torch_compile_mode=...) for others."
            )
            inner.compile()
        super().__init__(inner, *args, **kwargs)
        if self.args.load_best_model_at_end and not isinstance(unwrap(self.model), PeftModel):
            raise ValueError(
                "`load_best_model_at_end` must be False for a model that got its adapter from `add_adapter`, but got "
                "True: Transformers cannot load its checkpoints again. Make the model with "
                "peft.get_peft_model(model, config)."
            )
        for name in ("fp16_full_eval", "bf16_full_eval"):
            if getattr(self.args, name):
                raise ValueError(
                    f"`{name}` must be False, but got True: an evaluation rounds the weights of the adapter and of "
                    "the frozen model for good, and what is saved afterwards has lost precision. Use "
                    f"{name.removesuffix('_full_eval')}=True, which computes in half precision and leaves them alone."
                )
        check_processes_meet(self.args)
        self.facts = facts or CardFacts()
        if self.args.push_to_hub and self.args.hub_strategy not in STRATEGIES:
            raise ValueError(
                f"`hub_strategy` must be one of {', '.join(strategy.value for strategy in STRATEGIES)}, but got "
                f"{HubStrategy(self.args.hub_strategy).value!r}: a whole checkpoint holds pickles. Keep "
                "checkpoints to yourself."
            )
        if self.args.push_to_hub:
            check_image_processor("processing_class", self.processing_class)
        if self.args.push_to_hub and self.is_world_process_zero():
            # Now, rather than after hours of training.
            publishing.check_shareable(self.classifier.model, self.hub_model_id)

    def _load_best_model(self) -> None:
        # PEFT saves an adapter that is not called "default" in a folder of its name, where Trainer does not look.
        checkpoint = Path(filled(self.state.best_model_checkpoint))
        model: Any = self.model
        named = checkpoint / model.active_adapters[0]
        self.state.best_model_checkpoint = str(named if named.is_dir() else checkpoint)
        try:
            super()._load_best_model()
        finally:
            self.state.best_model_checkpoint = str(checkpoint)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, as `Trainer` does. Warns of Transformers' default learning rate, at which prompts hardly learn.

        Raises:
            ValueError: all of the model is frozen.
        """
        # Ray Tune's hyperparameter search removes the model, and `model_init` makes it again.
        if self.model is not None and not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(
                "`model` must have trainable parameters, but got a frozen one. Load the adapter with "
                "is_trainable=True, or activate it: model.set_adapter(name)."
            )
        if self.optimizer is None and self.args.learning_rate == FINE_TUNING_RATE and self.is_world_process_zero():
            logger.warning(
                "`learning_rate` is %g, Transformers' default for whole models, at which prompts hardly learn. Pass "
                "TrainingArguments(learning_rate=1e-3), or a rate for each part: "
                "AdapterTrainer(..., optimizers=(torch.optim.AdamW(parameter_groups(model, 1e-3)), None)).",
                FINE_TUNING_RATE,
            )
        return super().train(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Compute the loss, as `Trainer` does.

        Raises:
            ValueError: labels are numbers (regression, several labels per image), which cannot be smoothed.
        """
        if self.label_smoother is not None and self.compute_loss_func is None and _are_numbers(inputs.get("labels")):
            raise ValueError(
                "`label_smoothing_factor` must be 0 for labels that are numbers (regression, several labels per "
                f"image), but got {self.args.label_smoothing_factor}. It smooths class indices only."
            )
        return super().compute_loss(model, inputs, *args, **kwargs)

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Tensor | int | None:
        # Trainer lets a loss divide by the number of labels in all processes and accumulated batches. Cross-entropy
        # does; the losses of numbers (regression, several labels per image) are means that ignore it, and would be
        # multiplied by the number of processes and of accumulated batches. A loss function of the user's divides by
        # the number itself, as for `Trainer`.
        labels = batch_samples[0].get("labels") if batch_samples else None
        smoothed = self.label_smoother is not None and not SMOOTHING_COUNTS_LABELS
        if self.compute_loss_func is None and (smoothed or _are_numbers(labels)):
            return None
        return super()._get_num_items_in_batch(batch_samples, device)

    @property
    def classifier(self) -> Classifier:
        """The model as it is now, with the image processor."""
        return Classifier(self.accelerator.unwrap_model(self.model), self.processing_class)

    def card_facts(self) -> CardFacts:
        """Return the facts of the card; given ones take precedence over those of the run."""
        _, log, results = parse_log_history(self.state.log_history)
        hyperparameters = extract_hyperparameters_from_trainer(self)
        if self.optimizer is not None:
            # Trainer reports its own default instead.
            hyperparameters["optimizer"] = type(getattr(self.optimizer, "optimizer", self.optimizer)).__name__
        facts = dataclasses.replace(
            self.facts,
            hyperparameters=self.facts.hyperparameters or hyperparameters,
            training_log=self.facts.training_log or log or (),
        )
        if facts.metrics or facts.dataset is None:
            return facts
        metrics = {
            name.lower().replace(" ", "_"): value
            for name, value in (results or {}).items()
            if name != "Loss" and isinstance(value, (int, float)) and math.isfinite(value)
        }
        return dataclasses.replace(facts, metrics=metrics, split="validation")

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have errors of their own
            raise OSError(
                f"`output_dir` must take the checkpoint of step {self.state.global_step}, but got "
                f"{self.args.output_dir!r}: {error}. Free space, and go on from the last complete checkpoint."
            ) from error

    def create_model_card(self, model_name: str | None = None) -> None:  # type: ignore[override]  # rest: `facts`
        """Write the adapter's card into the output folder, where `Trainer` would write its own."""
        if self.is_world_process_zero():
            name = model_name or self.hub_model_id or Path(filled(self.args.output_dir)).name
            with replacing(Path(filled(self.args.output_dir))) as folder:
                existing = publishing.read_card(Path(filled(self.args.output_dir), publishing.CARD_FILE))
                publishing.write_card(*self.classifier, folder, self.card_facts(), name, existing)

    def push_to_hub(  # type: ignore[override]  # no options for a card, None in all processes but the first
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Publish the adapter, its image processor and the card on `args.hub_model_id`.

        Args:
            commit_message: the commit's summary.
            blocking: wait until it is there.
            token: in place of `args.hub_token`.
            revision: in place of `args.hub_revision`, a branch.
            private: in place of `args.hub_private_repo`.

        Returns:
            The commit, or its future; None in all processes but the first.

        Raises:
            ValueError: the base model is a folder that nobody else has.
            OSError: the upload failed. The files are in the output folder, and the message names a remedy.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        upload = publishing.Upload(
            self.hub_model_id,
            private=self.args.hub_private_repo if private is None else private,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
        )
        publishing.check_shareable(self.classifier.model, self.hub_model_id)
        folder = Path(filled(self.args.output_dir))
        files = publishing.save(*self.classifier, folder, self.card_facts(), self.hub_model_id)
        if blocking:
            return publishing.push_files(folder, files, upload)
        return HfApi().run_as_future(publishing.push_files, folder, files, upload)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # Trainer's own would add training_args.bin, a pickle, and leave PEFT's template of a card.
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        running = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if running and not self.args.hub_always_push:
            return
        message = f"Training in progress, step {self.state.global_step}"
        push = cast("Future[CommitInfo]", self.push_to_hub(commit_message=message, blocking=False))
        push.add_done_callback(_report)
        self.push_in_progress = PushInProgress([push])  # type: ignore[arg-type]  # annotated as one job


def _are_numbers(labels: Any) -> bool:
    return isinstance(labels, Tensor) and labels.is_floating_point()


def _report(push: Future[CommitInfo]) -> None:
    """Warn of a push in the background that failed; training continues, and the next push may succeed."""
    if not push.cancelled() and push.exception() is not None:
        logger.warning("A push while training failed. %s", push.exception())
