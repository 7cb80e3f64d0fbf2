"""The model card of an adapter: metadata that the Hub shows, and what a stranger needs to use and to judge it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import nn

from pgn_peft.tuner.adapters import active_adapter, num_parameters
from pgn_peft.tuner.config import PGNConfig
from pgn_peft.utils.citation import CITATION
from pgn_peft.utils.markdown import list_names, property_table, row_table
from pgn_peft.utils.sources import is_repo_id


@dataclass(frozen=True)
class CardFacts:
    """What only the one who trained an adapter knows, for its model card.

    Args:
        dataset_name: name of the training images, for readers.
        dataset_id: their id on the Hub, if they are there.
        split: the split that `metrics` were measured on.
        metrics: value by metric, with the names of `evaluate`: {"accuracy": 0.94}.
        hyperparameters: value by name.
        training_log: a row for each evaluation, value by column, the columns those of the first row.
        license: identifier of the adapter's licence, "apache-2.0".
        description: what the adapter is for, and where it fails; Markdown.

    Raises:
        ValueError: there are metrics and no data set, or a metric is not a finite number.
    """

    dataset_name: str | None = None
    dataset_id: str | None = None
    split: str = "test"
    metrics: Mapping[str, float] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    training_log: Sequence[Mapping[str, Any]] = ()
    license: str | None = None
    description: str | None = None

    def __post_init__(self) -> None:
        for name, value in self.metrics.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(
                    f"`metrics` must hold finite numbers, but got {value!r} for {name!r}. Leave it out, or measure it "
                    "again."
                )
        if self.metrics and self.dataset is None:
            raise ValueError(
                f"`dataset_name` or `dataset_id` must be given with `metrics`, but got None with "
                f"{dict(self.metrics)!r}. Say what they were measured on."
            )

    @property
    def dataset(self) -> str | None:
        """The data set's name for readers."""
        return self.dataset_name or self.dataset_id


def make_card(model: nn.Module, name: str, facts: CardFacts, *, interpolate: bool = False) -> ModelCard:
    """Write the card of a model's active adapter.

    Args:
        model: a model with a PGN adapter.
        name: id of the adapter's repository, or its folder.
        facts: what model and adapter do not show.
        interpolate: the adapter's images have another size than the base's.

    Raises:
        TypeError: the model carries no PGN adapter.
    """
    adapter_name, config = active_adapter(model)
    sections = {
        "Use": _use(name, interpolate),
        "What it is": property_table(_properties(model, adapter_name, config)),
        "Labels": list_names(config.id2label),
    }
    if facts.metrics:
        measured_on = {"data set": facts.dataset, "split": facts.split}
        results = [measured_on | {"metric": metric, "value": value} for metric, value in facts.metrics.items()]
        sections["Results"] = row_table(results)
    if facts.hyperparameters or facts.training_log:
        tables = [property_table(facts.hyperparameters)] if facts.hyperparameters else []
        tables += [row_table(facts.training_log)] if facts.training_log else []
        sections["Training"] = "\n\n".join(tables)
    licence = f"{facts.license}." if facts.license else "The author has not stated one for the adapter."
    sections["Licence"] = f"{licence} The base model keeps its own."
    sections["Citation"] = f"```bibtex\n{CITATION}\n```"
    text = "\n\n".join(f"## {heading}\n\n{section}" for heading, section in sections.items())
    return ModelCard(
        f"---\n{_metadata(name, config, facts).to_yaml()}\n---\n\n"
        f"# {name.rpartition('/')[2]}\n\n{_introduction(config, facts)}\n\n{text}\n"
    )


def _metadata(name: str, config: PGNConfig, facts: CardFacts) -> ModelCardData:
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=facts.dataset_id or "imagefolder",
            dataset_name=facts.dataset,
            dataset_split=facts.split,
            metric_type=metric,
            metric_name=metric.replace("_", " ").capitalize(),
            metric_value=value,
        )
        for metric, value in facts.metrics.items()
    ]
    base = config.base_model_name_or_path
    return ModelCardData(
        base_model=base if is_repo_id(base) else None,
        datasets=facts.dataset_id,
        eval_results=results or None,
        library_name="peft",
        license=facts.license,
        metrics=list(facts.metrics) or None,
        model_name=name.rpartition("/")[2] if results else None,
        pipeline_tag="image-classification",
        tags=["pgn-peft", "image-classification", "vision"],
    )


def _introduction(config: PGNConfig, facts: CardFacts) -> str:
    base = config.base_model_name_or_path
    trained_on = "" if facts.dataset is None else f", trained on {facts.dataset}"
    prompts = (
        "valid pixels, laid into the image" if config.prompt_space == "pixel" else "tokens, appended to its input"
    )
    introduction = (
        "A [Prompt Generation Network](https://arxiv.org/abs/2210.06466) for the frozen Vision Transformer "
        f"`{base}`{trained_on}. For each image a light CNN mixes prompts out of a learned library: {prompts}. It is a "
        "[PEFT](https://github.com/huggingface/peft) adapter, made with pgn-peft."
    )
    return introduction if facts.description is None else f"{introduction}\n\n{facts.description}"


def _use(name: str, interpolate: bool) -> str:
    call = ", interpolate_pos_encoding=True" if interpolate else ""
    return f"""\
```python
import pgn_peft

classify = pgn_peft.load_classifier("{name}").pipeline()
for answer in classify("image.jpg"):
    print(answer["label"], answer["score"])
```

Or step by step, with PEFT's own loader:

```python
import pgn_peft  # first: without it PEFT answers KeyError: 'PGN'
from peft import AutoPeftModel
from transformers import AutoImageProcessor

model = AutoPeftModel.from_pretrained("{name}")
image_processor = AutoImageProcessor.from_pretrained("{name}")
logits = model(**image_processor(images=image, return_tensors="pt"){call}).logits
label = model.config.id2label[logits.argmax(-1).item()]
```"""


def _properties(model: nn.Module, adapter_name: str, config: PGNConfig) -> dict[str, Any]:
    own = num_parameters(model, adapter_name)
    ours = (".pgn_", ".modules_to_save.")
    base = sum(
        parameter.numel() for name, parameter in model.named_parameters() if not any(part in name for part in ours)
    )
    return {
        "classes": len(config.id2label or {}),
        "trainable parameters": f"{own:,}",
        "frozen parameters of the base": f"{base:,}",
        "prompts per image": config.num_virtual_tokens,
        **({} if config.prompt_depth == 1 else {"layers with prompts of their own": config.prompt_depth}),
        "library": "-" if config.generator == "static" else config.library_size,
        "generator": config.generator,
        "head": config.head,
    }
