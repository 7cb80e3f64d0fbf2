"""`PGNConfig`: every field, and every check that needs no model."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME

from pgn_peft import checks
from pgn_peft.checksums import compare_file, record, with_checksums
from pgn_peft.files import COMPLETE, finish_save, read_settings, replacing
from pgn_peft.generator import MIXINGS, NORMS, TRUNKS
from pgn_peft.labels import PROBLEM_TYPES, normalize_id2label
from pgn_peft.layout import LAYOUTS
from pgn_peft.newer import check_version, name_newer, reads_newer
from pgn_peft.version import __version__
from pgn_peft.weights import check_saved_weights, checksums_of_parts, find_weights

GENERATORS = (*TRUNKS, "static")
HEADS = ("trained", "frozen")
PROMPT_SPACES = ("latent", "pixel")
HEAD_NAMES = ("classifier",)
PARTS = ("pgn_generator", "pgn_library", "pgn_head")

# field -> smallest and largest value, and whether None is one. The upper bounds keep a file that cannot be meant from
# taking all memory; they are far beyond what the method is used with.
INTEGERS = {
    "num_virtual_tokens": (1, 65_536, True),
    "library_size": (1, 1_048_576, False),
    "prompt_depth": (1, 4096, True),
    "generator_image_size": (8, 4096, True),
    "generator_width": (4, 1024, False),
    "generator_rank": (1, 1024, True),
    "num_labels": (1, 1_000_000, True),
    "hidden_size": (1, 65_536, True),
    "head_features": (1, 131_072, True),
    "num_channels": (1, 4096, True),
    "image_size": (8, 16_384, True),
    "patch_size": (1, 4096, True),
}


class PGNPeftType(str, enum.Enum):  # noqa: UP042  (PEFT reads the name off str(member), "PGNPeftType.PGN")
    """The method's name in PEFT. PEFT's own `PeftType` is a closed enum, which a plug-in cannot extend."""

    PGN = "PGN"


@with_checksums(CONFIG_NAME)
@reads_newer
@dataclass
class PGNConfig(PeftConfig):
    """Configuration of a Prompt Generation Network adapter.

    A field left at None is filled from the model when the adapter is created, and saved with it.

    Args:
        num_virtual_tokens: prompts per image, P. None: 16, or with a `prompt_layout` what fills it: one row of patches
            for "append", one ring for "canvas". Other numbers must fill whole rows and columns there.
        library_size: learned vectors that prompts are mixed from, L; 128 or 256 in the official checkpoints. Unused
            by the "static" generator.
        prompt_depth: layers of the backbone, from the first on, that get prompts of their own in place of the ones
            before. 1, the paper's form: prompts are appended once and stay; None: all layers, which opens the model
            further and was 2 to 6 points more accurate on three of four data sets. Each layer has a library and slots
            of its own, and all share the coefficients of an image. With generator="static" this is VPT-deep. In
            latent space only.
        generator: "resnet10", the CNN of the official code, or "static": P learned prompts, the same for every image
            (the input-independent control, VPT-shallow).
        generator_image_size: the generator sees the image with its shorter side resized to this many pixels; None:
            as it is, as in the official code. 64 costs a twelfth of 224, and was as accurate as 112.
        generator_width: channels of the generator's stem. Parameters and cost of the CNN grow with its square.
        generator_norm: "batch", as in the official code, or "group", which needs no running statistics.
        generator_rank: length of the queries (one for each prompt of an image) and keys (one for each entry of the
            library) whose products are the mixing logits: at 8 a twentieth of the parameters of the official code's
            linear layer, which None stands for.
        mixing: "softmax" over the library or "sigmoid" for each of its entries.
        slot_prompts: also learn a static prompt for each of the P slots, to which the generated part is added. None:
            in latent space, where it was the better form; False is the paper's. The "static" generator has nothing
            else anyway, and pixels do not add up to valid ones.
        initializer_range: standard deviation of the initial library (or static prompts).
        initial_logit_std: standard deviation of the offsets that the mixing logits start from. 0, as in the official
            code: all prompts start as nearly the same mixture. 4: each prompt starts near a library token of its own.
            None: 4, and 0 with mixing="sigmoid", which it would switch on and off.
        prompt_space: "latent": prompts are tokens, as in the paper; "pixel": they are patches of valid pixels laid
            into the image, so that the unmodified model can be adapted through its input alone.
        prompt_layout: where patches go. "canvas": around the image, which is shrunk into the middle, so that the
            input keeps its size; "append": in rows and columns added below and at the right. None: "canvas" in pixel
            space, none in latent space. "append" in latent space prepares for prompt inversion: P must fill the rows.
        image_size: side of the (square) images with a `prompt_layout`, in pixels. None: the model's own.
        image_mean: the image processor's mean of each channel, for pixel space.
        image_std: the image processor's standard deviation of each channel, for pixel space.
        image_offset: in pixel space, also learn one patch that is added to each of the image's own patches, clipped to
            valid pixels.
        head: "trained": the adapter owns a classification head for its own labels; "frozen": the model's head and
            labels are used and only the prompts are trained.
        label_mapping: for each of the adapter's classes the index of the model's class that stands for it, with
            head="frozen": the model's own answers, read as the task's. See `frequency_mapping`.
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
        head_features: recorded where they are not D: the features that the model's head takes.
        num_channels: recorded: the channels of the backbone's images.
        patch_size: recorded with a `prompt_layout`: the side of the backbone's patches, in pixels.
        pgn_peft_version: recorded: the version of pgn_peft that made the adapter.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field has an impossible value.

    Source: arXiv:2210.06466. Differs by default from the official code, whose form is `generator_image_size=None`
    (its released checkpoints saw 224 px), `slot_prompts=False` and `initial_logit_std=0`.
    """

    num_virtual_tokens: int | None = field(default=None, metadata={"help": "Prompts per image."})
    library_size: int = field(default=64, metadata={"help": "Learned vectors that prompts are mixed from."})
    prompt_depth: int | None = field(
        default=1, metadata={"help": "Layers that get prompts of their own; 1: appended once; None: all layers."}
    )
    generator: str = field(default="resnet10", metadata={"help": "'resnet10' or 'static'."})
    generator_image_size: int | None = field(
        default=64, metadata={"help": "Shorter side of the image that the generator sees, in pixels."}
    )
    generator_width: int = field(default=16, metadata={"help": "Channels of the generator's stem."})
    generator_norm: str = field(default="batch", metadata={"help": "'batch' or 'group'."})
    generator_rank: int | None = field(
        default=None, metadata={"help": "Length of queries and keys of a factorised head; None: one linear layer."}
    )
    mixing: str = field(default="softmax", metadata={"help": "'softmax' or 'sigmoid'."})
    slot_prompts: bool | None = field(
        default=None, metadata={"help": "Add the generated part to a static prompt a slot."}
    )
    initializer_range: float = field(default=0.02, metadata={"help": "Standard deviation of the initial library."})
    initial_logit_std: float | None = field(default=None, metadata={"help": "Spread of the initial mixing logits."})
    prompt_space: str = field(default="latent", metadata={"help": "'latent' or 'pixel'."})
    prompt_layout: str | None = field(default=None, metadata={"help": "'append' or 'canvas'."})
    image_size: int | None = field(default=None, metadata={"help": "Side of the images with a layout, in pixels."})
    image_mean: list[float] | None = field(default=None, metadata={"help": "The processor's mean, for pixel space."})
    image_std: list[float] | None = field(default=None, metadata={"help": "The processor's deviation, likewise."})
    image_offset: bool = field(default=True, metadata={"help": "Learn a patch added to the image, in pixel space."})
    head: str = field(default="trained", metadata={"help": "'trained' or 'frozen'."})
    label_mapping: list[int] | None = field(
        default=None, metadata={"help": "The model's class for each of the adapter's, with a frozen head."}
    )
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
    head_features: int | None = field(default=None, metadata={"help": "Recorded: features that the head takes."})
    num_channels: int | None = field(default=None, metadata={"help": "Recorded: channels of the images."})
    patch_size: int | None = field(default=None, metadata={"help": "Recorded: side of the backbone's patches."})
    pgn_peft_version: str | None = field(default=None, metadata={"help": "Recorded: version of pgn_peft."})

    def __post_init__(self) -> None:
        task_type, self.task_type = self.task_type, None  # `validate` says more than PEFT's check
        super().__post_init__()
        self.task_type = task_type
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
        for name in ("base_model_name_or_path", "revision"):
            checks.check_text(name, getattr(self, name))
        checks.check_boolean("inference_mode", self.inference_mode)
        checks.check_texts("auto_mapping", self.auto_mapping)
        for name, (minimum, maximum, optional) in INTEGERS.items():
            setattr(self, name, checks.check_integer(name, getattr(self, name), minimum, maximum, optional))
        check_version("pgn_peft_version", self.pgn_peft_version)
        checks.check_choice("generator", self.generator, GENERATORS)
        checks.check_choice("generator_norm", self.generator_norm, tuple(NORMS))
        checks.check_choice("mixing", self.mixing, tuple(MIXINGS))
        checks.check_choice("head", self.head, HEADS)
        if self.problem_type is not None:
            checks.check_choice("problem_type", self.problem_type, PROBLEM_TYPES)
        checks.check_scale("initializer_range", self.initializer_range, "0.02")
        if self.initial_logit_std is None:
            self.initial_logit_std = 4.0 if self.mixing == "softmax" else 0.0
        checks.check_scale("initial_logit_std", self.initial_logit_std, "0", zero=True)
        self._check_prompts()
        self.target_modules = checks.check_one_name("target_modules", self.target_modules)
        self.modules_to_save = checks.check_names("modules_to_save", self.modules_to_save)
        for name in self.modules_to_save or ():
            if name.rpartition(".")[2] in HEAD_NAMES:
                checks.refuse_head_in_modules_to_save(name)
        self._check_labels()

    def _check_prompts(self) -> None:
        checks.check_choice("prompt_space", self.prompt_space, PROMPT_SPACES)
        generated = self.generator != "static"
        if self.slot_prompts is None:
            self.slot_prompts = generated and self.prompt_space == "latent"
        checks.check_boolean("slot_prompts", self.slot_prompts)
        if self.slot_prompts and not generated:
            raise ValueError(
                "`slot_prompts` must be False with generator='static', but got True. Leave it out: static prompts are "
                "all that this generator has."
            )
        if self.prompt_space == "pixel" and self.prompt_layout is None:
            self.prompt_layout = "canvas"
        if self.prompt_depth != 1 and self.prompt_layout is not None:
            raise ValueError(
                f"`prompt_depth` must be 1 with prompt_space='pixel' or a `prompt_layout`, but got "
                f"{self.prompt_depth}. An image brings prompts to the first layer only; leave it out."
            )
        if self.prompt_layout is None:
            self.num_virtual_tokens = 16 if self.num_virtual_tokens is None else self.num_virtual_tokens
            return
        checks.check_choice("prompt_layout", self.prompt_layout, LAYOUTS)
        checks.check_boolean("image_offset", self.image_offset)
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
        if self.mixing != "softmax":
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
            setattr(self, name, checks.check_channel_values(name, getattr(self, name), positive))

    def _check_labels(self) -> None:
        if self.id2label is not None:
            self.id2label = normalize_id2label(self.id2label)
            if self.num_labels is not None and self.num_labels != len(self.id2label):
                raise ValueError(
                    f"`num_labels` must be the length of `id2label`, {len(self.id2label)}, but got "
                    f"{self.num_labels}. Leave `num_labels` out."
                )
        num_labels = self.num_labels if self.id2label is None else len(self.id2label)
        if self.label_mapping is not None:
            self.label_mapping = checks.check_indices("label_mapping", self.label_mapping)
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

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write adapter_config.json, with checksums; see `PeftConfig.save_pretrained`.

        Called by a `PeftModel` it records the checksum of the weights too, which are there already.

        Raises:
            OSError: the folder cannot be written to.
        """
        # PEFT's models pass this argument, after the weights are written. Transformers' models write them afterwards,
        # so that what lies there now may be those of an earlier save.
        weights_are_written = "auto_mapping_dict" in kwargs
        weights = Path(save_directory, SAFETENSORS_WEIGHTS_NAME)
        if weights_are_written:  # a save that was interrupted before is not completed over them
            Path(save_directory, COMPLETE, SAFETENSORS_WEIGHTS_NAME).unlink(missing_ok=True)
        with replacing(Path(save_directory)) as folder:
            super().save_pretrained(str(folder), **kwargs)
            if weights_are_written and weights.is_file():
                record(folder / CONFIG_NAME, [weights], checksums_of_parts(weights))
            else:
                record(folder / CONFIG_NAME)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> PGNConfig:
        """Load the configuration of a saved adapter and check its weights; see `PeftConfig.from_pretrained`.

        From the Hub this fetches the weights too, which a loader would do next.

        Raises:
            OSError: a save was interrupted, and its files cannot be moved to their places.
            ValueError: there is no configuration, or the weights that belong beside it are not there, cannot be read,
                or are not what it describes, or one of the two was changed after it was saved. PEFT would find that
                out after it had changed the model, or not at all.
        """
        finish_save(Path(pretrained_model_name_or_path, subfolder or ""))
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)
        # The width is recorded when an adapter is made; without it this is a bare configuration.
        if config.hidden_size is not None:
            download_kwargs, _, _ = cls._split_kwargs(kwargs)
            with name_newer(config.pgn_peft_version):
                folder = find_weights(str(pretrained_model_name_or_path), subfolder, download_kwargs)
                check_saved_weights(folder, config)
            compare_file(folder / SAFETENSORS_WEIGHTS_NAME, config.saved_checksums, CONFIG_NAME)
            for part in PARTS:  # which the file's checksum includes
                config.saved_checksums.pop(part, None)
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str, **kwargs: Any) -> dict[str, Any]:
        """Read the fields of a configuration's file.

        Raises:
            ValueError: it is no JSON object, or one of another method.
        """
        settings = read_settings(Path(path_json_file))
        if settings.get("peft_type") != PGNPeftType.PGN.value:
            raise ValueError(
                f"`peft_type` must be {PGNPeftType.PGN.value!r}, but got {settings.get('peft_type')!r} in "
                f"{str(path_json_file)!r}. Load adapters of other methods with PEFT."
            )
        return super().from_json_file(path_json_file, **kwargs)
