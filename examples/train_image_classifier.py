"""Fine-tune a frozen Vision Transformer with generated prompts on your own images.

A folder of images, one subfolder for each class (it is split 80 / 10 / 10 if it has no train, validation and test
folders), parquet files named after their splits, or a data set on the Hub:

    python examples/train_image_classifier.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset path/to/images --output_dir outputs/my-adapter

For a hosted model: prompts that are valid pixels, and the model's own classes mapped to the task's.
`deploy_input_only.py` shows how the result, outputs/my-adapter/prompter, is used:

    python examples/train_image_classifier.py --model_name_or_path facebook/deit-tiny-patch16-224 \
        --dataset path/to/images --prompt_space pixel --head frozen --label_mapping true \
        --output_dir outputs/my-adapter

Not sure which method? Let your images decide, from a linear head to generated prompts (docs/train.md):

    python examples/train_image_classifier.py --method auto --model_name_or_path facebook/deit-tiny-patch16-224 \
        --dataset path/to/images --output_dir outputs/my-adapter

CLIP or SigLIP with texts as classes, of which only prompts are trained: --head text. Go on from an adapter, also with
other classes: --adapter outputs/my-adapter. Resume an interrupted run: --resume_from_checkpoint true. Publish:
--push_to_hub true --hub_model_id user/name. Several processes (docs/train.md):

    accelerate launch --config_file examples/accelerate/one_machine_gpus.yaml examples/train_image_classifier.py ...

The output folder then holds the adapter with its labels (adapter_model.safetensors, adapter_config.json), the image
processor, a model card and results.json. `pgn_peft.load_classifier("outputs/my-adapter")` loads it, and `predict.py`
classifies a folder of images with it. `--smoke` trains a tiny model offline, in seconds; it ends with

    test accuracy 1.000
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import torch
import transformers
from datasets import Dataset, DatasetDict, List, concatenate_datasets
from image_data import DataArguments, add_transforms, class_names, load_processor, load_splits, say, smoke_arguments
from peft import PeftModel, get_peft_model
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, load_peft_weights, set_peft_model_state_dict
from plotting import plot_ladder
from safetensors.torch import load_file
from sklearn.metrics import accuracy_score, f1_score
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoTokenizer,
    HfArgumentParser,
    IntervalStrategy,
    PreTrainedModel,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from pgn_peft import (
    AdapterTrainer,
    Classifier,
    ImageCollator,
    ModelCardInfo,
    PGNConfig,
    embed_texts,
    frequency_mapping,
    make_prompter,
    use_texts,
)
from pgn_peft.hub.image_processors import made_size, makes_another_size
from pgn_peft.inspection import shuffled_prompts
from pgn_peft.training import (
    Ladder,
    LinearProbe,
    SyncBatchNormCallback,
    last_complete_checkpoint,
    linear_probe,
    parameter_groups,
    refit_head,
)
from pgn_peft.tuner.adapters import prompt_layer
from pgn_peft.tuner.backbones import SUPPORTED
from pgn_peft.utils.markdown import markdown_table

EPOCHS, FEWEST_STEPS = 12, 100
MOST_WORKERS = 8
FEWEST_TO_COMPARE = 200  # validation images

# Fields of `PGNConfig` that are arguments of the script as they are.
FIELDS = (
    "num_virtual_tokens",
    "library_size",
    "generator",
    "generator_image_size",
    "generator_width",
    "generator_norm",
    "generator_rank",
    "static_prompts",
    "accumulate_prompts",
    "initializer_range",
    "mixing_init_std",
    "prompt_space",
    "prompt_layout",
    "jpeg_quality",
    "prompt_dropout",
    "head",
)
UNUSED_BY_AUTO = (*FIELDS, "adapter", "prompt_depth", "label_mapping", "text_embeds", "push_to_hub")
WHOLE_MODEL = ("config.json", "model.safetensors")


@dataclass
class ModelArguments:
    """The frozen model, and what is not a field of `PGNConfig`."""

    model_name_or_path: str = field(metadata={"help": "Id or path of the model."})
    model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the model."})
    method: str = field(
        default="prompts",
        metadata={
            "help": "'prompts', by the options below; or 'auto': try methods in the order of their cost, from a "
            "linear head on, and keep the cheapest one within a standard error of the best.",
            "choices": ["prompts", "auto"],
        },
    )
    budget_minutes: float = field(default=15.0, metadata={"help": "With --method auto: time for all methods."})
    allow_weights: bool = field(
        default=False, metadata={"help": "With --method auto: also try LoRA and full fine-tuning."}
    )
    refit_head: bool = field(
        default=True,
        metadata={
            "help": "Fit the trained head once more in closed form, and keep it where it is better on validation. In "
            "one process."
        },
    )
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "Adapter to continue from, for the same or other classes; all other options of adapters come from "
            "it. Its head keeps the classes that have the same names."
        },
    )
    prompt_depth: int | None = field(
        default=None,
        metadata={
            "help": "Number of encoder layers with prompts of their own; 0: all of them. By default all, but 1 for "
            "prompts that are or become pixels, and for texts."
        },
    )
    label_mapping: bool = field(
        default=False, metadata={"help": "With a frozen head: read the model's classes as the task's."}
    )
    templates: list[str] = field(
        default_factory=lambda: ["a photo of a {}."],
        metadata={
            "help": "With head 'text': sentences with {} for a class's name, embedded by the model's text tower."
        },
    )
    text_embeds: str | None = field(
        default=None,
        metadata={
            "help": "With head 'text', for a model without a text tower: a safetensors file with one tensor, an "
            "embedding for each class in the order of the data set's labels."
        },
    )


def _argument(name: str) -> tuple[str, type, Any]:
    declared = PGNConfig.__dataclass_fields__[name]
    metadata = {"help": declared.metadata["help"]}
    return name, get_type_hints(PGNConfig)[name], field(default=declared.default, metadata=metadata)


AdapterArguments = make_dataclass("AdapterArguments", map(_argument, FIELDS), bases=(ModelArguments,))


@dataclass
class Arguments(TrainingArguments):
    """`TrainingArguments` with defaults that suit adapters."""

    recipe: str = field(
        default="adamw",
        metadata={
            "help": "'adamw', or 'sgd' as in the official code: momentum 0.9, learning rate 0.1, warm-up for half of "
            "the steps, then a cosine down to a hundredth.",
            "choices": ["adamw", "sgd"],
        },
    )
    learning_rate: float | None = field(default=None, metadata={"help": "Of the generator; by default the recipe's."})
    library_learning_rate: float | None = field(
        default=None, metadata={"help": "By default as `parameter_groups` chooses it; with 'sgd' the generator's."}
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "By default three times the generator's; with 'sgd' the same."}
    )
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "By default 12, or with few images as many as make 100 steps."}
    )
    per_device_train_batch_size: int = 25
    per_device_eval_batch_size: int = 100
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int | None = 2
    load_best_model_at_end: bool = True
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1
    remove_unused_columns: bool = False  # the transforms read the image column
    ddp_find_unused_parameters: bool = False
    dataloader_num_workers: int | None = field(
        default=None, metadata={"help": "By default one for each core but one, 8 at most, on a GPU; 0 on a CPU."}
    )
    report_to: str = "none"
    logging_steps: float = 10

    def __post_init__(self) -> None:
        if self.dataloader_drop_last:
            raise SystemExit("`dataloader_drop_last` would leave images out of evaluations too. Leave it out.")
        accelerated = torch.accelerator.is_available() and not self.use_cpu
        if self.dataloader_num_workers is None:
            # On a CPU a step takes longer than its images, on the cores that workers would need.
            cores = (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            self.dataloader_num_workers = max(1, min(cores - 1, MOST_WORKERS)) if accelerated else 0
        self.dataloader_pin_memory = self.dataloader_pin_memory and accelerated
        if self.learning_rate is None:
            self.learning_rate = 0.1 if self.recipe == "sgd" else 1e-3
        if self.recipe == "sgd":
            self.library_learning_rate = self.library_learning_rate or self.learning_rate
            self.head_learning_rate = self.head_learning_rate or self.learning_rate
            self.warmup_steps = 0.5
            self.lr_scheduler_type = "cosine_with_min_lr"
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.01}
        super().__post_init__()

    def choose_epochs(self, images: int) -> None:
        """Choose the number of epochs, if none was given: 12, or as many as make 100 steps.

        If that is more than 12, evaluate and save 12 times all the same: after every so many epochs.
        """
        if self.num_train_epochs is not None:
            return
        images_per_step = self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps
        steps_per_epoch = math.ceil(images / images_per_step)
        self.num_train_epochs = max(EPOCHS, math.ceil(FEWEST_STEPS / steps_per_epoch))
        if self.num_train_epochs > EPOCHS and self.max_steps <= 0:
            say(f"{images} training images: {self.num_train_epochs} epochs, for {FEWEST_STEPS} steps or more")
            if self.eval_strategy == self.save_strategy == IntervalStrategy.EPOCH:
                self.eval_strategy = self.save_strategy = IntervalStrategy.STEPS
                self.eval_steps = self.save_steps = self.num_train_epochs // EPOCHS * steps_per_epoch

    def find_checkpoint(self) -> Path | None:
        """Return the checkpoint to resume from: the one that is named, or else the last complete one, if any."""
        resume = self.resume_from_checkpoint
        if resume in (None, "", "false", "False"):
            if any(Path(self.output_dir).glob("checkpoint-*")):
                raise SystemExit(
                    f"{self.output_dir!r} holds checkpoints of another run. Pass --resume_from_checkpoint true to go "
                    "on with it, or choose another --output_dir."
                )
            return None
        found = last_complete_checkpoint(self.output_dir) if resume in ("true", "True") else Path(resume)
        say(f"resuming from {found}" if found else "no complete checkpoint, starting from the beginning")
        return found


def make_config(
    adapter: AdapterArguments, labels: list[str], processor: Any, mapping: list[int] | None = None
) -> PGNConfig:
    """Return the configuration of a new adapter, or that of the adapter to continue from with these labels."""
    id2label = dict(enumerate(labels))
    if adapter.adapter is not None:
        found = PGNConfig.from_pretrained(adapter.adapter)
        return dataclasses.replace(found, id2label=id2label, num_labels=None, inference_mode=False)
    in_pixels = adapter.prompt_space == "pixel"
    return PGNConfig(
        **{name: getattr(adapter, name) for name in FIELDS},
        prompt_depth="all" if adapter.prompt_depth == 0 else adapter.prompt_depth,
        image_size=square_side(processor) if in_pixels or adapter.prompt_layout else None,
        image_mean=list(processor.image_mean) if in_pixels else None,
        image_std=list(processor.image_std) if in_pixels else None,
        label_mapping=mapping,
        # A frozen head without a mapping has the model's labels.
        id2label=None if adapter.head == "frozen" and mapping is None else id2label,
    )


def square_side(processor: Any) -> int | None:
    """Return the side of what an image processor makes of a square image, in pixels; None if that is no square."""
    height, width = made_size(processor, (64, 64))
    return height if height == width else None


def load_backbone(adapter: ModelArguments) -> PreTrainedModel:
    """Load the model: as its checkpoint was saved for texts, else as a classifier; for features if there is none."""
    source = {"pretrained_model_name_or_path": adapter.model_name_or_path, "revision": adapter.model_revision}
    config = AutoConfig.from_pretrained(**source)
    if adapter.head == "text":
        name = (config.architectures or [type(config).__name__])[0]
        if name not in SUPPORTED or not SUPPORTED[name].has_texts:
            raise SystemExit(
                f"`model_name_or_path` must be a model for images and texts with --head text, not a {name}."
            )
        return getattr(transformers, name).from_pretrained(**source)
    if type(config) in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        return AutoModelForImageClassification.from_pretrained(**source)
    return AutoModel.from_pretrained(**source)


@torch.inference_mode()
def find_label_mapping(backbone: PreTrainedModel, rows: Dataset, names: list[str]) -> list[int]:
    """Find by frequency which of the model's classes stand for the task's: `rows` without augmentation."""
    backbone.eval()
    takes_size = "interpolate_pos_encoding" in inspect.signature(backbone.forward).parameters
    options = {"interpolate_pos_encoding": True} if takes_size else {}
    batches = (rows[start : start + 100]["pixel_values"] for start in range(0, len(rows), 100))
    logits = torch.cat([backbone(batch.to(backbone.device), **options).logits.cpu() for batch in batches])
    labels = torch.tensor(rows.with_format(None)["label"])
    return frequency_mapping(logits, labels, len(names), backbone.config.id2label)


def add_texts(model: PeftModel, adapter: ModelArguments, labels: list[str]) -> None:
    """Give an adapter with texts as classes the embeddings of a file, or of the classes' names."""
    if adapter.text_embeds is not None:
        use_texts(model, *load_file(adapter.text_embeds).values())
        return
    tokenizer = AutoTokenizer.from_pretrained(adapter.model_name_or_path, revision=adapter.model_revision)
    use_texts(model, embed_texts(model.get_base_model(), tokenizer, labels, adapter.templates))


def continue_from(model: PeftModel, adapter: str, labels: list[str]) -> None:
    """Start an adapter from another one: its generator, its library, and of its head the classes that are here too."""
    weights = load_peft_weights(adapter, device="cpu")
    before = list((PGNConfig.from_pretrained(adapter).id2label or {}).values())
    kept = [name for name in labels if name in before]
    say(f"continuing from {adapter}: {len(kept)} of {len(labels)} classes are the same, {len(before)} were there")
    if before != labels:
        for name, new in model.state_dict().items():
            saved = weights.get(name.replace(".default", ""))
            if "pgn_head" in name and saved is not None:
                new = new.detach().clone().cpu()
                for label in kept:
                    new[labels.index(label)] = saved[before.index(label)]
                weights[name.replace(".default", "")] = new
    set_peft_model_state_dict(model, weights)


def make_trainer(
    model: PeftModel,
    splits: DatasetDict,
    arguments: Arguments,
    processor: Any = None,
    facts: ModelCardInfo | None = None,
    callbacks: Iterable[TrainerCallback] = (),
) -> AdapterTrainer:
    """Put model, data, optimizer and callbacks together; `splits` have transforms."""
    several = isinstance(splits["train"].features["label"], List)
    if not arguments.optim.startswith("adamw_torch"):
        raise SystemExit(f"--optim {arguments.optim.value} is not used here. Choose --recipe adamw or --recipe sgd.")
    rates = (arguments.learning_rate, arguments.library_learning_rate, arguments.head_learning_rate)
    groups = parameter_groups(model, *rates, arguments.weight_decay)
    if arguments.recipe == "sgd":
        optimizer = torch.optim.SGD(groups, lr=arguments.learning_rate, momentum=0.9)
    else:
        # An adapter has many small tensors: fused, a step over them takes a tenth of the time.
        options = {"betas": (arguments.adam_beta1, arguments.adam_beta2), "eps": arguments.adam_epsilon, "fused": True}
        optimizer = torch.optim.AdamW(groups, lr=arguments.learning_rate, **options)

    def measure(outcome: Any) -> dict[str, float]:
        if several:
            return {"f1": f1_score(outcome.label_ids, outcome.predictions > 0, average="micro")}
        return {"accuracy": accuracy_score(outcome.label_ids, outcome.predictions.argmax(axis=-1))}

    arguments.metric_for_best_model = arguments.metric_for_best_model or ("f1" if several else "accuracy")
    arguments.greater_is_better = not arguments.metric_for_best_model.endswith("loss")
    interpolate = processor is not None and makes_another_size(prompt_layer(model), processor)
    return AdapterTrainer(
        model=model,
        args=arguments,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=ImageCollator(len(class_names(splits["train"])), interpolate_pos_encoding=interpolate),
        compute_metrics=measure,
        # A base whose config asks for hidden states or attentions answers with these too.
        preprocess_logits_for_metrics=lambda outputs, labels: outputs[0] if isinstance(outputs, tuple) else outputs,
        optimizers=(optimizer, None),
        callbacks=[SyncBatchNormCallback(), *callbacks],
        processing_class=processor,
        facts=facts,
    )


def make_loaders(trainer: AdapterTrainer, train: Dataset) -> list[DataLoader]:
    """Make loaders of training images without augmentation and of validation images, each whole in every process."""
    return [
        DataLoader(
            rows,
            batch_size=trainer.args.per_device_eval_batch_size,
            collate_fn=trainer.data_collator,
            num_workers=trainer.args.dataloader_num_workers,
        )
        for rows in (train, trainer.eval_dataset)
    ]


def measure_head_alone(trainer: AdapterTrainer, train: Dataset) -> LinearProbe:
    """Measure what a linear head on the frozen model reaches on validation; `train` without augmentation."""
    alone = linear_probe(trainer.classifier.model, *make_loaders(trainer, train))
    say(f"without prompts: a linear head on the frozen model has a validation accuracy of {alone.linear:.3f}")
    if alone.own is not None:
        has_texts = trainer.classifier.model.peft_config["default"].head == "text"
        say(f"without prompts: {'zero-shot classification' if has_texts else 'the own head'} has {alone.own:.3f}")
    return alone


def fit_head_again(trainer: AdapterTrainer, train: Dataset) -> None:
    """Fit the head to the final features, and keep it where it is better; `train` without augmentation."""
    if trainer.args.world_size > 1:
        say("the head was not fitted again, because several processes trained it")
        return
    trained, fitted = refit_head(trainer.classifier.model, *make_loaders(trainer, train))
    kept = "kept" if fitted > trained else "not kept"
    say(f"a head fitted again has a validation accuracy of {fitted:.3f}, the trained one {trained:.3f}: {kept}")


def measure_with_other_prompts(trainer: AdapterTrainer) -> float | None:
    """Measure the accuracy on validation when each image gets the prompts of another; None for static prompts."""
    model = trainer.classifier.model
    if model.peft_config["default"].generator == "static":
        return None
    with shuffled_prompts(model):
        metrics = trainer.predict(trainer.eval_dataset.shuffle(seed=0), metric_key_prefix="other").metrics
    return metrics.get("other_accuracy", metrics.get("other_f1"))


def compare(accuracy: float, alone: LinearProbe | None, with_other_prompts: float | None, images: int) -> str:
    """Say what prompts add to a linear head, and what prompts for each image add to prompts; one line each."""
    likely = (accuracy * images + 1) / (images + 2)  # of few images all may be right by chance
    chance = (likely * (1 - likely) / images) ** 0.5  # one standard error
    says = []
    if alone is not None:
        gain = accuracy - alone.linear
        says.append(f"{gain:+.3f} compared with a linear head without prompts")
        if gain <= chance:
            says[-1] += f": prompts add nothing here (differences up to {chance:.3f} are chance)"
    if with_other_prompts is not None:
        gain = accuracy - with_other_prompts
        says.append(f"{gain:+.3f} compared with the prompts of other images")
        if gain <= chance:
            says[-1] += ": prompts need not depend on the image here, --generator static is smaller"
    return "\n".join(says)


def check_same_adapter(wanted: PGNConfig, checkpoint: Path) -> None:
    """Stop rather than resume with an adapter of another kind or other classes."""
    made_elsewhere = {"inference_mode", "peft_version", "pgn_peft_version", "base_model_name_or_path"}
    found = PGNConfig.from_pretrained(str(checkpoint)).to_dict()
    for name, value in wanted.to_dict().items():
        if name not in made_elsewhere and found[name] != value:
            raise SystemExit(
                f"{name} is {value!r}, but {found[name]!r} in the run to resume. Give the arguments of that run, or "
                "another --output_dir."
            )


def hold_out(splits: DatasetDict) -> None:
    """Use the validation images for training too, where they are too few to compare methods by."""
    number = len(splits["validation"])
    if number < FEWEST_TO_COMPARE:
        splits["train"] = concatenate_datasets([splits["train"], splits.pop("validation")])
        say(
            f"{number} validation images decide nothing below {100 / number**0.5:.0f} points: methods are compared by "
            f"cross-validation on all {len(splits['train'])} images."
        )


def check_options(adapter: AdapterArguments, arguments: Arguments) -> None:
    """Stop if options are given that `--method auto` does not use."""
    unused = [name for name in UNUSED_BY_AUTO for given in (adapter, arguments) if is_given(given, name)]
    if unused:
        raise SystemExit(f"--method auto does not use --{' and --'.join(unused)}. Leave that out.")


def is_given(arguments: Any, name: str) -> bool:
    """Whether an argument differs from its default."""
    declared = type(arguments).__dataclass_fields__.get(name)
    return declared is not None and getattr(arguments, name) != declared.default


def save_chosen(model: Any, processor: Any, folder: Path, facts: ModelCardInfo, base_untouched: bool) -> None:
    """Save an adapter, or a model whose weights changed as a whole, which Transformers loads; LoRA is merged."""
    outdated = WHOLE_MODEL if base_untouched else (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, "README.md")
    for name in outdated:  # of an earlier run that chose otherwise
        folder.joinpath(name).unlink(missing_ok=True)
    if base_untouched:
        Classifier(model, processor).save_pretrained(folder, facts)
    else:
        (model.merge_and_unload() if isinstance(model, PeftModel) else model).save_pretrained(folder)
        processor.save_pretrained(folder)


def climb(adapter: AdapterArguments, data: DataArguments, arguments: Arguments) -> dict[str, Any]:
    """Try methods in the order of their cost, and save the chosen one; return what results.json holds."""
    if arguments.world_size > 1:
        raise SystemExit("--method auto runs in one process. Start it without `accelerate launch`.")
    check_options(adapter, arguments)
    folder = Path(arguments.output_dir)
    splits = load_splits(data)
    labels = class_names(splits["train"])
    if isinstance(splits["train"].features["label"], List):
        raise SystemExit("--method auto needs one class for each image. Choose --method prompts.")
    hold_out(splits)
    processor = load_processor(adapter.model_name_or_path, data.image_size, adapter.model_revision)
    plain = add_transforms(splits, processor, data.augmentation)
    probe = get_peft_model(load_backbone(adapter), PGNConfig(num_labels=len(labels)))
    ladder = Ladder(
        lambda: load_backbone(adapter),
        splits["train"],
        dict(enumerate(labels)),
        folder / "ladder",
        plain=plain,
        validation=splits.get("validation"),
        data_collator=ImageCollator(len(labels), makes_another_size(prompt_layer(probe), processor)),
        arguments=arguments,
        budget_minutes=adapter.budget_minutes,
        allow_weights=adapter.allow_weights,
        seed=arguments.seed,
    )
    transformers.utils.logging.disable_progress_bar()  # each training loads the model again
    with tqdm(ladder.climb(), total=len(ladder.rungs), unit="method") as bar:
        for result in bar:
            found = (
                result.choice if result.accuracy is None else f"{result.accuracy:.3f} ± {result.standard_error:.3f}"
            )
            bar.write(f"{result.name}: {found}")
    chosen = ladder.chosen
    model = ladder.load()
    tested = ladder.accuracy(model, splits["test"]) if "test" in splits else None
    results = {
        "chosen": chosen.name,
        "validation_accuracy": chosen.accuracy,
        "test_accuracy": tested,
        "train_images": len(splits["train"]),
        "seed": arguments.seed,
        "methods": [dataclasses.asdict(result) for result in ladder.results],
    }
    source = Path(data.dataset).expanduser().resolve()
    name = {"dataset_name": source.name} if source.exists() else {"dataset_id": data.dataset}
    facts = ModelCardInfo(**name, metrics={} if tested is None else {"accuracy": tested}, training_log=ladder.rows())
    save_chosen(model, processor, folder, facts, chosen.base_untouched)
    plot_ladder(ladder.results, chosen.name).savefig(folder / "methods.png")
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(markdown_table(ladder.rows()))
    print(f"chosen: {chosen.name}, the cheapest within one standard error of the best; saved to {folder}")
    print("test accuracy", "-" if tested is None else f"{tested:.3f}")
    return results


def train(adapter: AdapterArguments, data: DataArguments, arguments: Arguments) -> dict[str, Any]:
    """Train, evaluate and save; return what results.json holds."""
    folder = Path(arguments.output_dir)
    folder.mkdir(parents=True, exist_ok=True)  # now, rather than after training
    checkpoint = arguments.find_checkpoint()
    set_seed(arguments.seed)
    with arguments.main_process_first(desc="loading the data"):
        splits = load_splits(data)
    labels = class_names(splits["train"])
    if len(labels) < 2:
        raise SystemExit(f"`dataset` has one class, {labels}, so that there is nothing to tell apart.")
    arguments.choose_epochs(len(splits["train"]))
    processor = load_processor(adapter.model_name_or_path, data.image_size, adapter.model_revision)
    without_augmentation = add_transforms(splits, processor, data.augmentation)

    backbone = load_backbone(adapter)
    mapping = find_label_mapping(backbone, without_augmentation, labels) if adapter.label_mapping else None
    own = list((backbone.config.id2label or {}).values())
    if adapter.head == "frozen" and mapping is None and adapter.adapter is None and own != labels:
        raise SystemExit(
            "With --head frozen the model's classes are not those of the images. Add --label_mapping true."
        )
    config = make_config(adapter, labels, processor, mapping)
    several = isinstance(splits["train"].features["label"], List)
    config.problem_type = "multi_label_classification" if several else "single_label_classification"
    model = get_peft_model(backbone, config, revision=adapter.model_revision)
    if adapter.adapter is not None:
        continue_from(model, adapter.adapter, labels)
    if config.head == "text":
        add_texts(model, adapter, labels)

    source = Path(data.dataset).expanduser().resolve()
    facts = ModelCardInfo(dataset_name=source.name) if source.exists() else ModelCardInfo(dataset_id=data.dataset)
    trainer = make_trainer(model, splits, arguments, processor, facts)
    if checkpoint is not None:
        check_same_adapter(model.peft_config["default"], checkpoint)
    alone = None if several else measure_head_alone(trainer, without_augmentation)
    outcome = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if adapter.refit_head and config.head == "trained" and not several:
        fit_head_again(trainer, without_augmentation)

    metric = "f1" if several else "accuracy"
    found = trainer.evaluate(splits["validation"])[f"eval_{metric}"]
    tested = None
    if "test" in splits:
        tested = trainer.evaluate(splits["test"], metric_key_prefix="test")[f"test_{metric}"]
    with_other_prompts = measure_with_other_prompts(trainer)
    trainable, _ = model.get_nb_trainable_parameters()
    results = {
        "trainable_parameters": trainable,
        "train_images": len(splits["train"]),
        "head_alone_accuracy": None if alone is None else alone.linear,
        f"{metric}_with_other_prompts": with_other_prompts,
        f"validation_{metric}": found,
        f"test_{metric}": tested,
        "train_images_per_second": outcome.metrics["train_samples_per_second"],
        "epochs": None if arguments.max_steps > 0 else arguments.num_train_epochs,
        "learning_rate": arguments.learning_rate,
        "seed": arguments.seed,
    }
    if not trainer.is_world_process_zero():
        return results
    card = trainer.card_facts()
    # Validation is none of the metrics, because it chose the epoch.
    rows = {
        "training images": f"{results['train_images']:,}",
        f"{metric} on validation": f"{found:.4f} (epoch and head were chosen by it)",
    }
    trainer.facts = dataclasses.replace(
        card,
        metrics={} if tested is None else {metric: tested},
        split="test",
        hyperparameters=rows | dict(card.hyperparameters),
    )
    trainer.classifier.save_pretrained(folder, trainer.facts)
    if config.prompt_space == "pixel":
        make_prompter(model, processor).save_pretrained(folder / "prompter")
    (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    model.print_trainable_parameters()
    print(f"validation {metric} {found:.3f}")
    print(compare(found, alone, with_other_prompts, len(splits["validation"])))
    print(f"training images per second {results['train_images_per_second']:.1f}")
    print(f"saved to {folder}")
    if arguments.push_to_hub:
        print(f"published: {trainer.push_to_hub().commit_url}")
    print(f"test {metric}", "-" if tested is None else f"{tested:.3f}")
    return results


def main(command_line: list[str] | None = None) -> dict[str, Any]:
    command_line = sys.argv[1:] if command_line is None else command_line
    with tempfile.TemporaryDirectory() as folder:
        if "--smoke" in command_line:
            command_line = smoke_arguments(Path(folder)) + [word for word in command_line if word != "--smoke"]
        parser = HfArgumentParser((AdapterArguments, DataArguments, Arguments))
        adapter, data, arguments, unknown = parser.parse_args_into_dataclasses(
            command_line, return_remaining_strings=True
        )
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        return (climb if adapter.method == "auto" else train)(adapter, data, arguments)


if __name__ == "__main__":
    main()
