"""The fields of `PGNConfig`: one description of each, and every check that needs no model.

Help texts, the table in the documentation and the arguments of the training script are made from the descriptions.
"""

from __future__ import annotations

import dataclasses
import enum
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig

from pgn_peft.nn.generator import MIXINGS
from pgn_peft.nn.layout import LAYOUTS
from pgn_peft.nn.trunk import NORMS, TRUNKS
from pgn_peft.tuner.backbones import HEAD
from pgn_peft.tuner.forward_compatibility import check_version
from pgn_peft.utils import values as checks
from pgn_peft.utils.labels import PROBLEM_TYPES, normalize_id2label
from pgn_peft.version import __version__


class PGNPeftType(str, enum.Enum):  # noqa: UP042  (PEFT reads the name off str(member), "PGNPeftType.PGN")
    """The method's name in PEFT. PEFT's own `PeftType` is a closed enum, which a plug-in cannot extend."""

    PGN = "PGN"


def _field(
    default: Any,
    description: str,
    *,
    integers: tuple[int, int] | None = None,
    choices: tuple[str, ...] | None = None,
    none: bool = False,
) -> Any:
    """Declare a field.

    Args:
        default: its default.
        description: for users; what the values mean.
        integers: smallest and largest value of an integer. The upper bounds, far beyond what the method is used with,
            keep a damaged or hostile file from allocating large tensors.
        choices: all values of a string.
        none: None is a value, as it is wherever it is the default.
    """
    limits = {"integers": integers, "choices": choices, "none": none or default is None}
    return dataclasses.field(default=default, metadata={"help": description, **limits})


@dataclass
class PGNFields(PeftConfig):
    """The fields of `PGNConfig` and their checks; see there."""

    num_virtual_tokens: int | None = _field(
        None,
        "Prompts per image, P. None: 16, or with a `prompt_layout` what fills it: all patches of the image for "
        "'dense', one row of patches for 'append', one ring for 'canvas'. Other numbers must fill whole rows and "
        "columns there.",
        integers=(1, 65_536),
    )
    library_size: int = _field(
        64,
        "Learned vectors that prompts are mixed from, L. The official checkpoints have 128 or 256. Unused by the "
        "'static' generator.",
        integers=(1, 1_048_576),
    )
    prompt_depth: int | None = _field(
        1,
        "Number of encoder layers, from the first on, with prompts of their own. 1, the paper's form: prompts are "
        "appended once and stay. None: all layers, which was 2 to 6 points more accurate on three of four data sets. "
        "Each layer has a library of its own; all share an image's coefficients. With generator='static' this is "
        "VPT-deep. In latent space only.",
        integers=(1, 4096),
        none=True,
    )
    generator: str = _field(
        "resnet10",
        "'resnet10', the CNN of the official code, or 'static': P learned prompts, the same for every image (the "
        "input-independent control, VPT-shallow); in the 'dense' layout one for all patches of all images.",
        choices=(*TRUNKS, "static"),
    )
    generator_image_size: int | None = _field(
        64,
        "The generator sees the image with its shorter side resized to this many pixels. None: not resized, as in the "
        "official code. 64 costs a twelfth of 224, and was as accurate as 112.",
        integers=(8, 4096),
        none=True,
    )
    generator_width: int = _field(
        16,
        "Channels of the generator's stem. Parameters and cost of the CNN grow with its square.",
        integers=(4, 1024),
    )
    generator_norm: str = _field(
        "batch",
        "'batch', as in the official code, or 'group', which needs no running statistics.",
        choices=tuple(NORMS),
    )
    generator_rank: int | None = _field(
        None,
        "Length of the queries (one for each prompt of an image) and keys (one for each library entry) whose products "
        "are the mixing logits; 8 needs a twentieth of the parameters. None: one linear layer, the official form.",
        integers=(1, 1024),
    )
    mixing: str = _field(
        "softmax",
        "'softmax' over the library, or 'sigmoid' for each of its entries.",
        choices=tuple(MIXINGS),
    )
    slot_prompts: bool | None = _field(
        None,
        "Also learn a static prompt for each of the P slots, to which the generated part is added. None: in latent "
        "space, where it was more accurate. False: the paper's form.",
    )
    prompt_dropout: float | None = _field(
        None,
        "In training, the share of images whose prompts are mixed by the mean coefficients of their batch, instead of "
        "their own. None: 0.5 where several layers have prompts, which otherwise overfit a few images; else 0.",
    )
    initializer_range: float = _field(
        0.02,
        "Standard deviation of the initial library, or of the static prompts. 'dense' starts at zero.",
    )
    initial_logit_std: float | None = _field(
        None,
        "Standard deviation of the offsets that the mixing logits start from. 0, as in the official code: all prompts "
        "start as nearly the same mixture. 4: each prompt starts near a library entry of its own. None: 4 with "
        "'softmax', 0 with 'sigmoid'.",
    )
    prompt_space: str = _field(
        "latent",
        "'latent': prompts are tokens, as in the paper. 'pixel': prompts become part of the image as valid pixels, so "
        "that the unmodified model is adapted through its input alone.",
        choices=("latent", "pixel"),
    )
    prompt_layout: str | None = _field(
        None,
        "Where patches go. 'dense': a prompt for each patch of the image is added to its pixels. 'canvas': around the "
        "image, which is shrunk into the middle, so that the input keeps its size. 'append': in rows and columns "
        "added below and at the right; in latent space this prepares for prompt inversion. None: 'dense' in pixel "
        "space, none in latent space.",
        choices=tuple(LAYOUTS),
    )
    image_size: int | None = _field(
        None,
        "Side of the square images with a `prompt_layout`, in pixels. None: the model's own.",
        integers=(8, 16_384),
    )
    image_mean: list[float] | None = _field(None, "The image processor's mean of each channel, for pixel space.")
    image_std: list[float] | None = _field(
        None, "The image processor's standard deviation of each channel, for pixel space."
    )
    image_offset: bool | None = _field(
        None,
        "In pixel space, also learn one patch that is added to each patch of the image, clipped to valid pixels. "
        "None: except for 'dense', where all mixtures can have it.",
    )
    jpeg_quality: int | None = _field(
        None,
        "In pixel space, send half of the prompted images through JPEG of this quality in training, for a server that "
        "gets JPEG of this quality or better, or PNG. None: 8-bit pixels, as in PNG.",
        integers=(1, 100),
    )
    head: str = _field(
        "trained",
        "'trained': the adapter owns a classification head for its own labels. 'frozen': the model's head and labels "
        "are used, and only the prompts are trained. 'text': images are compared with a text for each class, as CLIP "
        "does, and only the prompts are trained; give the texts by `use_texts`.",
        choices=("trained", "frozen", "text"),
    )
    text_correction: bool = _field(
        False,
        "With head='text', also learn a matrix E (classes by classes, from zero): logits are multiplied by I + E.",
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
    num_labels: int | None = _field(
        None, "Number of classes, instead of or beside `id2label`.", integers=(1, 1_000_000)
    )
    problem_type: str | None = _field(
        None,
        "'single_label_classification', 'multi_label_classification' or 'regression', as in Transformers. None: "
        "inferred from the labels of the first batch.",
        choices=PROBLEM_TYPES,
    )
    target_modules: str | list[str] | None = _field(
        None,
        "Name of the module that makes the tokens. None: found from the architecture. Name it for a look-alike of a "
        "supported ViT.",
    )
    modules_to_save: list[str] | None = _field(
        None,
        "Further modules to train and save in full. Not the classification head, which the adapter owns already.",
    )
    hidden_size: int | None = _field(None, "Recorded: the backbone's width D.", integers=(1, 65_536))
    head_features: int | None = _field(
        None, "Recorded where they are not D: the features that a head takes.", integers=(1, 131_072)
    )
    num_channels: int | None = _field(None, "Recorded: the channels of the backbone's images.", integers=(1, 4096))
    patch_size: int | None = _field(
        None, "Recorded with a `prompt_layout`: the side of the backbone's patches, in pixels.", integers=(1, 4096)
    )
    pgn_peft_version: str | None = _field(None, "Recorded: the version of pgn_peft that made the adapter.")

    def __post_init__(self) -> None:
        task_type, self.task_type = self.task_type, None  # `validate` says more than PEFT's check
        super().__post_init__()
        self.task_type = task_type
        self.peft_type = PGNPeftType.PGN
        self.saved_checksums: dict[str, str] = {}  # see `with_checksums`; no field, since it describes files
        self.weights_file: Path | None = None  # compared with its checksum, until its tensors are loaded
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
        check_version("pgn_peft_version", self.pgn_peft_version)
        for name in ("base_model_name_or_path", "revision"):
            checks.check_text(name, getattr(self, name))
        checks.check_boolean("inference_mode", self.inference_mode)
        checks.check_texts("auto_mapping", self.auto_mapping)
        for field in own_fields():
            value, limits = getattr(self, field.name), field.metadata
            if limits["integers"] is not None:
                smallest, largest = limits["integers"]
                optional: bool = limits["none"]
                setattr(self, field.name, checks.read_integer(field.name, value, smallest, largest, optional))
            elif limits["choices"] is not None and not (value is None and limits["none"]):
                checks.check_choice(field.name, value, limits["choices"])
        checks.check_scale("initializer_range", self.initializer_range, "0.02")
        if self.initial_logit_std is None:
            self.initial_logit_std = 4.0 if self.mixing == "softmax" else 0.0
        checks.check_scale("initial_logit_std", self.initial_logit_std, "0", zero=True)
        self._check_prompts()
        self.target_modules = checks.read_one_name("target_modules", self.target_modules)
        self.modules_to_save = checks.read_names("modules_to_save", self.modules_to_save)
        for name in self.modules_to_save or ():
            if name.rpartition(".")[2] == HEAD:
                refuse_head_in_modules_to_save(name)
        self._check_labels()

    def _check_prompts(self) -> None:
        generated = self.generator != "static"
        if self.slot_prompts is None:
            self.slot_prompts = generated and self.prompt_space == "latent"
        checks.check_boolean("slot_prompts", self.slot_prompts)
        if self.slot_prompts and not generated:
            raise ValueError(
                "`slot_prompts` must be False with generator='static', but got True. Leave it out: static prompts are "
                "all that this generator has."
            )
        if self.prompt_dropout is None:
            self.prompt_dropout = 0.5 if generated and self.prompt_depth != 1 else 0.0
        checks.check_share("prompt_dropout", self.prompt_dropout)
        if self.prompt_dropout and not generated:
            raise ValueError(
                f"`prompt_dropout` must be 0 with generator='static', but got {self.prompt_dropout}. Leave it out: "
                "static prompts are the same for all images."
            )
        if self.prompt_space == "pixel" and self.prompt_layout is None:
            self.prompt_layout = "dense"
        if self.prompt_depth != 1 and self.prompt_layout is not None:
            raise ValueError(
                f"`prompt_depth` must be 1 with prompt_space='pixel' or a `prompt_layout`, but got "
                f"{self.prompt_depth}. An image brings prompts to the first layer only; leave it out."
            )
        if self.prompt_space == "latent" and self.jpeg_quality is not None:
            raise ValueError(
                f"`jpeg_quality` must be None with prompt_space='latent', but got {self.jpeg_quality}. Only prompts "
                "in pixels become part of an image file."
            )
        if self.prompt_layout is None:
            self.num_virtual_tokens = 16 if self.num_virtual_tokens is None else self.num_virtual_tokens
            return
        dense = self.prompt_layout == "dense"
        if self.image_offset is None:
            self.image_offset = self.prompt_space == "pixel" and not dense
        checks.check_boolean("image_offset", self.image_offset)
        for name in ("image_offset", "generator_rank"):
            if dense and getattr(self, name):
                raise ValueError(
                    f"`{name}` must be left out with prompt_layout='dense', but got {getattr(self, name)!r}. It is "
                    "for prompts around the image."
                )
        if self.prompt_space == "latent" and self.prompt_layout != "append":
            raise ValueError(
                f"`prompt_layout` must be 'append' or None with prompt_space='latent', but got "
                f"{self.prompt_layout!r}. Tokens are appended; use prompt_space='pixel' for a canvas."
            )
        if self.prompt_space == "latent":
            return
        if self.slot_prompts:
            raise ValueError(
                "`slot_prompts` must be False with prompt_space='pixel', but got True. Patches stay valid pixels as "
                "mixtures, and not as sums; initial_logit_std=4 starts each slot near a patch of its own."
            )
        if self.mixing != "softmax" and not dense:
            raise ValueError(
                f"`mixing` must be 'softmax' with prompt_space='pixel', but got {self.mixing!r}. Only coefficients "
                "that sum to 1 mix valid pixels into valid pixels."
            )
        for name, positive in (("image_mean", False), ("image_std", True)):
            if getattr(self, name) is None:
                raise ValueError(
                    f"`{name}` must be given with prompt_space='pixel', but got None. Pass the image processor's: "
                    f"PGNConfig({name}=processor.{name}, ...)."
                )
            setattr(self, name, checks.read_channel_values(name, getattr(self, name), positive))

    def _check_labels(self) -> None:
        checks.check_boolean("text_correction", self.text_correction)
        if self.text_correction and self.head != "text":
            raise ValueError(
                f"`text_correction` must be False with head={self.head!r}, but got True. It corrects logits that come "
                "from texts."
            )
        if self.id2label is not None:
            self.id2label = normalize_id2label(self.id2label)
            if self.num_labels is not None and self.num_labels != len(self.id2label):
                raise ValueError(
                    f"`num_labels` must be the length of `id2label`, {len(self.id2label)}, but got "
                    f"{self.num_labels}. Leave `num_labels` out."
                )
        num_labels = self.num_labels if self.id2label is None else len(self.id2label)
        if self.label_mapping is not None:
            self.label_mapping = checks.read_indices("label_mapping", self.label_mapping)
            if self.head != "frozen":
                raise ValueError(
                    f"`label_mapping` must be None with head={self.head!r}, but got {self.label_mapping!r}. Use "
                    "head='frozen': the mapping reads the model's own answers."
                )
            if num_labels is None:
                num_labels = self.num_labels = len(self.label_mapping)
            if num_labels != len(self.label_mapping):
                raise ValueError(
                    f"`label_mapping` must have an index for each of the {num_labels} classes, but got "
                    f"{len(self.label_mapping)}. Make it for the classes of `id2label`."
                )
        if num_labels == 1 and self.problem_type == "single_label_classification":
            raise ValueError(
                "`problem_type` must be 'regression' or 'multi_label_classification' for a single label, but got "
                "'single_label_classification'. Use two labels for a yes-or-no question."
            )


def own_fields() -> list[dataclasses.Field[Any]]:
    """List the fields that PGN adds to those of PEFT's configs."""
    return [
        field for field in dataclasses.fields(PGNFields) if "help" in field.metadata and "integers" in field.metadata
    ]


def refuse_head_in_modules_to_save(name: str) -> None:
    """Raise, saying why the classification head does not belong in `modules_to_save`."""
    raise ValueError(
        f"`modules_to_save` must not name the classification head, but got {name!r}. A PGN adapter owns its head, "
        "trains and saves it, and can give it labels of its own; a head in `modules_to_save` could not be loaded on a "
        "model with another number of labels. Leave it out; head='frozen' keeps the model's head as it is."
    )
