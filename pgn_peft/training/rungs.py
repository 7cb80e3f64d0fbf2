"""The methods that a ladder tries: how each is built, where it starts from, and how it is trained."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from statistics import median
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import (
    IntervalStrategy,
    PreTrainedModel,
    PrinterCallback,
    SchedulerType,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import SaveStrategy

from pgn_peft.nn.heads import fit_ridge
from pgn_peft.nn.library import TokenLibrary
from pgn_peft.training.linear_probe import extract_features
from pgn_peft.training.parameter_groups import parameter_groups
from pgn_peft.tuner.adapters import prompt_layer
from pgn_peft.tuner.backbones import find_backbone
from pgn_peft.tuner.config import PGNConfig
from pgn_peft.tuner.head import find_head
from pgn_peft.utils.labels import Labels

# Learning rate of the head, which starts anew: prompts learn little beside a head that is already fitted (8 points
# less on EuroSAT with eight images of each class).
HEAD_RATE = 3e-3
STATIC = {"generator": "static"}
INITIALIZER_RANGE = 0.02  # standard deviation of untrained prompts
LORA_MODULES = r".*\.(q_proj|v_proj|query|value|qkv)"  # names of the projections in Transformers and timm
TIMED_IMAGES, TIMES = 16, 3
# What every training has in common, whatever the script's arguments are for its own.
TRAINING = {
    "num_train_epochs": 1.0,  # the number of steps counts
    "eval_strategy": IntervalStrategy.NO,
    "save_strategy": SaveStrategy.NO,
    "logging_strategy": IntervalStrategy.NO,
    "load_best_model_at_end": False,
    "remove_unused_columns": False,
    "disable_tqdm": True,
    "push_to_hub": False,
    "report_to": [],
    "lr_scheduler_type": SchedulerType.COSINE,
    "warmup_steps": 0.1,
}


@dataclass(frozen=True)
class Rung:
    """A method.

    Args:
        name: for tables.
        fields: of `PGNConfig`; empty for methods without prompts.
        rates: learning rates to choose from; none for a method without gradients.
        changes_weights: whether the frozen model is changed.
    """

    name: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    changes_weights: bool = False


RATES = (3e-4, 1e-3, 3e-3)
HEAD = Rung("linear head", STATIC | {"num_virtual_tokens": 0, "prompt_depth": 1})
UNTRAINED = Rung("untrained prompts", STATIC)
LORA = Rung("LoRA", rates=RATES, changes_weights=True)
FULL = Rung("full fine-tuning", rates=(3e-5, 1e-4, 3e-4), changes_weights=True)
# In the order of their cost.
RUNGS = (
    HEAD,
    UNTRAINED,
    Rung("static prompts, first layer", STATIC | {"prompt_depth": 1}, RATES),
    Rung("static prompts, every layer", STATIC | {"prompt_depth": "all"}, RATES),
    Rung("generated prompts, first layer", {"prompt_depth": 1}, RATES),
    Rung("generated prompts, every layer", {"prompt_depth": "all"}, RATES),
    LORA,
    FULL,
)


@dataclass(frozen=True)
class Start:
    """Untrained prompts, which can be drawn again.

    Args:
        depth: the `prompt_depth` that they are drawn for, 1 or "all".
        seed: of the random numbers.
    """

    depth: int | str
    seed: int

    def draw(self, like: Tensor) -> Tensor:
        """Draw prompts of a shape (..., P, D): the same on every device."""
        numbers = torch.randn(like.shape, generator=torch.Generator().manual_seed(self.seed))
        return (INITIALIZER_RANGE * numbers).to(like)


@dataclass(frozen=True)
class Task:
    """Images to learn from, and the model that is to learn them.

    Args:
        make_model: returns the frozen model, a new one in each call.
        id2label: names of the classes by index.
        train: rows of `pixel_values` (C, H, W) and `labels`, with augmentation if there is any.
        plain: the same rows without augmentation.
        validation: rows that are not trained on; None: parts of `plain` are held out.
        collator: makes batches of rows.
        arguments: batch size, precision, device and loader workers.
        seed: of initial values and the order of images.
    """

    make_model: Callable[[], nn.Module]
    id2label: dict[int, str]
    train: Dataset[Any]
    plain: Dataset[Any]
    validation: Dataset[Any] | None
    collator: Callable[[list[Any]], dict[str, Any]]
    arguments: TrainingArguments
    seed: int

    def features(self, model: nn.Module, rows: Dataset[Any]) -> tuple[Tensor, Tensor]:
        """Compute what a model's head is given: features (N, F), and the labels (N,)."""
        loader = DataLoader(
            rows,
            batch_size=self.arguments.eval_batch_size,
            collate_fn=self.collator,
            num_workers=self.arguments.dataloader_num_workers,
        )
        return extract_features(model.eval().to(self.arguments.device), find_heads(model)[0], loader)

    def build(self, rung: Rung, start: Start | None = None) -> nn.Module:
        """Make a model for a rung, with the parameters that it starts from.

        Args:
            rung: the method.
            start: untrained prompts that its static prompts start from; None: those that its config gives.
        """
        set_seed(self.seed)
        model = self.make_model()
        if rung.changes_weights:
            replace_head(model, self.id2label)
            if rung is FULL:
                return model.requires_grad_(True)
            head = [cast(str, find_backbone(model).head)]
            config = LoraConfig(r=8, lora_alpha=16, target_modules=LORA_MODULES, modules_to_save=head)
            return get_peft_model(cast(PreTrainedModel, model), config)
        fields: dict[str, Any] = {"id2label": self.id2label, "problem_type": "single_label_classification"}
        if start is not None:
            fields |= {"prompt_depth": start.depth} | ({"accumulate_prompts": False} if start.depth == "all" else {})
        model = get_peft_model(cast(PreTrainedModel, model), PGNConfig(**(fields | dict(rung.fields))))
        if start is not None:
            library = cast(TokenLibrary, prompt_layer(model).library("default"))
            static = library.tokens if library.slot_prompts is None else library.slot_prompts
            drawn = static[0] if start.depth == 1 and static.ndim == 3 else static  # of the first layer, or of all
            with torch.no_grad():
                drawn.copy_(start.draw(drawn))
        return model

    def train_candidate(
        self,
        rung: Rung,
        start: Start | None,
        rate: float,
        rows: Sequence[int],
        held_out: Dataset[Any] | None,
        steps: int,
        refit: bool = True,
        callbacks: Sequence[TrainerCallback] = (),
    ) -> Trained:
        """Train a model for a rung.

        Args:
            rung: the method.
            start: see `build`.
            rate: learning rate.
            rows: the training images that are used.
            held_out: rows to predict; None: none.
            steps: of training.
            refit: fit a second head to the final features, in closed form.
            callbacks: of `Trainer`.
        """
        model = self.build(rung, start)
        linear = find_heads(model)[1]
        arguments = copy.copy(self.arguments)
        for name, value in TRAINING.items():
            setattr(arguments, name, value)
        arguments.max_steps = steps
        optimizer = torch.optim.AdamW(self._groups(rung, model, linear, rate), weight_decay=0.0)
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=Subset(self.train, rows),
            data_collator=self.collator,
            optimizers=(optimizer, None),
            callbacks=list(callbacks),
        )
        trainer.remove_callback(PrinterCallback)
        start_time = time.perf_counter()
        trainer.train()
        seconds = (time.perf_counter() - start_time) / (steps * min(arguments.train_batch_size, len(rows)))
        head = linear.weight.detach().double().cpu(), linear.bias.detach().double().cpu()
        refitted = head
        if refit:
            refitted = fit_ridge(*self.features(model, Subset(self.plain, rows)), len(self.id2label))[:2]
        if held_out is None:
            return Trained(model, torch.empty(0), torch.empty(0), refitted, torch.empty(0), seconds)
        features, labels = self.features(model, held_out)
        own, other = (features.double() @ weight.mT + bias for weight, bias in (head, refitted))
        return Trained(model, own, other, refitted, labels, seconds)

    def _groups(self, rung: Rung, model: nn.Module, linear: nn.Linear, rate: float) -> list[dict[str, Any]]:
        if not rung.changes_weights:
            return parameter_groups(model, rate, head_learning_rate=HEAD_RATE)
        heads = set(linear.parameters())
        others = [part for part in model.parameters() if part.requires_grad and part not in heads]
        return [{"params": others, "lr": rate}, {"params": list(heads), "lr": HEAD_RATE}]

    def time_of_prediction(self, model: nn.Module) -> float:
        """Time a prediction with prompts, as a multiple of one without."""
        if not isinstance(model, PeftModel) or not isinstance(model.peft_config["default"], PGNConfig):
            return 1.0  # LoRA is merged into the weights before it is used
        number = min(TIMED_IMAGES, len(cast(Any, self.plain)))
        batch = self.collator([self.plain[index] for index in range(number)])
        batch.pop("labels")  # the frozen model has other classes
        device = self.arguments.device
        model = model.eval().to(device)
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
        ratios = []
        for _ in range(TIMES):
            seconds = []
            for turned_off in (False, True):
                with torch.no_grad(), model.disable_adapter() if turned_off else nullcontext():
                    begin = time.perf_counter()
                    model(**inputs)
                    seconds.append(time.perf_counter() - begin)
            ratios.append(seconds[0] / seconds[1])
        return median(ratios)


@dataclass(frozen=True)
class Trained:
    """A trained model, and its answers to images that were held out.

    Args:
        model: on the device, in evaluation mode.
        logits: (N, M) of its head.
        refitted: (N, M) of a head that was fitted again after training, in closed form.
        head: weight (M, F) and bias (M,) of that head.
        labels: (N,) of the images.
        step_seconds: for an image in training.
    """

    model: nn.Module
    logits: Tensor
    refitted: Tensor
    head: tuple[Tensor, Tensor]
    labels: Tensor
    step_seconds: float

    @property
    def rank(self) -> tuple[float, float]:
        """Of candidates the one with the smallest is the best: by accuracy, then by loss."""
        accuracy = float(right(self.logits, self.labels).double().mean())
        return -accuracy, float(F.cross_entropy(self.logits, self.labels))


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """Return for each image whether its class has the largest logit."""
    return logits.argmax(dim=1) == labels


def find_heads(model: nn.Module) -> tuple[nn.Module, nn.Linear]:
    """Return the module of a model that maps features to logits, and the linear layer in it that is trained."""
    head = find_head(model)
    if head is not None:
        return head, cast(nn.Linear, head.head("default"))
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    module = base.get_submodule(cast(str, find_backbone(base).head))
    linear = module.modules_to_save["default"] if isinstance(module, ModulesToSaveWrapper) else module
    return module, cast(nn.Linear, linear)


def set_linear(linear: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """Set a linear layer's weight (M, F) and bias (M,)."""
    with torch.no_grad():
        linear.weight.copy_(weight)
        linear.bias.copy_(bias)


def replace_head(model: nn.Module, id2label: dict[int, str]) -> None:
    """Give a classifier a new linear head, and its config the labels."""
    parent, _, name = cast(str, find_backbone(model).head).rpartition(".")
    module = model.get_submodule(parent)
    width = cast(nn.Linear, getattr(module, name)).in_features
    head = nn.Linear(width, len(id2label))
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    setattr(module, name, head)
    Labels(id2label, "single_label_classification").show_in(model.config)
    cast(Any, model).num_labels = len(id2label)
