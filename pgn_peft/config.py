"""`PGNConfig`: every field, and every check that needs no model."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME

from pgn_peft.generator import MIXINGS, NORMS, TRUNKS
from pgn_peft.labels import PROBLEM_TYPES, normalize_id2label
from pgn_peft.version import __version__
from pgn_peft.weights import check_saved_weights

GENERATORS = (*TRUNKS, "static")
HEADS = ("trained", "frozen")
HEAD_NAMES = ("classifier",)

# field -> smallest and largest value, and whether None is one. The upper bounds keep a file that cannot be meant from
# taking all memory; they are far beyond what the method is used with.
INTEGERS = {
    "num_virtual_tokens": (1, 65_536, False),
    "library_size": (1, 1_048_576, False),
    "generator_image_size": (8, 4096, True),
    "generator_width": (4, 1024, False),
    "num_labels": (1, 10_000_000, True),
    "hidden_size": (1, 65_536, True),
    "num_channels": (1, 4096, True),
}


class PGNPeftType(str, enum.Enum):  # noqa: UP042  (PEFT reads the name off str(member), "PGNPeftType.PGN")
    """The method's name in PEFT. PEFT's own `PeftType` is a closed enum, which a plug-in cannot extend."""

    PGN = "PGN"


@dataclass
class PGNConfig(PeftConfig):
    """Configuration of a Prompt Generation Network adapter.

    A field left at None is filled from the model when the adapter is created, and saved with it.

    Args:
        num_virtual_tokens: prompts per image, P.
        library_size: learned vectors that prompts are mixed from, L. Unused by the "static" generator.
        generator: "resnet10", the CNN of the official code, or "static": P learned prompts, the same for every image
            (the input-independent control, VPT-shallow).
        generator_image_size: the generator sees the image with its shorter side resized to this many pixels; None:
            as it is. Smaller is faster.
        generator_width: channels of the generator's stem. Parameters and cost of the CNN grow with its square.
        generator_norm: "batch", as in the official code, or "group", which needs no running statistics.
        mixing: "softmax" over the library or "sigmoid" for each of its entries.
        initializer_range: standard deviation of the initial library (or static prompts).
        initial_logit_std: standard deviation of the offsets that the mixing logits start from. 0, as in the official
            code: all prompts start as nearly the same mixture. 4: each prompt starts near a library token of its own.
        head: "trained": the adapter owns a classification head for its own labels; "frozen": the model's head and
            labels are used and only the prompts are trained.
        id2label: names of the adapter's classes by index, 0 to n-1. None: the model's own labels, or LABEL_0 to
            LABEL_{n-1} where `num_labels` differs from the model's.
        num_labels: number of classes, instead of or beside `id2label`.
        problem_type: "single_label_classification", "multi_label_classification", "regression" or None, as in
            Transformers, where None means: read it off the labels of the first batch.
        target_modules: name of the module that makes the tokens. None: found from the architecture. Name it for a
            look-alike of a supported ViT.
        modules_to_save: further modules to train and save in full. The classification head is not one of them: the
            adapter owns it already.
        hidden_size: recorded: the backbone's width D.
        num_channels: recorded: the channels of the backbone's images.
        pgn_peft_version: recorded: the version of pgn_peft that made the adapter.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has an impossible value.

    Source: arXiv:2210.06466. Differs from the official code: the shorter side is not resized by default, which is
    what its released checkpoints saw (224 px images at resolution 224).
    """

    num_virtual_tokens: int = field(default=16, metadata={"help": "Prompts per image."})
    library_size: int = field(default=256, metadata={"help": "Learned vectors that prompts are mixed from."})
    generator: str = field(default="resnet10", metadata={"help": "'resnet10' or 'static'."})
    generator_image_size: int | None = field(
        default=None, metadata={"help": "Shorter side of the image that the generator sees, in pixels."}
    )
    generator_width: int = field(default=16, metadata={"help": "Channels of the generator's stem."})
    generator_norm: str = field(default="batch", metadata={"help": "'batch' or 'group'."})
    mixing: str = field(default="softmax", metadata={"help": "'softmax' or 'sigmoid'."})
    initializer_range: float = field(default=0.02, metadata={"help": "Standard deviation of the initial library."})
    initial_logit_std: float = field(default=0.0, metadata={"help": "Spread of the initial mixing logits."})
    head: str = field(default="trained", metadata={"help": "'trained' or 'frozen'."})
    id2label: dict[int, str] | None = field(default=None, metadata={"help": "Names of the classes by index."})
    num_labels: int | None = field(default=None, metadata={"help": "Number of classes."})
    problem_type: str | None = field(default=None, metadata={"help": "Transformers' problem type."})
    target_modules: str | list[str] | None = field(
        default=None, metadata={"help": "The module that makes the tokens, for a look-alike of a supported ViT."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save in full, not the classification head."}
    )
    hidden_size: int | None = field(default=None, metadata={"help": "Recorded: the backbone's width."})
    num_channels: int | None = field(default=None, metadata={"help": "Recorded: channels of the images."})
    pgn_peft_version: str | None = field(default=None, metadata={"help": "Recorded: version of pgn_peft."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PGNPeftType.PGN
        if self.pgn_peft_version is None:
            self.pgn_peft_version = __version__
        self.validate()

    def validate(self) -> None:
        """Check all fields, and bring labels and module names into their one form.

        Called on creation, and again when the adapter is made, since fields can be assigned in between.

        Raises:
            TypeError: a field has the wrong type.
            ValueError: a field has an impossible value.
        """
        if self.task_type is not None:
            raise ValueError(
                f"`task_type` must be None, but got {self.task_type!r}. PEFT has no image task, and its task classes "
                "pass `input_ids`; leave it out."
            )
        for name, (minimum, maximum, optional) in INTEGERS.items():
            setattr(self, name, _integer(name, getattr(self, name), minimum, maximum, optional))
        _check_choice("generator", self.generator, GENERATORS)
        _check_choice("generator_norm", self.generator_norm, tuple(NORMS))
        _check_choice("mixing", self.mixing, tuple(MIXINGS))
        _check_choice("head", self.head, HEADS)
        if self.problem_type is not None:
            _check_choice("problem_type", self.problem_type, PROBLEM_TYPES)
        _check_scale("initializer_range", self.initializer_range, "0.02")
        _check_scale("initial_logit_std", self.initial_logit_std, "0", zero=True)
        self.target_modules = _one_name("target_modules", self.target_modules)
        self.modules_to_save = _names("modules_to_save", self.modules_to_save)
        for name in self.modules_to_save or ():
            if name.rpartition(".")[2] in HEAD_NAMES:
                refuse_head_in_modules_to_save(name)
        self._check_labels()

    def _check_labels(self) -> None:
        if self.id2label is not None:
            self.id2label = normalize_id2label(self.id2label)
            if self.num_labels is not None and self.num_labels != len(self.id2label):
                raise ValueError(
                    f"`num_labels` must be the length of `id2label`, {len(self.id2label)}, but got "
                    f"{self.num_labels}. Leave `num_labels` out."
                )
        num_labels = self.num_labels if self.id2label is None else len(self.id2label)
        if num_labels == 1 and self.problem_type == "single_label_classification":
            raise ValueError(
                "`problem_type` must be 'regression' or 'multi_label_classification' for a single label, but got "
                "'single_label_classification'. Use two labels for a yes-or-no question."
            )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PGNConfig:
        """Load the configuration of a saved adapter; see `PeftConfig.from_pretrained`.

        Raises:
            ValueError: there is no configuration, or the weights that belong beside it in a local directory are not
                there, cannot be read, or are not what it describes. PEFT would find that out after it had changed the
                model, or not at all.
        """
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        folder = Path(pretrained_model_name_or_path, subfolder or "")
        # The width is recorded when an adapter is made; without it this is a bare configuration.
        if folder.joinpath(CONFIG_NAME).is_file() and config.hidden_size is not None:
            check_saved_weights(folder, config)
        return config


def refuse_head_in_modules_to_save(name: str) -> None:
    """Raise, saying why the classification head does not belong into `modules_to_save`."""
    raise ValueError(
        f"`modules_to_save` must not name the classification head, but got {name!r}. A PGN adapter owns its head, "
        "trains and saves it, and can give it labels of its own; a head in `modules_to_save` could not be loaded on a "
        "model with another number of labels. Leave it out; head='frozen' keeps the model's head as it is."
    )


def _integer(name: str, value: Any, minimum: int, maximum: int, optional: bool) -> int | None:
    if optional and value is None:
        return None
    if not isinstance(value, Integral) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be an integer, but got {value!r}. Use a whole number of at least {minimum}.")
    if not minimum <= value <= maximum:
        raise ValueError(f"`{name}` must lie in {minimum}..{maximum}, but got {value!r}. Use a number in this range.")
    return int(value)


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be a string, but got {value!r}. Choose one of {', '.join(choices)}.")
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(choices)}, but got {value!r}. Choose one of these.")


def _check_scale(name: str, value: Any, official: str, zero: bool = False) -> None:
    remedy = f"The official code uses {official}."
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a number, but got {value!r}. {remedy}")
    if not (0 < value <= 1000 or (zero and value == 0)):
        bound = "" if zero else ", above 0"
        raise ValueError(f"`{name}` must lie in 0..1000{bound}, but got {value!r}. {remedy}")


def _names(name: str, value: Any) -> list[str] | None:
    if value is None:
        return None
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, (list, tuple, set)) or not all(isinstance(item, str) and item for item in names):
        raise TypeError(f"`{name}` must be a list of module names, but got {value!r}. Give names as strings.")
    return sorted(names) if isinstance(names, set) else list(names)


def _one_name(name: str, value: Any) -> list[str] | None:
    names = _names(name, value)
    if names is not None and len(names) != 1:
        raise ValueError(
            f"`{name}` must name one module, the embeddings, but got {value!r}. Prompts are added in one place; leave "
            "it out for a supported architecture."
        )
    return names
