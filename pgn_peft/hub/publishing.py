"""Publishing an adapter: the files that are saved and uploaded, and the model card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # documented, but not in a list
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn

from pgn_peft.hub.image_processors import makes_another_size, plain_processor
from pgn_peft.nn.preprocessing import check_image_processor
from pgn_peft.tuner.adapters import active_adapter, adapter_tensors, num_parameters, prompt_layer
from pgn_peft.tuner.config import PGNConfig
from pgn_peft.utils.files import replacing
from pgn_peft.utils.markdown import CITATION, cell, list_names, update_card

CARD_FILE = "README.md"
# May be left by an earlier save. Transformers would load this image processor instead of the adapter's.
STALE_FILE = "processor_config.json"


@dataclass(frozen=True)
class ModelCardInfo:
    """Information for an adapter's model card that is not in the adapter itself.

    Args:
        dataset_name: name of the training images, for readers.
        dataset_id: their id on the Hub, if they are there.
        split: the split that `metrics` were measured on.
        metrics: value by metric, with the names of `evaluate`: {"accuracy": 0.94}.
        hyperparameters: value by name.
        training_log: one row for each evaluation, value by column; the first row defines the columns.
        license: identifier of the adapter's licence, such as "apache-2.0".
        description: intended use and limitations, in Markdown.

    Raises:
        TypeError: a metric is not a number.
        ValueError: there are metrics but no data set, or a metric is not finite.
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
        # Scalars of numpy and torch become plain numbers, which YAML can hold.
        object.__setattr__(self, "metrics", {name: float(value) for name, value in self.metrics.items()})
        if not all(map(math.isfinite, self.metrics.values())) or (self.metrics and self.dataset is None):
            raise ValueError(
                f"The metrics are {self.metrics} on the data set {self.dataset}. Pass finite values, and "
                "`dataset_name` or `dataset_id`."
            )

    @property
    def dataset(self) -> str | None:
        """The data set's name for readers."""
        return self.dataset_name or self.dataset_id


def save(
    model: nn.Module, image_processor: Any, folder: Path, facts: ModelCardInfo, name: str | None = None
) -> list[str]:
    """Write the files of the active adapter, and delete `STALE_FILE`; see `Classifier.save_pretrained`.

    Args:
        model: a model with an active PGN adapter.
        image_processor: the adapter's.
        folder: where to write.
        facts: information for the card.
        name: the id that the card's examples load; None: the folder's name.

    Returns:
        The names of the files that were written.
    """
    adapter_name, config = active_adapter(model)
    check_image_processor("image_processor", image_processor)
    image_processor = plain_processor(image_processor)
    with replacing(folder) as staged:
        save_file(adapter_tensors(model, adapter_name), staged / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(staged))
        image_processor.save_pretrained(staged)
        card = describe(model, image_processor, folder, facts, name)
        staged.joinpath(CARD_FILE).write_text(card, encoding="utf-8")
        written = sorted(file.name for file in staged.iterdir())
    if STALE_FILE not in written:
        folder.joinpath(STALE_FILE).unlink(missing_ok=True)
    return written


def describe(
    model: nn.Module, image_processor: Any, folder: Path, facts: ModelCardInfo, name: str | None = None
) -> str:
    """Return the adapter's card, merged with what people wrote in the card in `folder`; see `save`."""
    interpolate = makes_another_size(prompt_layer(model), image_processor)
    card = make_card(model, name or folder.name, facts, interpolate=interpolate)
    file = folder / CARD_FILE
    return update_card(str(card), file.read_text(encoding="utf-8-sig") if file.is_file() else None)


def is_repo_id(name: Any) -> bool:
    """Whether `name` is a valid id of a repository on the Hub, and not a local folder or file."""
    if not isinstance(name, str) or not name or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_shareable(model: nn.Module, repo_id: str) -> None:
    """Raise a ValueError, before files are written, if `repo_id` is not a valid id or the base model is a folder."""
    # With the owner, because the card tells others what to load.
    if not is_repo_id(repo_id) or "/" not in repo_id:
        raise ValueError(f"{repo_id!r} is not the id of a repository. Include its owner: 'user/name'.")
    base = active_adapter(model)[1].base_model_name_or_path
    if not is_repo_id(base):
        raise ValueError(
            f"The base model {base!r} is not on the Hub, so nobody else could load the adapter. Name the model that "
            "it is a copy of: model.peft_config['default'].base_model_name_or_path = 'user/model'."
        )


def make_card(model: nn.Module, name: str, facts: ModelCardInfo, *, interpolate: bool = False) -> ModelCard:
    """Write the card of a model's active adapter.

    Args:
        model: a model with a PGN adapter.
        name: id of the adapter's repository, or its folder.
        facts: information that is not in model and adapter.
        interpolate: whether the adapter's images have another size than the base's.
    """
    adapter_name, config = active_adapter(model)
    columns = list(facts.training_log[0]) if facts.training_log else []
    rows = [[cell(row.get(column, "")) for column in columns] for row in facts.training_log]
    return ModelCard.from_template(
        _metadata(name, config, facts),
        template_path=str(Path(__file__).with_name("card_template.md")),
        title=name.rpartition("/")[2],
        name=name,
        base_model=config.base_model_name_or_path,
        dataset=None if facts.dataset is None else cell(facts.dataset),
        generated=config.generator != "static",
        num_prompts=config.num_virtual_tokens,
        in_pixels=config.prompt_space == "pixel",
        description=facts.description,
        interpolate=interpolate,
        properties=_cells(_properties(model, adapter_name, config)),
        labels=list_names(config.id2label),
        metrics=_cells(facts.metrics),
        split=facts.split,
        hyperparameters=_cells(facts.hyperparameters),
        training_log=[list(map(cell, columns)), *rows] if columns else None,
        license=facts.license,
        citation=CITATION,
    )


def _cells(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(cell(name), cell(value)) for name, value in values.items()]


def _metadata(name: str, config: PGNConfig, facts: ModelCardInfo) -> ModelCardData:
    results = [
        EvalResult(
            task_type="image-classification",
            dataset_type=facts.dataset_id or "imagefolder",
            dataset_name=facts.dataset or "",
            dataset_split=facts.split,
            metric_type=metric,
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


def _properties(model: nn.Module, adapter_name: str, config: PGNConfig) -> dict[str, Any]:
    ours = (".pgn_", ".modules_to_save.")
    frozen = (weight for name, weight in model.named_parameters() if not any(part in name for part in ours))
    return {
        "classes": len(config.id2label or {}),
        "trainable parameters": f"{num_parameters(model, adapter_name):,}",
        "frozen parameters of the base": f"{sum(weight.numel() for weight in frozen):,}",
        "prompts per image": config.num_virtual_tokens,
        **({} if config.prompt_depth == 1 else {"layers with prompts of their own": config.prompt_depth}),
        "library": "-" if config.generator == "static" else config.library_size,
        "generator": config.generator,
        "head": config.head,
    }
