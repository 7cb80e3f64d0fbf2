"""`PGNConfig`: the configuration of an adapter. `resolve.py` fills what is left open from the model."""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import textwrap
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from peft import PeftConfig, TaskType
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import safe_open

from pgn_peft.nn.generator import NORMS, TRUNKS
from pgn_peft.utils.labels import PROBLEM_TYPES, normalize_id2label
from pgn_peft.version import __version__


class PGNPeftType(str, enum.Enum):  # noqa: UP042  (PEFT reads the name off str(member), "PGNPeftType.PGN")
    """The method's name in PEFT. PEFT's own `PeftType` is a closed enum, which a plug-in cannot extend."""

    PGN = "PGN"


# Fields of saved adapters that have another name now, or are no longer used.
RENAMED = {"slot_prompts": "static_prompts", "initial_logit_std": "mixing_init_std"}
REMOVED = ("checksums", "image_offset", "mixing", "text_correction")
# An upper limit of a gigabyte for an adapter, far beyond what is used, so that no file can allocate more.
LARGEST = 2**28


def _field(default: Any, description: str, *, minimum: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    """Declare a field with its description for users, the smallest number, and all values of a string."""
    return dataclasses.field(default=default, metadata={"help": description, "minimum": minimum, "choices": choices})


def _reads_saved_fields(config_class: type[PGNConfig]) -> type[PGNConfig]:
    """Let the constructor take the fields of adapters that earlier versions saved.

    PEFT's loaders pass the fields of a file to the constructor, so no other place sees them. Fields that nobody knows
    are left to PEFT, which drops them with a warning.
    """
    init = config_class.__init__

    @functools.wraps(init)
    def __init__(self: PGNConfig, *args: Any, **fields: Any) -> None:  # noqa: N807
        if fields.get("mixing", "softmax") != "softmax":
            raise ValueError(f"mixing={fields['mixing']!r} was removed. Train an adapter with the softmax.")
        fields = {RENAMED.get(name, name): value for name, value in fields.items() if name not in REMOVED}
        if "pgn_peft_version" in fields:
            fields = {"accumulate_prompts": False, "prompt_depth": 1} | fields  # the only ones in earlier versions
        if fields.get("prompt_layout") == "dense":
            fields["prompt_layout"] = "additive"
        init(self, *args, **fields)

    config_class.__init__ = __init__  # type: ignore[method-assign]
    return config_class


@_reads_saved_fields
@dataclass
class PGNConfig(PeftConfig):
    """Configuration of a Prompt Generation Network adapter.

    A field left at None is filled from the model when the adapter is created, and saved with it.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has an impossible value. Fields that do not fit each other or the model are found when the
            adapter is created.

    Source: arXiv:2210.06466. Differs by default from the official code, whose form is `generator_image_size=None`
    (its released checkpoints saw 224 px), `prompt_depth=1`, `static_prompts=False` and `mixing_init_std=0`.
    """

    num_virtual_tokens: int | None = _field(
        None,
        "Prompts per image, P. None: 16; one for each patch in pixel space; one row of patches with "
        "prompt_layout='append', where other numbers must fill whole rows and columns. 0, with generator='static': "
        "a linear head without prompts.",
        minimum=0,
    )
    library_size: int = _field(
        64,
        "Learned vectors that prompts are mixed from, L. Unused by the 'static' generator.",
        minimum=1,
    )
    prompt_depth: int | str | None = _field(
        None,
        "Number of encoder layers, from the first on, with prompts of their own. 1: the paper's form. 'all': every "
        "layer. Each layer has its own library. None: 'all'; 1 in pixel space, with a `prompt_layout` and with texts "
        "as classes.",
        minimum=1,
    )
    accumulate_prompts: bool | None = _field(
        None,
        "With prompts in several layers: each later layer adds its own, which start at zero, to what the layer before "
        "made of the prompts. False: they replace these, and start at random; with generator='static' this is "
        "VPT-deep. None: True where several layers have prompts.",
    )
    generator: str = _field(
        "resnet10",
        "'resnet10', the CNN of the official code, or 'static': P learned prompts, the same for every image (with "
        "prompt_depth=1 VPT-shallow); in pixel space one for all patches.",
        choices=(*TRUNKS, "static"),
    )
    generator_image_size: int | None = _field(
        64,
        "The generator sees the image with its shorter side resized to this many pixels. None: not resized, as in the "
        "official code. 64 costs a twelfth of 224.",
        minimum=8,
    )
    generator_width: int = _field(
        16, "Channels of the generator's stem. Size and cost grow with its square.", minimum=1
    )
    generator_norm: str = _field(
        "batch",
        "'batch', as in the official code, or 'group', which needs no running statistics.",
        choices=tuple(NORMS),
    )
    generator_rank: int | None = _field(
        None,
        "Length of the queries (one for each prompt) and keys (one for each library entry) whose products are the "
        "mixing logits; 8 needs a twentieth of the parameters. None: one linear layer, the official form.",
        minimum=1,
    )
    static_prompts: bool | None = _field(
        None,
        "Also learn a static prompt for each of the P slots, to which the generated part is added. None: True in "
        "latent space with a CNN. False: the paper's form.",
    )
    prompt_dropout: float | None = _field(
        None,
        "In training, the share of images whose prompts are mixed by the mean coefficients of their batch. None: 0.5 "
        "where several layers have generated prompts, else 0.",
        minimum=0,
    )
    initializer_range: float = _field(
        0.02,
        "Standard deviation of the initial library, or of the static prompts. Changes of pixels, and prompts that "
        "later layers add, start at zero.",
        minimum=0,
    )
    mixing_init_std: float | None = _field(
        None,
        "Standard deviation of the initial offsets of the mixing logits. 0, the official form: all prompts start as "
        "nearly the same mixture. None: 4, each starts near a library entry of its own.",
        minimum=0,
    )
    prompt_space: str = _field(
        "latent",
        "'latent': prompts are tokens. 'pixel': prompts are valid pixels of the image, for an unmodified model.",
        choices=("latent", "pixel"),
    )
    prompt_layout: str | None = _field(
        None,
        "'additive', in pixel space: a prompt for each patch is added to its pixels. 'append', in latent space: "
        "prompts fill rows of patches below the image, for prompt inversion. None: 'additive' in pixel space.",
    )
    image_size: int | None = _field(
        None, "Side of the square images with a `prompt_layout`, in pixels. None: the model's own.", minimum=8
    )
    image_mean: list[float] | None = _field(None, "The image processor's mean of each channel, for pixel space.")
    image_std: list[float] | None = _field(
        None, "The image processor's standard deviation of each channel, for pixel space."
    )
    jpeg_quality: int | None = _field(
        None,
        "In pixel space, send half of the prompted images through JPEG of this quality in training, for a server that "
        "gets JPEG of this quality or better. None: for PNG.",
        minimum=1,
    )
    head: str = _field(
        "trained",
        "'trained': the adapter has a head for its own labels. 'frozen': the model's head and labels; only prompts "
        "are trained. 'text': images are compared with a text for each class, as in CLIP; only prompts are trained. "
        "Give the texts by `use_texts`.",
        choices=("trained", "frozen", "text"),
    )
    label_mapping: list[int] | None = _field(
        None,
        "With head='frozen': for each of the adapter's classes the index of the model's class that stands for it. See "
        "`frequency_mapping`.",
    )
    id2label: dict[int, str] | None = _field(
        None,
        "Names of the adapter's classes by index, 0 to n-1. None: the model's own labels, or LABEL_0 to LABEL_{n-1} "
        "where `num_labels` differs from the model's.",
    )
    num_labels: int | None = _field(None, "Number of classes, instead of or beside `id2label`.", minimum=1)
    problem_type: str | None = _field(
        None,
        "'single_label_classification', 'multi_label_classification' or 'regression', as in Transformers. None: "
        "inferred from the labels of the first batch.",
        choices=PROBLEM_TYPES,
    )
    target_modules: str | list[str] | None = _field(
        None,
        "Name of the module that makes the tokens, for a look-alike of a supported ViT. None: found from the "
        "architecture.",
    )
    modules_to_save: list[str] | None = _field(
        None,
        "Further modules to train and save in full, but not the head: the adapter has one.",
    )
    hidden_size: int | None = _field(None, "Recorded: the backbone's width D.", minimum=1)
    head_features: int | None = _field(None, "Recorded where it is not D: the head's number of features.", minimum=1)
    num_channels: int | None = _field(None, "Recorded: the channels of the backbone's images.", minimum=1)
    patch_size: int | None = _field(
        None, "Recorded with a `prompt_layout`: the side of the backbone's patches, in pixels.", minimum=1
    )
    pgn_peft_version: str | None = _field(None, "Recorded: the version of pgn_peft that made the adapter.")

    def __post_init__(self) -> None:
        _check_task_type(self.task_type)
        self.task_type = None
        super().__post_init__()
        self.peft_type = PGNPeftType.PGN
        self.pgn_peft_version = self.pgn_peft_version or __version__
        for field in own_fields():
            setattr(self, field.name, _read_value(field, getattr(self, field.name)))
        if isinstance(self.target_modules, str):
            self.target_modules = [self.target_modules]
        if self.target_modules is not None and len(self.target_modules) != 1:
            raise ValueError(
                f"target_modules={self.target_modules!r}. Name one module, the embeddings, or leave it out."
            )
        if self.modules_to_save is not None:
            names = [self.modules_to_save] if isinstance(self.modules_to_save, str) else self.modules_to_save
            self.modules_to_save = sorted(names)
        if self.id2label is not None:
            self.id2label = normalize_id2label(self.id2label)
        for name in ("label_mapping", "image_mean", "image_std"):
            kind, values = int if name == "label_mapping" else float, getattr(self, name)
            if values is not None and (isinstance(values, (str, Mapping)) or not isinstance(values, Iterable)):
                raise TypeError(f"`{name}` is {values!r}. It must be a list of numbers.")
            if values is not None:
                setattr(self, name, [kind(value) for value in values])

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json; see `PeftConfig.save_pretrained`.

        Raises:
            ValueError: a `PeftModel` has just written the weights as a pickle, or none.
        """
        pickle, weights = Path(save_directory, WEIGHTS_NAME), Path(save_directory, SAFETENSORS_WEIGHTS_NAME)
        problem = None
        if "auto_mapping_dict" in kwargs:  # PEFT's models pass it, after they have written the weights
            if pickle.is_file() and (not weights.is_file() or weights.stat().st_mtime < pickle.stat().st_mtime):
                problem = (
                    f"safe_serialization=False has written {pickle}, a pickle, which `load_classifier` never opens. "
                    "Delete that file, and save without this option."
                )
            elif weights.is_file() and not _has_tensors(weights):
                problem = (
                    f"No tensor was written to {weights}: the given `state_dict` has none of the adapter's names, as "
                    "after torch.compile. Save without `state_dict`."
                )
        if problem is not None:
            raise ValueError(problem)
        super().save_pretrained(save_directory, **kwargs)


def _has_tensors(file: Path) -> bool:
    with safe_open(file, "pt") as archive:
        return len(archive.keys()) > 0


def own_fields() -> list[dataclasses.Field[Any]]:
    """List the fields that PGN adds to those of PEFT's configs."""
    return [field for field in dataclasses.fields(PGNConfig) if "minimum" in field.metadata]


def _check_task_type(task_type: Any) -> None:
    """Warn of the task type of an image task, which PEFT does not have, and which is ignored.

    Raises:
        ValueError: it is one of PEFT's, all of which pass `input_ids` to the model.
    """
    if task_type is not None and task_type in list(TaskType):
        raise ValueError(
            f"task_type={str(task_type)!r} is a task of texts: PEFT would pass `input_ids` to the model. Leave it out."
        )
    if task_type is not None:
        warnings.warn(f"Ignoring task_type={task_type!r}: PEFT has no image task.", stacklevel=4)


def _read_value(field: dataclasses.Field[Any], value: Any) -> Any:
    """Return a field's value as the plain type that it has in a file.

    Raises:
        TypeError: it should be a number, or True or False, and is none.
        ValueError: it is too small, or not among the choices.
    """
    name, minimum, choices = field.name, field.metadata["minimum"], field.metadata["choices"]
    if value is None and (field.default is None or name == "generator_image_size"):
        return None
    if choices and value not in choices:
        raise ValueError(f"`{name}` is {value!r}. Choose one of {', '.join(choices)}.")
    if "bool" in str(field.type) and not isinstance(value, bool):
        raise TypeError(f"`{name}` is {value!r}. Write True or False.")
    if minimum is None or (name == "prompt_depth" and value == "all"):
        return value
    fraction = "float" in str(field.type)
    if isinstance(value, bool) or not isinstance(value, Real if fraction else Integral):
        raise TypeError(f"`{name}` is {value!r}. It must be {'a number' if fraction else 'an integer'}.")
    if not minimum <= value <= LARGEST:
        raise ValueError(f"`{name}` is {value!r}. It must be at least {minimum}, and at most {LARGEST:,}.")
    return float(value) if fraction else int(value)  # type: ignore[call-overload]  # an Integral, too


def _describe_fields() -> str:
    indent = 4 * " "
    texts = (f"{field.name}: {field.metadata['help']}" for field in own_fields())
    return "\n".join(textwrap.fill(text, 115, initial_indent=indent, subsequent_indent=2 * indent) for text in texts)


# Python -OO leaves no docstring to complete.
_text = inspect.cleandoc(PGNConfig.__doc__ or "")
PGNConfig.__doc__ = _text.replace("Raises:", f"Args:\n{_describe_fields()}\n\nRaises:", 1)
