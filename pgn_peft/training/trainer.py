"""`AdapterTrainer`, which publishes adapters; BatchNorm in several processes; the last complete checkpoint."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo
from peft import PeftModel
from torch import distributed
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modelcard import extract_hyperparameters_from_trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, TrainOutput

from pgn_peft.hub import publishing
from pgn_peft.hub.classifier import Classifier
from pgn_peft.hub.publishing import ModelCardInfo
from pgn_peft.nn.preprocessing import check_image_processor
from pgn_peft.tuner.adapters import unwrap
from pgn_peft.tuner.tuner_layer import PGNTunerLayer
from pgn_peft.utils import not_none

logger = logging.getLogger(__name__)

FINE_TUNING_RATE = TrainingArguments.__dataclass_fields__["learning_rate"].default
# Suffixes of the durations that `Trainer` logs for an evaluation.
DURATIONS = ("_runtime", "_per_second", "_time")


class AdapterTrainer(Trainer):
    """Transformers' `Trainer`, which pushes the adapter, its image processor and a model card, and no pickles.

    With `push_to_hub=True` it pushes at each checkpoint, or with `hub_strategy="end"` only when `push_to_hub` is
    called. Checkpoints themselves, which contain pickles, are not pushed. The card's hyperparameters, its table of
    evaluations and, if the data set has a name, the metrics of the last evaluation come from the run.

    Args:
        *args: as for `Trainer`.
        facts: information for the card; it takes precedence over that of the run.
        **kwargs: as for `Trainer`; `processing_class` must be the image processor to push.

    Raises:
        TypeError: `push_to_hub` is set, and `processing_class` is not an image processor.
        ValueError: `load_best_model_at_end` is set for a model that `Trainer` does not reload; evaluations would round
            the weights; or `push_to_hub` is set, and the base model is a local folder, which others cannot load.
    """

    def __init__(self, *args: Any, facts: ModelCardInfo | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.facts = facts or ModelCardInfo()
        if self.args.load_best_model_at_end and not isinstance(unwrap(self.model), PeftModel):
            raise ValueError(
                "load_best_model_at_end=True needs a model of peft.get_peft_model: Trainer reloads no other."
            )
        if self.args.fp16_full_eval or self.args.bf16_full_eval:
            raise ValueError(
                "fp16_full_eval and bf16_full_eval round the weights of adapter and model permanently. Use fp16=True "
                "or bf16=True, which compute in half precision and do not change the weights."
            )
        if self.args.push_to_hub:
            # Checked now rather than after hours of training.
            check_image_processor("processing_class", self.processing_class)
            if self.hub_model_id is not None:  # in the first process
                publishing.check_shareable(self.classifier.model, self.hub_model_id)
            if self.args.hub_strategy != HubStrategy.END:
                self.add_callback(_PushWhenSaved(self))
                self.args.hub_strategy = HubStrategy.END  # Trainer's own pushes include training_args.bin, a pickle

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train, as `Trainer` does. Warns of Transformers' default learning rate, at which prompts hardly learn.

        Raises:
            ValueError: the whole model is frozen.
        """
        # In a hyperparameter search with Ray Tune the model is None here; `model_init` makes it later.
        if self.model is not None and not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(
                "The model is frozen. Load the adapter with is_trainable=True, or activate it: "
                "model.set_adapter(name)."
            )
        if self.optimizer is None and self.args.learning_rate == FINE_TUNING_RATE and self.is_world_process_zero():
            logger.warning(
                "`learning_rate` is %g, Transformers' default for whole models, at which prompts hardly learn. Pass "
                "TrainingArguments(learning_rate=1e-3), or a rate for each part: "
                "AdapterTrainer(..., optimizers=(torch.optim.AdamW(parameter_groups(model, 1e-3)), None)).",
                FINE_TUNING_RATE,
            )
        return super().train(*args, **kwargs)

    def _load_best_model(self) -> None:
        # PEFT saves an adapter that is not called "default" in a folder of its name. Trainer does not look there and
        # would load the weights of another adapter (huggingface/transformers#36201).
        checkpoint = Path(not_none(self.state.best_model_checkpoint))
        named = checkpoint / unwrap(self.model).active_adapters[0]
        self.state.best_model_checkpoint = str(named if named.is_dir() else checkpoint)
        try:
            super()._load_best_model()
        finally:
            self.state.best_model_checkpoint = str(checkpoint)

    @property
    def classifier(self) -> Classifier:
        """The model as it is now, with the image processor."""
        return Classifier(self.accelerator.unwrap_model(self.model), self.processing_class)

    def card_facts(self) -> ModelCardInfo:
        """Return the information for the card; `facts` takes precedence over that of the run."""
        given, log = self.facts, _list_evaluations(self.state.log_history)
        hyperparameters = extract_hyperparameters_from_trainer(self)
        if self.optimizer is not None:
            # Trainer reports its own default instead.
            hyperparameters["optimizer"] = type(getattr(self.optimizer, "optimizer", self.optimizer)).__name__
        measured: dict[str, Any] = {}
        if not given.metrics and given.dataset is not None and log:
            metrics = {
                name: value
                for name, value in log[-1].items()
                if not name.endswith(("epoch", "step", "loss"))
                if isinstance(value, (int, float)) and math.isfinite(value)
            }
            measured = {"metrics": metrics, "split": "validation"}
        return dataclasses.replace(
            given,
            hyperparameters=given.hyperparameters or hyperparameters,
            training_log=given.training_log or log,
            **measured,
        )

    def create_model_card(self, model_name: str | None = None) -> None:  # type: ignore[override]  # `facts` holds the rest
        """Write the adapter's card into the output folder, where `Trainer` would write its own."""
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir or "")
            card = publishing.describe(*self.classifier, folder, self.card_facts(), model_name or self.hub_model_id)
            folder.joinpath(publishing.CARD_FILE).write_text(card, encoding="utf-8")

    def push_to_hub(  # type: ignore[override]  # no options for a card; None except in the first process
        self,
        commit_message: str = "End of training",
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> CommitInfo | None:
        """Publish the adapter, its image processor and the card in the repository `args.hub_model_id`.

        Args:
            commit_message: the commit's summary.
            token: a token with write access; None: `args.hub_token`.
            revision: a branch; None: `args.hub_revision`.
            private: whether a new repository is private; None: `args.hub_private_repo`.

        Returns:
            The commit; None except in the first process.

        Raises:
            ValueError: the base model is a local folder, which others cannot load.
            OSError: the upload failed. The files are in the output folder.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if self.hub_model_id is None:  # not in the first process
            return None
        return self.classifier.push_to_hub(
            self.hub_model_id,
            self.card_facts(),
            private=self.args.hub_private_repo if private is None else private,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            commit_message=commit_message,
            save_directory=self.args.output_dir,
        )


class _PushWhenSaved(TrainerCallback):
    def __init__(self, trainer: AdapterTrainer) -> None:
        self.trainer = trainer

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Push the adapter. If that fails, training goes on, and the next push may succeed."""
        try:
            self.trainer.push_to_hub(f"Training in progress, step {state.global_step}")
        except OSError as error:
            logger.warning("A push while training failed. %s", error)


def _list_evaluations(log_history: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """List losses and metrics, one row for each evaluation, also of several data sets."""
    rows: dict[int, dict[str, Any]] = {}
    training_loss: Any = "-"
    for entry in log_history:
        training_loss = entry.get("loss", training_loss)
        for name, value in entry.items():
            if name.startswith("eval_") and not name.endswith(DURATIONS):
                start = {"epoch": entry.get("epoch"), "step": entry["step"], "training_loss": training_loss}
                rows.setdefault(entry["step"], start)[name.removeprefix("eval_")] = value
    return list(rows.values())


class SyncBatchNormCallback(TrainerCallback):
    """Keep BatchNorm's running statistics equal in all processes whenever the model is evaluated or saved.

    DistributedDataParallel broadcasts buffers before each step, so they differ after it.
    """

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Broadcast the buffers of adapters before an evaluation or a checkpoint."""
        is_read = control.should_evaluate or control.should_save or control.should_training_stop
        if is_read and distributed.is_available() and distributed.is_initialized():
            for layer in kwargs["model"].modules():
                for container in layer.adapter_layer_names if isinstance(layer, PGNTunerLayer) else ():
                    for buffer in getattr(layer, container).buffers():
                        distributed.broadcast(buffer, src=0)

    on_epoch_end = on_step_end


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """Find the newest complete checkpoint of `Trainer`: one with trainer_state.json, the last file that it writes.

    Args:
        output_dir: folder with `checkpoint-<step>` folders.

    Returns:
        The folder, or None if there is no complete one.
    """
    folders = (file.parent for file in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*/trainer_state.json"))
    numbered = [folder for folder in folders if folder.name.rpartition("-")[2].isdecimal()]
    return max(numbered, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
