"""Fine-tune a frozen Vision Transformer with generated prompts on your own images.

A folder of images, one subfolder a class (it is split 80 / 10 / 10 if it has no train, validation and test folders):

    python examples/train_image_classifier.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset path/to/images --output_dir outputs/my-adapter

Parquet files named train, validation and test, at a quarter of the cost of 224 px:

    python examples/train_image_classifier.py --model_name_or_path facebook/deit-tiny-patch16-224 \
        --dataset path/to/parquet --image_size 112 --num_train_epochs 12 --output_dir outputs/my-adapter

For a model that can only be called: prompts that are valid pixels, and the model's own classes read as the task's.
`deploy_input_only.py` shows how the result, outputs/my-adapter/prompter, is used:

    python examples/train_image_classifier.py --model_name_or_path facebook/deit-tiny-patch16-224 \
        --dataset path/to/images --prompt_space pixel --head frozen --label_mapping true --initial_logit_std 4 \
        --output_dir outputs/my-adapter

Several processes, on GPUs or (with --use_cpu) on a CPU; `docs/train.md`:

    accelerate launch --config_file examples/accelerate/one_machine_gpus.yaml examples/train_image_classifier.py ...

It needs `image_*.py`, `recipes.py`, `adapter_arguments.py` and `card_facts.py` beside it. After an interruption, the
same command with --resume_from_checkpoint true goes on from the last complete checkpoint. With --push_to_hub true
--hub_model_id user/name the adapter is published after each epoch and at the end; `share_on_hub.py` publishes one that
is there. `--smoke` runs the whole script offline on a tiny model and a few generated images, in seconds; it ends with

    test accuracy 1.000

The output folder then holds the adapter with its labels (adapter_model.safetensors, adapter_config.json), the image
processor, a model card and results.json. Load it with

    import pgn_peft
    model, image_processor = pgn_peft.load_classifier("outputs/my-adapter")

or classify a folder of images with `predict.py`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import evaluate
import numpy as np
import torch
from adapter_arguments import AdapterArguments, find_label_mapping, start_library
from card_facts import add_results, describe_data
from datasets import DatasetDict, Features, Value
from image_data import DataArguments, load_processor, made_side
from image_loading import LoaderArguments, prepare_images
from image_stream import load_images, prepare_streaming
from peft import PeftModel, get_peft_model
from sklearn.metrics import accuracy_score
from transformers import (
    AutoModelForImageClassification,
    HfArgumentParser,
    set_seed,
)

from pgn_peft import AdapterTrainer, CardFacts, ImageCollator, PGNConfig, make_prompter
from pgn_peft.training import last_complete_checkpoint, parameter_groups
from pgn_peft.training.distributed import EqualStatistics, SameSteps
from pgn_peft.tuner.backbones import find_backbone, own_image_size


@dataclass
class Arguments(LoaderArguments):
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
        default=None,
        metadata={
            "help": "By default ten times the generator's, thirty times in pixel space; the same where several layers "
            "have prompts, and with 'sgd'."
        },
    )
    head_learning_rate: float | None = field(
        default=None, metadata={"help": "By default three times the generator's; with 'sgd' the same."}
    )
    num_train_epochs: float = 12
    per_device_train_batch_size: int = 25
    per_device_eval_batch_size: int = 100
    eval_strategy: str = "epoch"
    save_strategy: str = "epoch"
    save_total_limit: int | None = 2
    load_best_model_at_end: bool = True
    metric_for_best_model: str = "accuracy"
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.1
    remove_unused_columns: bool = False  # the transforms read the image column
    ddp_find_unused_parameters: bool = False
    report_to: str = "none"
    logging_steps: float = 10

    def __post_init__(self) -> None:
        if self.learning_rate is None:
            self.learning_rate = 0.1 if self.recipe == "sgd" else 1e-3
        if self.recipe == "sgd":
            self.warmup_steps = 0.5
            self.lr_scheduler_type = "cosine_with_min_lr"
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.01}
        super().__post_init__()

    def rates(self, config: PGNConfig) -> dict[str, float]:
        """Return the learning rates of the parts: what was best for each in benchmarks/adaptation.py."""
        library, head = 10 if config.prompt_depth == 1 else 1, 3
        if config.prompt_space == "pixel":
            library = 30
        if self.recipe == "sgd":
            library, head = 1, 1
        return {
            "learning_rate": self.learning_rate,
            "library_learning_rate": self.library_learning_rate or library * self.learning_rate,
            "head_learning_rate": self.head_learning_rate or head * self.learning_rate,
        }


class Accuracy(evaluate.Metric):
    """The share of right answers. `evaluate.load("accuracy")` would download its code."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of right answers.",
            citation="",
            inputs_description="",
            features=Features({"predictions": Value("int64"), "references": Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}


def check_output_dir(output_dir: str, resume: bool) -> None:
    """Find out before training whether results can be written, and whether they would mix with an earlier run's."""
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SystemExit(f"`output_dir` must be writable, but got {output_dir!r}: {error}. Choose another.") from error
    if not resume and any(folder.glob("checkpoint-*")):
        raise SystemExit(
            f"`output_dir` must hold no checkpoints of another run, but got {output_dir!r}. Pass "
            "--resume_from_checkpoint true to go on with that run, or choose another folder."
        )


def make_trainer(
    model,
    splits: DatasetDict,
    arguments: Arguments,
    parameters: list[dict],
    num_labels: int,
    interpolate: bool,
    processor=None,
    facts: CardFacts | None = None,
) -> AdapterTrainer:
    """Put model, data, optimizer and callbacks together."""
    if arguments.recipe == "sgd":
        optimizer = torch.optim.SGD(parameters, lr=arguments.learning_rate, momentum=0.9)
    else:
        # An adapter has many small tensors: fused, a step over them takes a tenth of the time.
        optimizer = torch.optim.AdamW(parameters, lr=arguments.learning_rate, fused=True)
    accuracy = Accuracy(keep_in_memory=True)
    return AdapterTrainer(
        model=model,
        args=arguments,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=ImageCollator(num_labels, interpolate_pos_encoding=interpolate),
        compute_metrics=lambda outcome: accuracy.compute(
            predictions=np.argmax(outcome.predictions, axis=-1), references=outcome.label_ids
        ),
        optimizers=(optimizer, None),
        callbacks=[EqualStatistics(), SameSteps()],
        processing_class=processor,
        facts=facts,
    )


def check_same_adapter(wanted: PGNConfig, found: PGNConfig) -> None:
    """Stop rather than go on with an adapter for other classes, or of another kind."""
    made_elsewhere = {"inference_mode", "peft_version", "pgn_peft_version", "base_model_name_or_path"}
    for name, value in wanted.to_dict().items():
        if name not in made_elsewhere and found.to_dict()[name] != value:
            raise SystemExit(
                f"`resume_from_checkpoint` must name a run with the same {name}, {value!r}, but got one with "
                f"{found.to_dict()[name]!r}. Give the arguments of that run, or another output_dir."
            )


def train(adapter: AdapterArguments, data: DataArguments, arguments: Arguments) -> dict:
    """Train, evaluate and save; return what results.json holds."""
    prepare_streaming(data, arguments)
    resume = arguments.resume_from_checkpoint not in (None, "", "false", "False")
    check_output_dir(arguments.output_dir, resume)
    set_seed(arguments.seed)
    with arguments.main_process_first(desc="loading the data"):
        splits = load_images(data, seed=0, shuffle_seed=arguments.seed)
    labels = splits["train"].features["label"].names
    processor = load_processor(adapter.model_name_or_path, data.image_size, adapter.model_revision)
    side = made_side(processor)
    adapter.config(labels, processor, side, None if adapter.head == "trained" else [*range(len(labels))])
    with arguments.main_process_first(desc="caching the images"):
        images = prepare_images(splits, processor, data, arguments.dataloader_num_workers)
    splits = images.splits
    backbone = AutoModelForImageClassification.from_pretrained(
        adapter.model_name_or_path, revision=adapter.model_revision
    )
    own_size = own_image_size(backbone.get_submodule(find_backbone(backbone).embeddings))
    interpolate = side is not None and own_size != (side, side)
    mapping = find_label_mapping(backbone, images.as_they_are(), interpolate) if adapter.label_mapping else None
    config = adapter.config(labels, processor, side, mapping)
    model: PeftModel = get_peft_model(backbone, config, revision=adapter.model_revision)
    if config.prompt_space == "pixel":
        start_library(model, images.as_they_are(), processor)
    trainable, _ = model.get_nb_trainable_parameters()

    parameters = parameter_groups(model, **arguments.rates(config), weight_decay=arguments.weight_decay)
    trainer = make_trainer(
        model, splits, arguments, parameters, len(labels), interpolate, processor, describe_data(data.dataset)
    )
    images.attach(trainer)
    checkpoint = None
    if resume:
        named = arguments.resume_from_checkpoint not in ("true", "True", True)
        checkpoint = (
            arguments.resume_from_checkpoint
            if named
            else last_complete_checkpoint(arguments.output_dir, arguments.world_size)
        )
        if checkpoint is not None:
            check_same_adapter(model.peft_config["default"], PGNConfig.from_pretrained(str(checkpoint)))
        print(f"resuming from {checkpoint}" if checkpoint else "no complete checkpoint, starting from the beginning")
    outcome = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    results = {
        "trainable_parameters": trainable,
        "train_images": images.count(arguments),
        "validation_accuracy": trainer.evaluate(splits["validation"])["eval_accuracy"],
        "test_accuracy": (
            trainer.evaluate(splits["test"], metric_key_prefix="test")["test_accuracy"] if "test" in splits else None
        ),
        "train_images_per_second": outcome.metrics["train_samples_per_second"],
        "epochs": None if arguments.max_steps > 0 else arguments.num_train_epochs,
        "learning_rate": arguments.learning_rate,
        "seed": arguments.seed,
    }
    if trainer.is_world_process_zero():
        folder = Path(arguments.output_dir)
        trainer.facts = add_results(trainer.card_facts(), results)
        trainer.classifier.save_pretrained(folder, trainer.facts)
        if config.prompt_space == "pixel":
            make_prompter(model, processor).save_pretrained(folder / "prompter")
        folder.joinpath("results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        model.print_trainable_parameters()
        print(f"validation accuracy {results['validation_accuracy']:.3f}")
        print(f"training images per second {results['train_images_per_second']:.1f}")
        print(f"saved to {folder}")
        if arguments.push_to_hub:
            print(f"published: {trainer.push_to_hub().commit_url}")
        print("test accuracy", "-" if results["test_accuracy"] is None else f"{results['test_accuracy']:.3f}")
    return results


def main(command_line: list[str] | None = None) -> dict:
    command_line = sys.argv[1:] if command_line is None else command_line
    with tempfile.TemporaryDirectory() as folder:
        if "--smoke" in command_line:
            from smoke_material import smoke_arguments

            command_line = smoke_arguments(Path(folder)) + [word for word in command_line if word != "--smoke"]
        parser = HfArgumentParser((AdapterArguments, DataArguments, Arguments))
        return train(*parser.parse_args_into_dataclasses(command_line))


if __name__ == "__main__":
    main()
