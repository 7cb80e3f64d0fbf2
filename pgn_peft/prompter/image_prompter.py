"""`ImagePrompter`: the client of a hosted model, which turns images into prompted images.

Needs torch, safetensors, numpy and Pillow; neither PEFT nor Transformers nor the backbone's weights.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pgn_peft.nn.generator import PromptGenerator
from pgn_peft.nn.images import read_images, to_8_bit, to_images
from pgn_peft.nn.layout import PromptLayout, compose
from pgn_peft.nn.pixel_prompts import PixelPrompts
from pgn_peft.nn.preprocessing import Preprocessing, normalize
from pgn_peft.prompter import files, settings
from pgn_peft.prompter.answer_reader import AnswerReader
from pgn_peft.prompter.card import make_prompter_card
from pgn_peft.prompter.embedding_head import EmbeddingHead
from pgn_peft.prompter.score_head import ScoreHead
from pgn_peft.utils.files import read_settings
from pgn_peft.utils.markdown import list_names
from pgn_peft.utils.onnx import export_module
from pgn_peft.version import __version__


class ImagePrompter(AnswerReader):
    """Prompt images for a frozen, hosted model.

    Make one with `pgn_peft.make_prompter`, or load one with `from_pretrained`. `report` is the accuracy of inverted
    prompts; None for prompts trained as pixels, and after loading.

    Args:
        layout: the places of image and prompts.
        preprocessing: the steps of the model's image processor.
        prompts: the library as pixels; without a generator the prompts themselves.
        generator: computes an image's mixing coefficients; None: all images get the same prompts.
        id2label: names of the task's classes by index.
        label_mapping: for each of these classes the index of the server's class that stands for it.
        server_labels: names of the server's classes by index.
        head: the adapter's own head, for a server that answers with features or embeddings.
        probe_scores: the unmodified model's scores (M,) for `probe`.
        score_head: classifies from the server's scores, in place of `label_mapping`.
    """

    library: Tensor
    offsets: Tensor | None
    image_offset: Tensor | None

    def __init__(
        self,
        layout: PromptLayout,
        preprocessing: Preprocessing,
        prompts: PixelPrompts,
        generator: PromptGenerator | None = None,
        id2label: Mapping[int, str] | None = None,
        label_mapping: Sequence[int] | None = None,
        server_labels: Mapping[int, str] | None = None,
        head: nn.Linear | None = None,
        probe_scores: Tensor | None = None,
        score_head: ScoreHead | None = None,
    ) -> None:
        super().__init__(id2label, label_mapping, server_labels, head, probe_scores, score_head)
        self.layout = layout
        self.preprocessing = preprocessing
        self.generator = generator
        self.register_buffer("library", prompts.library)
        self.register_buffer("offsets", prompts.offsets)
        self.register_buffer("image_offset", prompts.image_offset)
        self.report = prompts.report
        self.num_channels = prompts.library.shape[-3]
        self.requires_grad_(False).eval()

    @property
    def in_range(self) -> bool:
        """Whether the prompted images are valid images, or have pixels that only a float tensor can hold."""
        return self.offsets is None

    def patches(self, pixels: Tensor) -> Tensor:
        """Generate the prompts for images (B, C, H, W) in [0, 1]: (B, P, C, p, p), as `compose` takes them."""
        if self.generator is None:
            # In the dense layout one for all patches.
            patches = self.library.expand(pixels.shape[0], self.layout.num_virtual_tokens, -1, -1, -1)
        else:
            normalized = normalize(pixels, self.preprocessing.image_mean, self.preprocessing.image_std)
            coefficients = self.generator(normalized)  # (B, P, L)
            if self.library.ndim == 5:
                patches = torch.einsum("bpl,plchw->bpchw", coefficients, self.library)
            else:
                patches = (coefficients @ self.library.flatten(1)).unflatten(-1, self.library.shape[1:])
        return patches if self.offsets is None else patches + self.offsets

    def prompted(self, pixels: Tensor) -> Tensor:
        """Add prompts to images.

        Args:
            pixels: (B, C, H, W) in [0, 1], of the layout's `input_size`.

        Returns:
            (B, C, H', W') of the layout's `size`; where `in_range`, in [0, 1] and rounded to 8 bits.
        """
        return compose(pixels, self.patches(pixels), self.layout, self.image_offset, valid=self.in_range)

    @torch.inference_mode()
    def pixel_values(self, images: Any) -> Tensor:
        """Prompt images, given as to `forward`, for a model that takes tensors.

        Returns:
            (B, C, H', W') float32, normalised as the model expects them. In the "append" layout they are larger than
            its own images: call it with interpolate_pos_encoding=True.
        """
        pixels, _, _ = read_images(images, self.preprocessing, self.num_channels, self.layout.input_size)
        pixels = self.prompted(pixels.to(self.library.device).float() / 255)
        return normalize(pixels, self.preprocessing.image_mean, self.preprocessing.image_std)

    @torch.inference_mode()
    def forward(self, images: Any) -> Any:
        """Prompt images for a model that takes images.

        Args:
            images: Pillow images of any mode, arrays (H, W, C) or (B, H, W, C), tensors (C, H, W) or (B, C, H, W), one
                or a list of them; unsigned integers of 8 or 16 bits, or floats in [0, 1]; of any size. The EXIF
                orientation of Pillow images is applied, as servers apply it.

        Returns:
            The same kind, one or several, upright, with 8-bit pixels (also for wider ones), prompted. Save them as
            PNG: JPEG changes the prompts. For a processor that crops they have a margin, which it cuts off.

        Raises:
            TypeError: an image is of another kind.
            ValueError: its values are impossible or of an unknown range, or the prompts are no valid images.
        """
        if not self.in_range:
            raise ValueError(
                "`images` must be prompted as tensors here, but got images to return: the exact inverted prompts lie "
                "far outside of what an image can hold. Send `pixel_values(images)` to a model that takes tensors, or "
                "make the prompter with in_range=True."
            )
        pixels, kind, single = read_images(images, self.preprocessing, self.num_channels, self.layout.input_size)
        pixels = to_8_bit(self.prompted(pixels.to(self.library.device).float() / 255))
        answers = to_images(F.pad(pixels, self._margins), kind)
        return answers[0] if single else answers

    def unprompted(self, images: Any) -> Any:
        """Return images, given as to `forward`, as they are before prompts are added, to compare them with.

        Returns:
            The same kind, one or several: upright, resized and cropped as the model's image processor does it.
        """
        pixels, kind, single = read_images(images, self.preprocessing, self.num_channels, self.layout.input_size)
        answers = to_images(pixels, kind)
        return answers[0] if single else answers

    @property
    def _margins(self) -> tuple[int, int, int, int]:
        """The margins that the server's processor cuts off. Images with appended rows bypass the processor."""
        return self.preprocessing.margins if self.layout.name != "append" else (0, 0, 0, 0)

    def probe(self) -> Image.Image:
        """Return an image of noise to send to a server once, for `check_server` and `describe_answer`."""
        shape = (1, self.num_channels, *self.layout.size)
        noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return to_images(F.pad(noise, self._margins), Image.Image)[0]

    # Files.

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write prompter.safetensors and prompter_config.json."""
        described = {
            "pgn_peft_version": __version__,
            "layout": settings.describe_layout(self.layout),
            "preprocessing": settings.describe_preprocessing(self.preprocessing),
            "generator": None if self.generator is None else self.generator.settings,
            "library_per_slot": self.library.ndim == 5,
            "in_range": self.in_range,
            "image_offset": self.image_offset is not None,
            "head": None if self.head is None else list(self.head.weight.shape),
            "normalized_features": isinstance(self.head, EmbeddingHead),
            "probe": self.probe_scores is not None,
            "score_head": None if self.score_head is None else settings.describe_score_head(self.score_head),
            "id2label": self.id2label,
            "label_mapping": self.label_mapping,
            "server_labels": self.server_labels,
        }
        files.write_files(Path(save_directory), described, self.state_dict())

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, revision: str | None = None, token: str | None = None
    ) -> ImagePrompter:
        """Load a prompter from a directory, or from the Hub (with `huggingface_hub` installed).

        Raises:
            OSError: the directory or repository does not exist, or a file is missing.
            ValueError: a file is damaged, or does not hold what the configuration declares.
        """
        folder = files.find_files(pretrained_model_name_or_path, revision, token)
        described = read_settings(folder / files.CONFIG_FILE)
        try:
            prompter = cls(**settings.read_parts(described))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`{folder / files.CONFIG_FILE}` must be the configuration of a prompter, but got "
                f"{type(error).__name__}: {error}. Save or fetch the prompter again."
            ) from error
        prompter.load_state_dict(files.read_tensors(folder, prompter.state_dict()), assign=True)
        return prompter.requires_grad_(False).eval()

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
        """Publish files and card on the Hub in one commit (with `huggingface_hub` installed).

        Args:
            repo_id: the repository, "user/name", which is made where it does not exist.
            private: whether a new repository is private; None: as the owner's settings say.
            token: a token with write access; None: the one of `hf auth login`.

        Returns:
            The repository's id.
        """
        from huggingface_hub import HfApi

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            self.make_card(repo_id).save(Path(folder, "README.md"))
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload prompter")
        return repo_id

    def make_card(self, repo_id: str) -> Any:
        """Make the `huggingface_hub.ModelCard` of a repository."""
        return make_prompter_card(
            repo_id,
            in_range=self.in_range,
            has_probe=self.probe_scores is not None,
            has_head=self.head is not None,
            score_head=None if self.score_head is None else self.score_head.report,
            top_k=(self.score_head and self.score_head.report.top_k) or len(self.server_labels or self.id2label or {}),
            image_size="{} x {}".format(*self.layout.input_size),
            prompted_size="{} x {}".format(*self.layout.size),
            num_prompts=self.layout.num_virtual_tokens,
            layout=self.layout.name,
            labels=list_names(self.id2label),
        )

    def export_onnx(self, path: str | Path) -> None:
        """Write the prompter as an ONNX file (with `onnx` and `onnxscript` installed).

        From `image` (B, C, H, W) uint8, resized and cropped as `preprocessing` says, to `prompted` (B, C, H', W').

        Raises:
            ValueError: the prompts are not valid images.
        """
        if not self.in_range:
            raise ValueError(
                "`in_range` must be True for a prompter that is exported, but got False: its prompts are no valid "
                "images. Make it with in_range=True."
            )
        example = torch.zeros(2, self.num_channels, *self.layout.input_size, dtype=torch.uint8)
        export_module(_EightBit(self).eval(), example, Path(path), "image", "prompted", {})


class _EightBit(nn.Module):
    """From 8-bit pixels to 8-bit prompted pixels."""

    def __init__(self, prompter: ImagePrompter) -> None:
        super().__init__()
        self.prompter = prompter

    def forward(self, image: Tensor) -> Tensor:
        return to_8_bit(self.prompter.prompted(image.float() / 255))
