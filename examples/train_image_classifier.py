"""Fine-tune a frozen Vision Transformer with generated prompts on your own images.

A folder of images, one subfolder for each class (it is split 80 / 10 / 10 if it has no train, validation and test
folders):

    python examples/train_image_classifier.py --model_name_or_path google/vit-base-patch16-224-in21k \
        --dataset path/to/images --output_dir outputs/my-adapter

Parquet files named train, validation and test, at a quarter of the cost of 224 px:

    python examples/train_image_classifier.py --model_name_or_path facebook/deit-tiny-patch16-224 \
        --dataset path/to/parquet --image_size 112 --num_train_epochs 12 --output_dir outputs/my-adapter

For a hosted model: prompts that are valid pixels, and the model's own classes mapped to the task's.
`deploy_input_only.py` shows how the result, outputs/my-adapter/prompter, is used:

    python examples/train_image_classifier.py --model_name_or_path facebook/deit-tiny-patch16-224 \
        --dataset path/to/images --prompt_space pixel --head frozen --label_mapping true --initial_logit_std 4 \
        --output_dir outputs/my-adapter

CLIP or SigLIP with texts as classes; only prompts are trained:

    python examples/train_image_classifier.py --model_name_or_path openai/clip-vit-base-patch32 \
        --dataset path/to/images --head text --output_dir outputs/my-adapter

Several processes, on GPUs or (with --use_cpu) on a CPU; `docs/train.md`:

    accelerate launch --config_file examples/accelerate/one_machine_gpus.yaml examples/train_image_classifier.py ...

It needs `image_*.py`, `recipes.py`, `adapter_arguments.py`, `card_facts.py` and `comparisons.py` beside it. After an
interruption, the same command with --resume_from_checkpoint true resumes from the last complete checkpoint. With
--push_to_hub true --hub_model_id user/name the adapter is published after each epoch and at the end; `share_on_hub.py`
publishes an existing one. In the end it says what prompts add to a linear head without them, and what prompts for each
image add to the prompts of other images. `--smoke` runs the script offline on a tiny model and a few generated images,
in seconds; it ends with

    test accuracy 1.000

The output folder then holds the adapter with its labels (adapter_model.safetensors, adapter_config.json), the image
processor, a model card and results.json. Load it with

    import pgn_peft
    model, image_processor = pgn_peft.load_classifier("outputs/my-adapter")

or classify a folder of images with `predict.py`.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from adapter_arguments import AdapterArguments, add_texts, find_label_mapping, load_backbone, start_library
from card_facts import add_results, describe_data
from comparisons import compare, measure_head_alone, measure_with_other_prompts
from datasets import DatasetDict
from filelock import FileLock, Timeout
from image_data import DataArguments, load_processor, load_splits, made_side
from image_loading import LoaderArguments
from image_transforms import add_transforms, cache_images
from peft import PeftModel, get_peft_model
from sklearn.metrics import accuracy_score
from transformers import HfArgumentParser, set_seed
from transformers.trainer_utils import IntervalStrategy

from pgn_peft import AdapterTrainer, CardFacts, ImageCollator, PGNConfig, make_prompter
from pgn_peft.training import last_complete_checkpoint, parameter_groups
from pgn_peft.training.distributed import EqualStatistics, SameSteps
from pgn_peft.tuner.backbones import find_backbone
from pgn_peft.tuner.embeddings import own_image_size
from pgn_peft.utils.files import replacing

EPOCHS, FEWEST_STEPS = 12, 100


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
    num_train_epochs: float | None = field(
        default=None, metadata={"help": "By default 12, or with few images as many as make 100 steps."}
    )
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
        if self.dataloader_drop_last:
            raise SystemExit(
                "`dataloader_drop_last` must be False, but got True: evaluations would leave images out too. Leave it "
                "out; a last batch of one image can be trained on."
            )
        if self.learning_rate is None:
            self.learning_rate = 0.1 if self.recipe == "sgd" else 1e-3
        if self.recipe == "sgd":
            self.library_learning_rate = self.library_learning_rate or self.learning_rate
            self.head_learning_rate = self.head_learning_rate or self.learning_rate
            self.warmup_steps = 0.5
            self.lr_scheduler_type = "cosine_with_min_lr"
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.01}
        super().__post_init__()

    def settle_epochs(self, images: int) -> None:
        """Choose the number of epochs, if none was given.

        If that is more than 12, evaluate and save 12 times all the same: after every so many epochs.
        """
        if self.num_train_epochs is not None:
            return
        images_per_step = self.per_device_train_batch_size * self.world_size * self.gradient_accumulation_steps
        steps_per_epoch = math.ceil(images / images_per_step)
        self.num_train_epochs = max(EPOCHS, math.ceil(FEWEST_STEPS / steps_per_epoch))
        if self.num_train_epochs > EPOCHS and self.max_steps <= 0:
            if self.process_index == 0:
                print(f"{images} training images: {self.num_train_epochs} epochs, for {FEWEST_STEPS} steps or more")
            if self.eval_strategy == self.save_strategy == IntervalStrategy.EPOCH:
                self.eval_strategy = self.save_strategy = IntervalStrategy.STEPS
                self.eval_steps = self.save_steps = self.num_train_epochs // EPOCHS * steps_per_epoch


@contextmanager
def writing_to(output_dir: str, resume: bool, is_main_process: bool) -> Iterator[None]:
    """Find out before training whether results can be written, and keep other runs from writing there meanwhile.

    The lock is released when the process ends, also when it is killed.

    Raises:
        SystemExit: the folder cannot be written to, another run is writing there, or results would mix with those of
            an earlier run.
    """
    folder = Path(output_dir)
    lock = FileLock(folder / ".training.lock", blocking=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        if is_main_process:
            lock.acquire()
    except Timeout as error:
        raise SystemExit(
            f"`output_dir` must be written to by one run at a time, but got {output_dir!r}, which another process "
            "writes to. Wait until it has ended, or choose another folder."
        ) from error
    except OSError as error:
        raise SystemExit(f"`output_dir` must be writable, but got {output_dir!r}: {error}. Choose another.") from error
    except NotImplementedError as error:
        print(f"`output_dir` cannot be locked here ({error}): let one run at a time write to it")
    try:
        if not resume and any(folder.glob("checkpoint-*")):
            raise SystemExit(
                f"`output_dir` must hold no checkpoints of another run, but got {output_dir!r}. Pass "
                "--resume_from_checkpoint true to go on with that run, or choose another folder."
            )
        yield
    finally:
        if lock.is_locked:
            with suppress(OSError):  # Windows removes it on release
                folder.joinpath(".training.lock").unlink()
            lock.release()


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
    return AdapterTrainer(
        model=model,
        args=arguments,
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        data_collator=ImageCollator(num_labels, interpolate_pos_encoding=interpolate),
        compute_metrics=lambda outcome: {
            "accuracy": accuracy_score(outcome.label_ids, outcome.predictions.argmax(axis=-1))
        },
        # A base whose config asks for hidden states or attentions answers with these too.
        preprocess_logits_for_metrics=lambda outputs, labels: outputs[0] if isinstance(outputs, tuple) else outputs,
        optimizers=(optimizer, None),
        callbacks=[EqualStatistics(), SameSteps()],
        processing_class=processor,
        facts=facts,
    )


def find_checkpoint(arguments: Arguments) -> Path | None:
    """Return the checkpoint to go on from: the one that is named, or else the last complete one; None without one."""
    if arguments.resume_from_checkpoint in ("true", "True", True):
        try:
            return last_complete_checkpoint(arguments.output_dir, arguments.world_size)
        except ValueError as error:
            raise SystemExit(str(error)) from error
    checkpoint = Path(arguments.resume_from_checkpoint).expanduser()
    if not (checkpoint / "optimizer.pt").is_file():
        raise SystemExit(
            f"`resume_from_checkpoint` must be a checkpoint with the optimizer's state, but got {str(checkpoint)!r} "
            "without optimizer.pt. Name another one; --save_only_model true saves none that a run can go on from."
        )
    return checkpoint


def check_same_adapter(wanted: PGNConfig, found: PGNConfig) -> None:
    """Stop rather than go on with an adapter for other classes, or of another kind."""
    made_elsewhere = {"inference_mode", "peft_version", "pgn_peft_version", "base_model_name_or_path"}
    for name, value in wanted.to_dict().items():
        if name not in made_elsewhere and found.to_dict()[name] != value:
            raise SystemExit(
                f"`resume_from_checkpoint` must name a run with the same {name}, {value!r}, but got one with "
                f"{found.to_dict()[name]!r}. Give the arguments of that run, or another output_dir."
            )


def check_same_optimizer(wanted: torch.optim.Optimizer, checkpoint: str | Path) -> None:
    """Stop rather than go on with the optimizer of the checkpoint, which `Trainer` restores whatever was asked for."""
    found = torch.load(Path(checkpoint, "optimizer.pt"), map_location="cpu", weights_only=True)["param_groups"]
    for group, saved in zip(wanted.param_groups, found, strict=True):
        for name, stored in (("lr", "initial_lr"), ("weight_decay", "weight_decay"), ("momentum", "momentum")):
            if group.get(name) != saved.get(stored):
                raise SystemExit(
                    f"`resume_from_checkpoint` must name a run with the same optimizer, {name}={group.get(name)} for "
                    f"{group['name']}, but got one with {saved.get(stored)}. Give the learning rates, the weight "
                    "decay and the recipe of that run, or another output_dir."
                )


def train(adapter: AdapterArguments, data: DataArguments, arguments: Arguments) -> dict:
    """Train, evaluate and save; return what results.json holds."""
    resume = arguments.resume_from_checkpoint not in (None, "", "false", "False")
    with writing_to(arguments.output_dir, resume, arguments.process_index == 0):
        return _train(adapter, data, arguments, resume)


def _train(adapter: AdapterArguments, data: DataArguments, arguments: Arguments, resume: bool) -> dict:
    checkpoint = find_checkpoint(arguments) if resume else None
    set_seed(arguments.seed)
    with arguments.main_process_first(desc="loading the data"):
        splits = load_splits(data, seed=0)
    labels = splits["train"].features["label"].names
    if len(labels) < 2:
        raise SystemExit(
            f"`dataset` must have at least two classes, but got {labels}: a head of one label would learn to "
            "predict a number. Add images of another class."
        )
    arguments.settle_epochs(len(splits["train"]))
    rule = adapter.choose(len(splits["train"]), len(labels))
    if arguments.process_index == 0:
        print(rule)
    processor = load_processor(adapter.model_name_or_path, data.image_size, adapter.model_revision)
    side = made_side(processor)
    adapter.config(labels, processor, side, [*range(len(labels))] if adapter.head == "frozen" else None)
    if data.cache_images:
        with arguments.main_process_first(desc="caching the images"):
            splits = cache_images(splits, processor, arguments.dataloader_num_workers)
    without_augmentation = splits["train"].with_transform(add_transforms(splits, processor, data.augmentation))
    backbone = load_backbone(adapter)
    own_size = own_image_size(backbone.get_submodule(find_backbone(backbone).embeddings))
    interpolate = side is not None and own_size != (side, side)
    mapping = find_label_mapping(backbone, without_augmentation, interpolate) if adapter.label_mapping else None
    config = adapter.config(labels, processor, side, mapping)
    model: PeftModel = get_peft_model(backbone, config, revision=adapter.model_revision)
    if config.prompt_space == "pixel" and config.prompt_layout != "dense":  # which starts at zero
        start_library(model, without_augmentation)
    if config.head == "text":
        add_texts(model, adapter, labels)
    trainable, _ = model.get_nb_trainable_parameters()

    parameters = parameter_groups(
        model,
        arguments.learning_rate,
        arguments.library_learning_rate,
        arguments.head_learning_rate,
        arguments.weight_decay,
    )
    trainer = make_trainer(
        model, splits, arguments, parameters, len(labels), interpolate, processor, describe_data(data.dataset)
    )
    if resume:
        if checkpoint is not None:
            check_same_adapter(model.peft_config["default"], PGNConfig.from_pretrained(str(checkpoint)))
            check_same_optimizer(trainer.optimizer, checkpoint)
        print(f"resuming from {checkpoint}" if checkpoint else "no complete checkpoint, starting from the beginning")
    alone = measure_head_alone(trainer, without_augmentation, splits["validation"])
    outcome = trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    with_other_prompts = measure_with_other_prompts(trainer, splits["validation"])
    results = {
        "trainable_parameters": trainable,
        "train_images": len(splits["train"]),
        "head_alone_accuracy": alone.linear,
        "accuracy_with_other_prompts": with_other_prompts,
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
        with replacing(folder) as staged:
            staged.joinpath("results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
        model.print_trainable_parameters()
        print(f"validation accuracy {results['validation_accuracy']:.3f}")
        print(compare(results["validation_accuracy"], alone, with_other_prompts, len(splits["validation"])))
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
