"""`load_classifier`: from an adapter's id to a `Classifier`, the model with its labels and image processor.

Transformers' own `pipeline(model=adapter_id)` finds model and labels too, but takes the base's image processor, looks
`revision` up in the base's repository, and passes no `subfolder` to the adapter.
"""

from __future__ import annotations

import base64
import logging
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from huggingface_hub import CommitInfo, get_session
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from pgn_peft.hub import onnx_export, publishing
from pgn_peft.hub.image_processors import interpolate_if_needed, made_of_square
from pgn_peft.hub.model_card import ModelCardInfo
from pgn_peft.nn.images import convert_image
from pgn_peft.tuner.adapters import prompt_layer, unwrap
from pgn_peft.tuner.backbones import SUPPORTED
from pgn_peft.tuner.config import PGNConfig
from pgn_peft.utils.sources import find_folder, one_line

if TYPE_CHECKING:
    from transformers import ImageClassificationPipeline, PreTrainedModel

logger = logging.getLogger(__name__)

PROCESSOR_FILE = "preprocessor_config.json"
PROCESSOR_FILES = (PROCESSOR_FILE, "processor_config.json")
# All that is downloaded. Pickles and Python files, which can run code, are not.
ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, *PROCESSOR_FILES)
BASE_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json", *PROCESSOR_FILES)


class _Pipeline(transformers.ImageClassificationPipeline):
    """The image pipeline, which also takes models that classify by an adapter's head, and images of 16 bits.

    Of the former Transformers would log an error; pixels of the latter it would clip at 255.
    """

    __module__ = transformers.ImageClassificationPipeline.__module__  # Gradio takes pipelines from there only

    def check_model_type(self, supported_models: Any) -> None:
        """Accept every model."""

    def preprocess(self, image: Any, timeout: float | None = None) -> Any:  # type: ignore[override]  # as its class does
        """Read an image as `convert_image` does: a path, a URL, base64 or a Pillow image."""
        if isinstance(image, str):
            image = _open_image(image, timeout)
        return super().preprocess(convert_image(image) if isinstance(image, Image.Image) else image)


def _open_image(source: str, timeout: float | None) -> Image.Image:
    if Path(source[:1024]).is_file():
        return Image.open(source)
    try:
        if source.startswith(("http://", "https://")):
            content = get_session().get(source, timeout=timeout, follow_redirects=True).content
        else:
            content = base64.b64decode(source.rpartition(",")[2])
        return Image.open(BytesIO(content))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"{source[:100]!r} is no image. Pass the path of a file, a URL, base64 or a Pillow image."
        ) from error


class Classifier(NamedTuple):
    """A model with an active PGN adapter, and the image processor that belongs to the adapter.

    Attributes:
        model: a Transformers model that carries the adapter, or PEFT's model around one.
        image_processor: makes the `pixel_values` that the adapter was trained on.
    """

    model: nn.Module
    image_processor: Any

    def pipeline(self, **kwargs: Any) -> ImageClassificationPipeline:
        """Make Transformers' image classification pipeline; `kwargs` are those of `transformers.pipeline`.

        The model is put into eval mode, which a pipeline does not do. In training mode dropout and batch statistics
        would change the predictions, and each prediction would update the adapter's BatchNorm statistics. Images keep
        the processor's size, even if the base's is another one.
        """
        options = {"pipeline_class": _Pipeline} | kwargs
        return transformers.pipeline(
            "image-classification", model=self._prepare_model().eval(), image_processor=self.image_processor, **options
        )

    def export_onnx(self, path: str | Path) -> None:
        """Export model and adapter as one ONNX graph (with `onnx` and `onnxscript` installed).

        From `pixel_values` (B, C, H, W), float32, as the image processor makes them of a square image, to `logits`
        (B, num_labels), for any B. The labels lie in the file's metadata as "id2label", in JSON. Weights of more than
        2 GiB go into a second file beside it.

        Args:
            path: the file to write.

        Raises:
            TypeError: the model has no PGN adapter.
        """
        model = self._prepare_model()
        onnx_export.export_model(model, made_of_square(prompt_layer(model), self.image_processor), Path(path))

    def _prepare_model(self) -> PreTrainedModel:
        """Have the Transformers model inside take images of the processor's size, and return it."""
        model = unwrap(self.model)
        if isinstance(model, PeftModel):
            model = model.get_base_model()
        interpolate_if_needed(model, self.image_processor)
        return model

    def save_pretrained(self, save_directory: str | Path, facts: ModelCardInfo | None = None) -> None:
        """Write adapter_model.safetensors, adapter_config.json, preprocessor_config.json and README.md, the card.

        Args:
            save_directory: a folder, which is made. Other files in it are left alone.
            facts: facts for the card.

        Raises:
            TypeError: the model has no active PGN adapter, or `image_processor` is not an image processor.
        """
        publishing.save(self.model, self.image_processor, Path(save_directory), facts or ModelCardInfo())

    def push_to_hub(
        self,
        repo_id: str,
        facts: ModelCardInfo | None = None,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload adapter",
        create_pr: bool = False,
        save_directory: str | Path | None = None,
    ) -> CommitInfo:
        """Publish what `save_pretrained` writes, in one commit; the repository is made where it does not exist.

        Args:
            repo_id: the repository, "user/name".
            facts: facts for the card.
            private: whether a new repository is private; None: as the owner's settings say.
            token: a token with write access; None: the one of `hf auth login`.
            revision: a branch, made where it does not exist; None: main.
            commit_message: the commit's summary.
            create_pr: open a pull request instead.
            save_directory: where to write the files first; None: a temporary folder, which is removed after success.

        Raises:
            TypeError: the model has no active PGN adapter, or `image_processor` is not an image processor.
            ValueError: `repo_id` is not a valid id, or the base model is a folder that nobody else has.
            OSError: the Hub refused the upload or could not be reached. The files are kept, and the message says where
                and how to go on.
        """
        upload = publishing.Upload(repo_id, private, token, revision, commit_message, create_pr)
        return publishing.push(self.model, self.image_processor, upload, facts or ModelCardInfo(), save_directory)


def load_classifier(
    pretrained_model_name_or_path: str | Path,
    *,
    base_model_name_or_path: str | Path | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    device_map: Any = None,
    dtype: str | torch.dtype = "auto",
) -> Classifier:
    """Load an adapter with its base model, its labels and its image processor, ready to classify.

    Safe for adapters that are not trusted: of adapter and base only JSON and safetensors are fetched and read, and no
    code that comes with them is run.

    Args:
        pretrained_model_name_or_path: an adapter's folder, or its id on the Hub.
        base_model_name_or_path: the base model's folder or id; None: what the adapter says.
        revision: branch, tag or commit of the adapter. That of the base is recorded in the adapter.
        subfolder: folder of the adapter in its repository or directory.
        token: for private repositories; None: the token of `hf auth login`.
        cache_dir: where downloads are kept; None: the Hub's cache.
        local_files_only: do not call the Hub, only look into the cache. (As with HF_HUB_OFFLINE=1.)
        device_map: as in Transformers: "auto", a device, or a dictionary.
        dtype: of the base model: "auto", as it was saved, or a torch dtype. Adapters stay in float32.

    Returns:
        `Classifier`, a pair: the Transformers model in eval mode, whose config has the adapter's labels, and the
        image processor. Without a processor of the adapter's own it is the base's, which is logged. If that makes
        images of another size than the base's, the model interpolates the position embeddings by itself.

    Raises:
        OSError: a file is missing, or cannot be downloaded.
        ValueError: the adapter is not one of PGN for a classifier, or does not fit the base, or a file is damaged.
        TypeError: the base is not a supported architecture.
    """
    options: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    name = str(Path(pretrained_model_name_or_path, subfolder or ""))
    patterns = [file if subfolder is None else f"{subfolder}/{file}" for file in ADAPTER_FILES]
    folder = find_folder(
        "pretrained_model_name_or_path", pretrained_model_name_or_path, patterns, revision=revision, **options
    ).joinpath(subfolder or "")
    config = _read_config(folder, name)

    base, base_revision = base_model_name_or_path, None
    if base is None:
        base, base_revision = config.base_model_name_or_path, config.revision
    try:
        base_folder = find_folder("base_model_name_or_path", str(base), BASE_FILES, revision=base_revision, **options)
    except OSError as error:
        raise OSError(
            f"{one_line(error)} {name!r} was made for this base model: where it has been moved, pass its place, "
            "load_classifier(..., base_model_name_or_path=...)."
        ) from error
    model = _load_base(base_folder, str(base), config, device_map, dtype)
    model.load_adapter(str(folder), use_safetensors=True)
    # In a folder with both files Transformers prefers the second, which an earlier save of a CLIP processor can have
    # left there (huggingface/transformers#42085); `save_pretrained` writes the first.
    source = folder / PROCESSOR_FILE if folder.joinpath(PROCESSOR_FILE).is_file() else folder
    if not any(folder.joinpath(file).is_file() for file in PROCESSOR_FILES):
        logger.warning("%s has no image processor of its own; taking that of its base model, %s", name, base)
        source = base_folder
    image_processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    interpolate_if_needed(model, image_processor)
    return Classifier(model, image_processor)


def _read_config(folder: Path, name: str) -> PGNConfig:
    remedies = {
        CONFIG_NAME: "Look for a misspelt name, or pass the `subfolder` that the adapter lies in.",
        SAFETENSORS_WEIGHTS_NAME: "Pickled weights (adapter_model.bin) are not read, because they can run code. Where "
        "you trust them, load them with PEFT and save the adapter again, which writes safetensors.",
    }
    for file, remedy in remedies.items():
        if not folder.joinpath(file).is_file():
            raise OSError(f"There is no {file} in {name!r}. {remedy}")
    config = PGNConfig.from_pretrained(str(folder))
    if not isinstance(config, PGNConfig):
        raise ValueError(f"{name!r} is an adapter of another method, {config.peft_type}. Load it with PEFT.")
    if config.num_labels is None:
        raise ValueError(
            f"The adapter in {name!r} has no labels: it answers with features. Load it with AutoPeftModel."
        )
    return config


def _load_base(
    folder: Path, name: str, config: PGNConfig, device_map: Any, dtype: str | torch.dtype
) -> PreTrainedModel:
    # Transformers would follow an adapter to its own base, and read weights of whatever kind there.
    is_adapter = folder.joinpath(CONFIG_NAME).is_file()
    if is_adapter or not folder.joinpath("config.json").is_file() or not any(folder.glob("model*.safetensors")):
        raise OSError(
            f"The base model {name!r} is an adapter, or lacks config.json or weights in safetensors. Pass a model "
            "without adapters; pickled weights are not read, because they can run code: convert them first."
        )
    made_for = (config.auto_mapping or {}).get("base_model_class")
    # From our own table of names: importing a module that a file names could run untrusted code.
    model_class: Any = getattr(transformers, made_for) if made_for in SUPPORTED else AutoModelForImageClassification
    automatic = model_class is AutoModelForImageClassification
    options = {"trust_remote_code": False} if automatic else {}
    # A tower's own configuration, where the base has two.
    base_config = (AutoConfig if automatic else model_class.config_class).from_pretrained(folder, **options)
    base_config._attn_implementation = None  # a file could name a kernel on the Hub, which is code
    model, found = model_class.from_pretrained(
        folder,
        config=base_config,
        use_safetensors=True,
        device_map=device_map,
        dtype=dtype,
        output_loading_info=True,
        **options,
    )
    backbone = SUPPORTED.get(made_for or "")
    own_head = None if config.head == "frozen" or backbone is None else backbone.head
    # What the adapter brings itself, and the pooler of a ViT, which no classifier reads.
    unread = "pooler.dense" if backbone is not None and backbone.head is None else None
    allowed = tuple(f"{name}." for name in (own_head, unread) if name is not None)
    missing = sorted(name for name in found["missing_keys"] if not name.startswith(allowed))
    if missing and backbone is not None:
        raise ValueError(
            f"The base model {name!r} has no weights for {', '.join(missing[:3])} of a {made_for}; {len(missing)} are "
            "missing in all. Pass the checkpoint that the adapter was made for."
        )
    return model
