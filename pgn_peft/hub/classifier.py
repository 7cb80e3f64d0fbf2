"""`load_classifier`: from an adapter's id to a `Classifier`, the model with its labels and image processor.

Transformers' own `pipeline(model=adapter_id)` loads model and labels too, but it takes the base's image processor,
applies `revision` to the base's repository, and ignores `subfolder`.
"""

from __future__ import annotations

import base64
import json
import logging
import shutil
import tempfile
import warnings
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import transformers
from huggingface_hub import CommitInfo, HfApi, get_session
from peft import PeftModel
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification

from pgn_peft.hub import publishing
from pgn_peft.hub.image_processors import interpolate_if_needed, made_size
from pgn_peft.hub.publishing import ModelCardInfo
from pgn_peft.nn.functional import evaluating
from pgn_peft.nn.images import convert_image
from pgn_peft.tuner.adapters import prompt_layer, unwrap
from pgn_peft.tuner.backbones import SUPPORTED
from pgn_peft.tuner.config import PGNConfig
from pgn_peft.tuner.embeddings import own_image_size
from pgn_peft.utils.files import find_folder
from pgn_peft.utils.markdown import update_card_for_hub
from pgn_peft.utils.onnx import export_module

if TYPE_CHECKING:
    from transformers import ImageClassificationPipeline, PreTrainedModel

logger = logging.getLogger(__name__)

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
# Only these files are downloaded. Pickles and Python files, which can run code, are not.
ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, *PROCESSOR_FILES)
BASE_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json", *PROCESSOR_FILES)


class _Pipeline(transformers.ImageClassificationPipeline):
    """Transformers' image pipeline, extended to models that classify with an adapter's head, and to 16-bit images.

    Transformers would log an error for such models, and clip 16-bit pixels at 255.
    """

    __module__ = transformers.ImageClassificationPipeline.__module__  # Gradio accepts only pipelines from there

    def check_model_type(self, supported_models: Any) -> None:
        """Accept every model."""

    def preprocess(self, image: Any, timeout: float | None = None) -> Any:  # type: ignore[override]  # as its class does
        """Read a Pillow image, or a file given by its path, its URL or base64, and apply `convert_image`."""
        if isinstance(image, str):
            image = _open_image(image, timeout)
        return super().preprocess(convert_image(image) if isinstance(image, Image.Image) else image)


def _open_image(source: str, timeout: float | None) -> Image.Image:
    """Open an image file given by its path, its URL or base64, as in Transformers' pipeline."""
    if source.startswith(("http://", "https://")):
        response = get_session().get(source, timeout=timeout, follow_redirects=True)
        response.raise_for_status()
        return Image.open(BytesIO(response.content))
    if Path(source[:1024]).is_file():
        return Image.open(source)
    try:
        return Image.open(BytesIO(base64.b64decode(source.rpartition(",")[2], validate=True)))
    except ValueError as error:
        raise ValueError(f"{source[:100]!r} is not a file, a URL or base64 of an image.") from error


class _Logits(nn.Module):
    """A model that returns its logits only."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


class Classifier(NamedTuple):
    """A model with an active PGN adapter, and the adapter's image processor.

    Attributes:
        model: a Transformers model that carries the adapter, or a `PeftModel` around one.
        image_processor: converts images to `pixel_values` as in training.
    """

    model: nn.Module
    image_processor: Any

    def pipeline(self, **kwargs: Any) -> ImageClassificationPipeline:
        """Make Transformers' image classification pipeline; `kwargs` are those of `transformers.pipeline`.

        The model is put into eval mode, which a pipeline does not do. In training mode dropout and batch statistics
        would change the predictions, and each prediction would update the adapter's BatchNorm statistics. Images have
        the image processor's size, even if the base was trained with another.
        """
        model = self._prepare_model().eval()
        options: dict[str, Any] = {"pipeline_class": _Pipeline}
        if model.config.problem_type == "regression":
            options["function_to_apply"] = "none"  # Transformers 5.22 would apply a sigmoid
        return transformers.pipeline(
            "image-classification", model=model, image_processor=self.image_processor, **options | kwargs
        )

    def export_onnx(self, path: str | Path) -> None:
        """Export model and adapter as one ONNX graph (with `onnx` and `onnxscript` installed).

        The graph maps `pixel_values` (B, C, H, W), float32, of the size that the image processor makes of an image of
        the base's size, to `logits` (B, num_labels), for any B. The file's metadata contain the labels as "id2label",
        in JSON. Weights of more than 2 GiB go into a second file beside it.

        Args:
            path: the file to write.

        Raises:
            TypeError: the model has no PGN adapter.
        """
        model = self._prepare_model()
        layer = prompt_layer(model)
        size = made_size(self.image_processor, own_image_size(layer), layer.num_channels)
        example = torch.zeros(2, layer.num_channels, *size, device=next(model.parameters()).device)
        metadata = {"id2label": json.dumps(model.config.id2label)}
        with evaluating(model):
            export_module(_Logits(model).eval(), example, Path(path), "pixel_values", "logits", metadata)

    def _prepare_model(self) -> PreTrainedModel:
        """Return the Transformers model, set up for images of the image processor's size."""
        model = unwrap(self.model)
        if isinstance(model, PeftModel):
            model = model.get_base_model()
        interpolate_if_needed(model, self.image_processor)
        return model

    def save_pretrained(self, save_directory: str | Path, facts: ModelCardInfo | None = None) -> None:
        """Write adapter_model.safetensors, adapter_config.json, preprocessor_config.json and README.md, the card.

        Args:
            save_directory: a folder, created if needed. Its other files are left alone.
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
        """Publish the files that `save_pretrained` writes, in one commit. The repository is created if needed.

        Args:
            repo_id: the repository, "user/name".
            facts: facts for the card.
            private: whether a new repository is private; None: the owner's default.
            token: a token with write access; None: the one of `hf auth login`.
            revision: a branch, created if needed; None: main.
            commit_message: the commit's summary.
            create_pr: open a pull request instead.
            save_directory: where to write the files first; None: a temporary folder, which is removed after success.

        Raises:
            TypeError: the model has no active PGN adapter, or `image_processor` is not an image processor.
            ValueError: `repo_id` is not a valid id, or the base model is a local folder, which others cannot load.
            OSError: the Hub refused the upload or could not be reached. The files are kept; the message says where.
        """
        publishing.check_shareable(self.model, repo_id)
        # Not a context manager: after a failed upload the folder is kept.
        folder = Path(tempfile.mkdtemp(prefix="adapter-") if save_directory is None else save_directory)
        files = publishing.save(self.model, self.image_processor, folder, facts or ModelCardInfo(), repo_id)
        api = HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            update_card_for_hub(api, repo_id, folder / publishing.CARD_FILE, revision)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
                allow_patterns=files,
                delete_patterns=publishing.STALE_FILE,
            )
        except Exception as error:  # the client raises many types of errors
            raise OSError(
                f"The upload to {repo_id!r} failed: {error} The adapter is saved in {folder}: push it again later."
            ) from error
        if save_directory is None:
            shutil.rmtree(folder)
        return commit


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

    Safe for untrusted adapters: only JSON and safetensors files of adapter and base are downloaded and read, and no
    code that comes with them is run.

    Args:
        pretrained_model_name_or_path: an adapter's folder, or its id on the Hub.
        base_model_name_or_path: the base model's folder or id; None: the one recorded in the adapter.
        revision: branch, tag or commit of the adapter. The base's revision is recorded in the adapter.
        subfolder: folder of the adapter in its repository or directory.
        token: for private repositories; None: the token of `hf auth login`.
        cache_dir: folder for downloads; None: the Hub's cache.
        local_files_only: use cached files only, as with HF_HUB_OFFLINE=1.
        device_map: as in Transformers: "auto", a device, or a dictionary.
        dtype: dtype of the base model: "auto", as it was saved, or a torch dtype. Adapters stay in float32.

    Returns:
        A `Classifier`: the Transformers model in eval mode, with the adapter's labels in its config, and the image
        processor. An adapter without an image processor gets the base's, and a warning is logged. If images have
        another size than the base's, the model interpolates its position embeddings.

    Raises:
        OSError: a file is missing, or cannot be downloaded.
        ValueError: the adapter is not a PGN adapter of a classifier, or does not fit the base; or a file is damaged.
        TypeError: the architecture of the base is not supported.
    """
    if subfolder is not None and (Path(subfolder).is_absolute() or ".." in Path(subfolder).parts):
        raise ValueError(f"subfolder={subfolder!r} leads out of the adapter's folder or repository.")
    options: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    name = str(Path(pretrained_model_name_or_path, subfolder or ""))
    patterns = [Path(subfolder or "", file).as_posix() for file in ADAPTER_FILES]
    folder = find_folder(pretrained_model_name_or_path, patterns, revision=revision, **options) / (subfolder or "")
    config = _read_config(folder, name)
    base = str(base_model_name_or_path or config.base_model_name_or_path)
    base_revision = config.revision if base_model_name_or_path is None else None
    try:
        base_folder = find_folder(base, BASE_FILES, revision=base_revision, **options)
    except OSError as error:
        raise OSError(
            f"{error} {name!r} was made for this base model. If it has been moved, pass its place, "
            "load_classifier(..., base_model_name_or_path=...)."
        ) from error
    model = _load_base(base_folder, base, config, device_map, dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unexpected keyword arguments")  # `_read_config` has already warned
        model.load_adapter(str(folder), use_safetensors=True)
    # If a folder has both files, Transformers prefers the second, which an earlier save of a CLIP processor may have
    # left (huggingface/transformers#42085). `save_pretrained` writes the first.
    files = [folder / file for file in PROCESSOR_FILES if folder.joinpath(file).is_file()]
    if not files:
        logger.warning("%s has no image processor of its own; taking that of its base model, %s", name, base)
    source = files[0] if files else base_folder
    image_processor = AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    interpolate_if_needed(model, image_processor)
    return Classifier(model, image_processor)


def _read_config(folder: Path, name: str) -> PGNConfig:
    for file in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME):
        if not folder.joinpath(file).is_file():
            raise OSError(
                f"There is no {file} in {name!r}. Check the name, or pass the adapter's `subfolder`. Pickled weights "
                "(adapter_model.bin) are not read, because they can run code."
            )
    config = PGNConfig.from_pretrained(str(folder))
    if not isinstance(config, PGNConfig) or (config.num_labels is None and config.id2label is None):
        raise ValueError(
            f"{name!r} is an adapter of another method, {config.peft_type}, or has no labels and answers with "
            "features. Load it with AutoPeftModel."
        )
    own_parts = [".pgn_", *(f"{module}." for module in config.modules_to_save or ())]
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "pt") as archive:
            foreign = [key for key in archive.keys() if not any(part in key for part in own_parts)]  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{SAFETENSORS_WEIGHTS_NAME} in {name!r} is damaged: {error}. Download it again.") from error
    if foreign:  # Transformers would replace the base model's own by them
        raise ValueError(f"{name!r} has tensors that are not part of the adapter: {', '.join(sorted(foreign)[:3])}.")
    return config


def _load_base(
    folder: Path, name: str, config: PGNConfig, device_map: Any, dtype: str | torch.dtype
) -> PreTrainedModel:
    # For an adapter, Transformers would load the adapter's own base, with weights of any format.
    is_adapter = folder.joinpath(CONFIG_NAME).is_file()
    if is_adapter or not folder.joinpath("config.json").is_file() or not any(folder.glob("model*.safetensors")):
        raise OSError(
            f"The base model {name!r} is an adapter, or lacks config.json or weights in safetensors. Pass a model "
            "without adapters. Pickled weights are not read, because they can run code: convert them first."
        )
    made_for = (config.auto_mapping or {}).get("base_model_class") or ""
    backbone = SUPPORTED.get(made_for)
    # From our own table of names: importing a module that a file names could run untrusted code.
    model_class: Any = AutoModelForImageClassification if backbone is None else getattr(transformers, made_for)
    # For one tower of a model with two, AutoConfig would return the config of both.
    config_class: Any = AutoConfig if backbone is None else model_class.config_class
    base_config = config_class.from_pretrained(folder, trust_remote_code=False)
    base_config._attn_implementation = None  # a file could name a kernel on the Hub, which is code
    model, found = model_class.from_pretrained(
        folder,
        config=base_config,
        use_safetensors=True,
        device_map=device_map,
        dtype=dtype,
        output_loading_info=True,
        trust_remote_code=False,
    )
    if backbone is not None:
        # The base may lack the head that the adapter brings, and the pooler of a ViT, which no classifier reads.
        unread = None if config.head == "frozen" else backbone.head
        missing = sorted(key for key in found["missing_keys"] if not key.startswith(f"{unread or 'pooler.dense'}."))
        if missing:
            raise ValueError(
                f"The base model {name!r} has no weights for {', '.join(missing[:3])} of a {made_for}. Pass the "
                "checkpoint that the adapter was made for."
            )
    return model
