"""`load_classifier`: from an adapter's id to a `Classifier`, the model with its labels and image processor.

Transformers' own `pipeline(model=adapter_id)` finds model and labels too, but takes the base's image processor, looks
`revision` up in the base's repository, and passes no `subfolder` to the adapter.
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
# All that is downloaded. Pickles and Python files, which can run code, are not.
ADAPTER_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, *PROCESSOR_FILES)
BASE_FILES = ("config.json", "model*.safetensors", "model.safetensors.index.json", *PROCESSOR_FILES)


class _Pipeline(transformers.ImageClassificationPipeline):
    """The image pipeline, which also takes models that classify by an adapter's head, and files of 16-bit images.

    Of the former Transformers would log an error; pixels of the latter it would clip at 255.
    """

    __module__ = transformers.ImageClassificationPipeline.__module__  # Gradio takes pipelines from there only

    def check_model_type(self, supported_models: Any) -> None:
        """Accept every model."""

    def preprocess(self, image: Any, timeout: float | None = None) -> Any:  # type: ignore[override]  # as its class does
        """Read an image as `convert_image` does: a Pillow image, or the place or content of a file."""
        if isinstance(image, str):
            image = _open_image(image, timeout)
        return super().preprocess(convert_image(image) if isinstance(image, Image.Image) else image)


def _open_image(source: str, timeout: float | None) -> Image.Image:
    """Open a file, given as its path, a URL or base64, as Transformers' pipeline takes them."""
    if source.startswith(("http://", "https://")):
        response = get_session().get(source, timeout=timeout, follow_redirects=True)
        response.raise_for_status()
        return Image.open(BytesIO(response.content))
    if Path(source[:1024]).is_file():
        return Image.open(source)
    try:
        return Image.open(BytesIO(base64.b64decode(source.rpartition(",")[2], validate=True)))
    except ValueError as error:
        raise ValueError(f"{source[:100]!r} is no file, URL or base64 of an image.") from error


class _Logits(nn.Module):
    """From normalised pixels to logits, nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


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
        model = self._prepare_model().eval()
        options: dict[str, Any] = {"pipeline_class": _Pipeline}
        if model.config.problem_type == "regression":
            options["function_to_apply"] = "none"  # Transformers 5.22 would put a sigmoid on numbers
        return transformers.pipeline(
            "image-classification", model=model, image_processor=self.image_processor, **options | kwargs
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
        layer = prompt_layer(model)
        size = made_size(self.image_processor, own_image_size(layer), layer.num_channels)
        example = torch.zeros(2, layer.num_channels, *size, device=next(model.parameters()).device)
        metadata = {"id2label": json.dumps(model.config.id2label)}
        with evaluating(model):
            export_module(_Logits(model).eval(), example, Path(path), "pixel_values", "logits", metadata)

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
        except Exception as error:  # the client raises errors of many kinds
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
            f"{error} {name!r} was made for this base model: where it has been moved, pass its place, "
            "load_classifier(..., base_model_name_or_path=...)."
        ) from error
    model = _load_base(base_folder, base, config, device_map, dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Unexpected keyword arguments")  # `_read_config` has warned of them
        model.load_adapter(str(folder), use_safetensors=True)
    # In a folder with both files Transformers prefers the second, which an earlier save of a CLIP processor can have
    # left there (huggingface/transformers#42085); `save_pretrained` writes the first.
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
                f"There is no {file} in {name!r}. Look for a misspelt name, or pass the `subfolder` that the adapter "
                "lies in. Pickled weights (adapter_model.bin) are not read, because they can run code."
            )
    config = PGNConfig.from_pretrained(str(folder))
    if not isinstance(config, PGNConfig) or config.num_labels is None:
        raise ValueError(
            f"{name!r} is an adapter of another method, {config.peft_type}, or has no labels and answers with "
            "features. Load it with AutoPeftModel."
        )
    own_parts = [".pgn_", *(f"{module}." for module in config.modules_to_save or ())]
    try:
        with safe_open(folder / SAFETENSORS_WEIGHTS_NAME, "pt") as archive:
            foreign = [key for key in archive.keys() if not any(part in key for part in own_parts)]  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{SAFETENSORS_WEIGHTS_NAME} in {name!r} is damaged: {error}. Fetch it again.") from error
    if foreign:  # Transformers would load them over the base model's own
        raise ValueError(f"{name!r} has tensors that are no part of the adapter: {', '.join(sorted(foreign)[:3])}.")
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
    made_for = (config.auto_mapping or {}).get("base_model_class") or ""
    backbone = SUPPORTED.get(made_for)
    # From our own table of names: importing a module that a file names could run untrusted code.
    model_class: Any = AutoModelForImageClassification if backbone is None else getattr(transformers, made_for)
    config_class: Any = AutoConfig if backbone is None else model_class.config_class  # of a tower, where there are two
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
