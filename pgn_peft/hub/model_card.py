"""The model card of an adapter: metadata that the Hub shows, and what a stranger needs to use and to judge it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_url
from PIL import Image
from torch import nn

from pgn_peft.tuner.adapters import active_adapter, num_parameters
from pgn_peft.tuner.config import PGNConfig
from pgn_peft.utils.markdown import CITATION, cell, list_names
from pgn_peft.utils.sources import is_repo_id
from pgn_peft.utils.values import not_none

EXAMPLE_FILES = tuple(f"example-{number}.jpg" for number in range(1, 5))


@dataclass(frozen=True)
class ModelCardInfo:
    """Facts for an adapter's model card that are not in the adapter itself.

    Args:
        dataset_name: name of the training images, for readers.
        dataset_id: their id on the Hub, if they are there.
        split: the split that `metrics` were measured on.
        metrics: value by metric, with the names of `evaluate`: {"accuracy": 0.94}.
        hyperparameters: value by name.
        training_log: a row for each evaluation, value by column, the columns those of the first row.
        license: identifier of the adapter's licence, "apache-2.0".
        description: what the adapter is for, and where it fails; Markdown.
        examples: images by title, at most four, for the card's widget. They are published with the adapter.

    Raises:
        TypeError: a metric is not a number.
        ValueError: there are metrics and no data set, a metric is not finite, or there are too many examples.
    """

    dataset_name: str | None = None
    dataset_id: str | None = None
    split: str = "test"
    metrics: Mapping[str, float] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    training_log: Sequence[Mapping[str, Any]] = ()
    license: str | None = None
    description: str | None = None
    examples: Mapping[str, Image.Image] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.examples) > len(EXAMPLE_FILES):
            raise ValueError(f"A card has room for {len(EXAMPLE_FILES)} examples, but {len(self.examples)} are given.")
        # Scalars of numpy and torch become plain numbers, which YAML can hold.
        object.__setattr__(self, "metrics", {name: float(value) for name, value in self.metrics.items()})
        for name, value in self.metrics.items():
            if not math.isfinite(value):
                raise ValueError(f"The metric {name!r} is {value}. Leave it out, or measure it again.")
        if self.metrics and self.dataset is None:
            raise ValueError("Say what the metrics were measured on: give `dataset_name` or `dataset_id`.")

    @property
    def dataset(self) -> str | None:
        """The data set's name for readers."""
        return self.dataset_name or self.dataset_id


def make_card(model: nn.Module, name: str, facts: ModelCardInfo, *, interpolate: bool = False) -> ModelCard:
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
    return ModelCard.from_template(
        _metadata(name, config, facts),
        template_path=str(Path(__file__).with_name("card_template.md")),
        title=name.rpartition("/")[2],
        name=name,
        base_model=config.base_model_name_or_path,
        dataset=None if facts.dataset is None else cell(facts.dataset),
        in_pixels=config.prompt_space == "pixel",
        description=facts.description,
        interpolate=interpolate,
        properties=_cells(_properties(model, adapter_name, config)),
        labels=list_names(config.id2label),
        metrics=_cells(facts.metrics),
        split=facts.split,
        hyperparameters=_cells(facts.hyperparameters),
        training_log=_table(facts.training_log) if facts.training_log else None,
        license=facts.license,
        citation=CITATION,
    )


def _table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """List the cells of each row, those of the head first; the columns are the first row's."""
    columns = list(rows[0])
    return [[cell(column) for column in columns], *([cell(row.get(column, "")) for column in columns] for row in rows)]


def _cells(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(cell(name), cell(value)) for name, value in values.items()]


def _metadata(name: str, config: PGNConfig, facts: ModelCardInfo) -> ModelCardData:
    results = [
        EvalResult(
            task_type="image-classification",
            task_name="Image Classification",
            dataset_type=facts.dataset_id or "imagefolder",
            dataset_name=not_none(facts.dataset),
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
        widget=_widget(name, facts) or None,
    )


def _widget(name: str, facts: ModelCardInfo) -> list[dict[str, str]]:
    """List the examples as the Hub's widget reads them; a folder's name gives no address."""
    if not (is_repo_id(name) and "/" in name):
        return []
    return [
        {"src": hf_hub_url(name, file), "example_title": title}
        for file, title in zip(EXAMPLE_FILES, facts.examples, strict=False)
    ]


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
