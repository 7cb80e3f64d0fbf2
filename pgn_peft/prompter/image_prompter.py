"""`ImagePrompter`: the client of a hosted model. It prompts images, and reads the task's classes from the answers.

Needs torch, safetensors, numpy and Pillow; neither PEFT nor Transformers nor the backbone's weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pgn_peft.nn.generator import PromptGenerator
from pgn_peft.nn.heads import fit_ridge
from pgn_peft.nn.images import read_images, to_8_bit, to_images
from pgn_peft.nn.layout import PromptLayout, compose
from pgn_peft.nn.patch_inverse import InversionReport
from pgn_peft.nn.preprocessing import Adjustment, Preprocessing, normalize
from pgn_peft.prompter import files
from pgn_peft.prompter.answers import by_label, find_scale, read_entries
from pgn_peft.prompter.score_head import EmbeddingHead, ScoreHead, check_classes, fit_to_answers
from pgn_peft.utils.files import find_folder
from pgn_peft.utils.labels import normalize_id2label
from pgn_peft.utils.markdown import CITATION, list_names, push_with_card
from pgn_peft.utils.onnx import export_module
from pgn_peft.version import __version__

# Of the largest score. Half precision moves a score of the probe by 0.02 of it, JPEG of quality 95 by 1.7, a resize by
# more than 1 (measured on DeiT-Tiny).
PROBE_TOLERANCE = 0.25


class ImagePrompter(nn.Module):
    """Prompt images for a frozen, hosted model, and read its answers.

    Make one with `pgn_peft.make_prompter`, or load one with `from_pretrained`. The parts: prompting images, reading
    answers, files.

    Args:
        layout: the places of image and prompts.
        preprocessing: the steps of the model's image processor.
        library: (L, C, p, p), or (P, L, C, p, p) with a library for each slot, in the scale in which images lie in
            [0, 1]; without a generator the prompts themselves, (P, C, p, p), or (1, C, p, p) for all patches.
        offsets: (P, C, p, p) added to the prompts, which are not valid images then; or None.
        image_offset: (C, H, W) added to the image; or None.
        generator: computes an image's mixing coefficients; None: all images get the same prompts.
        id2label: names of the task's classes by index.
        server_labels: names of the server's classes by index.
        head: the adapter's own head, for a server that answers with features or embeddings.
        probe_scores: the unmodified model's scores (M,) for `probe`.
        score_head: classifies from the server's scores.
        report: accuracy of inverted prompts; None for prompts trained as pixels. It is not saved.
        adjustment: changes the image before prompts are added; None: it does not.
    """

    library: Tensor
    offsets: Tensor | None
    image_offset: Tensor | None
    probe_scores: Tensor | None

    def __init__(
        self,
        layout: PromptLayout,
        preprocessing: Preprocessing,
        library: Tensor,
        offsets: Tensor | None = None,
        image_offset: Tensor | None = None,
        generator: PromptGenerator | None = None,
        id2label: Mapping[int, str] | None = None,
        server_labels: Mapping[int, str] | None = None,
        head: nn.Linear | None = None,
        probe_scores: Tensor | None = None,
        score_head: ScoreHead | None = None,
        report: InversionReport | None = None,
        adjustment: Adjustment | None = None,
    ) -> None:
        super().__init__()
        self.layout = layout
        self.preprocessing = preprocessing
        self.generator = generator
        self.register_buffer("library", library)
        self.register_buffer("offsets", offsets)
        self.register_buffer("image_offset", image_offset)
        self.id2label = None if id2label is None else dict(id2label)
        self.server_labels = None if server_labels is None else dict(server_labels)
        self.head = head
        self.register_buffer("probe_scores", probe_scores)
        self.score_head = score_head
        self.report = report
        self.adjustment = adjustment or Adjustment()
        self.num_channels = library.shape[-3]
        self.requires_grad_(False).eval()

    # Prompting images.

    @property
    def in_range(self) -> bool:
        """Whether the prompted images are valid images, or have pixels that only a float tensor can hold."""
        return self.offsets is None

    def prompted(self, pixels: Tensor) -> Tensor:
        """Add prompts to images.

        Args:
            pixels: (B, C, H, W) in [0, 1], of the layout's `image_size`.

        Returns:
            (B, C, H', W') of the layout's `size`; where `in_range`, in [0, 1] and rounded to 8 bits.
        """
        pixels = self.adjustment.apply(pixels)
        if self.generator is None:
            # In the additive layout one for all patches.
            patches = self.library.expand(pixels.shape[0], self.layout.num_virtual_tokens, -1, -1, -1)
        else:
            normalized = normalize(pixels, self.preprocessing.image_mean, self.preprocessing.image_std)
            coefficients = self.generator(normalized)  # (B, P, L)
            form = "bpl,plchw->bpchw" if self.library.ndim == 5 else "bpl,lchw->bpchw"
            patches = torch.einsum(form, coefficients, self.library)
        patches = patches if self.offsets is None else patches + self.offsets
        return compose(pixels, patches, self.layout, self.image_offset, valid=self.in_range)

    @torch.inference_mode()
    def pixel_values(self, images: Any) -> Tensor:
        """Prompt images, given as to `forward`, for a model that takes tensors.

        Returns:
            (B, C, H', W') float32, normalised as the model expects them. In the "append" layout they are larger than
            its own images: call it with interpolate_pos_encoding=True.
        """
        pixels, _, _ = read_images(images, self.preprocessing, self.num_channels, self.layout.image_size)
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
        self._check_in_range()
        pixels, kind, single = read_images(images, self.preprocessing, self.num_channels, self.layout.image_size)
        pixels = to_8_bit(self.prompted(pixels.to(self.library.device).float() / 255))
        answers = to_images(self._add_margins(pixels), kind)
        return answers[0] if single else answers

    def unprompted(self, images: Any) -> Any:
        """Return images, given as to `forward`, as they are before prompts are added, to compare them with.

        Returns:
            The same kind, one or several: upright, resized and cropped as the model's image processor does it.
        """
        pixels, kind, single = read_images(images, self.preprocessing, self.num_channels, self.layout.image_size)
        plain = to_images(pixels, kind)
        return plain[0] if single else plain

    def _check_in_range(self) -> None:
        if not self.in_range:
            raise ValueError(
                "The exact inverted prompts lie far outside of what an image can hold. Send `pixel_values(images)` to "
                "a model that takes tensors, or make the prompter with in_range=True."
            )

    def _add_margins(self, pixels: Tensor) -> Tensor:
        """Add the margins that the server's processor cuts off. Images with appended rows bypass the processor."""
        return F.pad(pixels, self.preprocessing.margins) if self.layout.name == files.ADDITIVE else pixels

    # Reading answers.

    def probe(self) -> Image.Image:
        """Return an image of noise to send to a server once, for `check_server`."""
        shape = (1, self.num_channels, *self.layout.size)
        noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        return to_images(self._add_margins(noise), Image.Image)[0]

    def check_server(self, answer: Iterable[Any]) -> float:
        """Check by a server's answer to `probe()` that images reach its model unchanged.

        Returns:
            The largest difference from the unmodified model's scores, as a share of the largest score.

        Raises:
            TypeError: `answer` is not a list of entries with `label` and `score`.
            ValueError: the scores differ by more than rounding, or the model's scores were not recorded.
        """
        if self.probe_scores is None:
            raise ValueError("The prompter was made from a model without a classification head: nothing to compare.")
        names = (self.server_labels or {}).values()
        expected = by_label(zip(names, self.probe_scores.tolist(), strict=True))
        entries = read_entries(answer)
        scores = [score for _, score in entries]
        if len(scores) == len(names) and find_scale([scores], complete=True) == "logits":
            scores = torch.tensor(scores).softmax(0).tolist()
        elif max(scores, default=0) > 1:  # percentages; the comparison finds others
            scores = [score / 100 for score in scores]
        found = by_label(zip([label for label, _ in entries], scores, strict=True))
        # A label that the model does not have differs by more than all of its scores.
        differences = [abs(score - expected.get(label, math.inf)) for label, score in found.items()]
        difference = max(differences, default=math.inf) / max(expected.values())
        if difference > PROBE_TOLERANCE:
            raise ValueError(
                f"The answer to the probe differs from the model's by {difference:.0%} of the largest score, with the "
                f"labels {list(found)[:3]}. The server resizes, crops or re-encodes what it is sent (as JPEG?), gives "
                "its classes other names, or runs another model. Images must reach the model pixel by pixel."
            )
        return difference

    def read_answer(self, answer: Iterable[Any]) -> list[dict[str, Any]]:
        """Convert a server's answer to scores of the task's classes.

        Args:
            answer: what `pipeline("image-classification")` or an inference endpoint returns for one image: entries
                with `label` and `score`, as dictionaries or objects. A pipeline returns five labels unless asked for
                more: pass top_k with the number of its classes.

        Returns:
            Entries with `label`, a class of the task, and `score`, best first. With a `score_head` the scores are
            probabilities: they sum to 1.

        Raises:
            TypeError: `answer` is not a list of entries with `label` and `score`.
            ValueError: `answer` lacks scores that are needed, or is about other classes.
        """
        entries = read_entries(answer)
        scores, names = by_label(entries), self.id2label or {}
        by_own_head = self.head is not None and scores.keys() <= set(names.values())  # the server has the adapter's
        if self.score_head is not None and not (by_own_head and scores.keys().isdisjoint(self.score_head.labels)):
            probabilities = self.score_head.read_entries(entries).softmax(-1).tolist()
            scores = {label: probabilities[index] for index, label in names.items()}
        elif self.head is not None and not by_own_head:
            raise ValueError(
                f"The answer has the labels {list(scores)[:3]}, not the adapter's, whose head cannot be computed from "
                "this server's scores. Fit one to its answers (prompter.fit_answers(answers, labels)), pass its "
                "features to `classify`, or host the model with this head."
            )
        return [{"label": label, "score": score} for label, score in sorted(scores.items(), key=lambda item: -item[1])]

    def fit_answers(self, answers: Iterable[Iterable[Any]], labels: Sequence[int] | Tensor) -> float:
        """Fit `score_head` to a server's answers to prompted training images, and use it from now on.

        For a server whose weights are not known, that gives few scores, or scores of few digits. Ask for as many
        scores, and of as many digits, as will be asked for later. A few hundred images are enough for ten classes.

        Args:
            answers: as for `read_answer`, one for each image. If they hold the best k scores only, `read_answer` uses
                no more of later answers.
            labels: the images' classes, 0..M-1.

        Returns:
            The cross-validated accuracy, of ridge regression or Bayesian label mapping, whichever is better.

        Raises:
            TypeError: an answer is not a list of entries with `label` and `score`.
            ValueError: the task's classes have no names, or one has fewer than two images.
        """
        self.score_head = fit_to_answers(answers, labels, self._num_labels())
        return self.score_head.report.accuracy or 0.0

    @torch.inference_mode()
    def classify(self, features: Tensor) -> Tensor:
        """Classify the features or embeddings that a server answers with, by `head`.

        Args:
            features: (B, D): what the adapter's own head reads (token 0 of the last hidden state, in ViT and DeiT), or
                the embeddings that `use_texts` or `fit_embeddings` was called for.

        Returns:
            Logits (B, M).

        Raises:
            ValueError: there is no such head.
        """
        if self.head is None:
            raise ValueError("No head for features: use `read_answer`, or call `use_texts` or `fit_embeddings` first.")
        return self.head(features.to(self.head.weight))

    def use_texts(self, text_embeds: Tensor, id2label: Mapping[int, str], logit_scale: float = 100.0) -> None:
        """Let `classify` compare image embeddings with the embeddings of texts, one for each class.

        Args:
            text_embeds: (M, D), of any length; of the server's model.
            id2label: names of the M classes.
            logit_scale: of the cosines; CLIP's `logit_scale.exp()`.

        Raises:
            ValueError: there are more or fewer names than embeddings.
        """
        labels = normalize_id2label(id2label)
        if len(labels) != len(text_embeds):
            raise ValueError(f"There are {len(text_embeds)} text embeddings, but `id2label` has {len(labels)} names.")
        self.head = EmbeddingHead.of(logit_scale * F.normalize(text_embeds.detach().float().cpu(), dim=-1))
        self.id2label = labels

    def fit_embeddings(self, embeddings: Tensor, labels: Sequence[int] | Tensor) -> float:
        """Fit `head` to a server's embeddings of prompted training images, for `classify`.

        Args:
            embeddings: (N, D). Their length is not used.
            labels: the images' classes, 0..M-1.

        Returns:
            The cross-validated accuracy.

        Raises:
            ValueError: the task's classes have no names, or one has fewer than two images.
        """
        classes = check_classes(labels, len(embeddings), self._num_labels())
        normalized = F.normalize(embeddings.double().cpu(), dim=-1)
        weight, bias, accuracy = fit_ridge(normalized, classes, self._num_labels())
        self.head = EmbeddingHead.of(weight, bias)
        return accuracy

    def _num_labels(self) -> int:
        if self.id2label is None:
            raise ValueError("The task's classes have no names: set prompter.id2label = dict(enumerate(names)) first.")
        return len(self.id2label)

    # Files.

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write prompter.safetensors and prompter_config.json."""
        head = self.score_head
        settings = {
            "pgn_peft_version": __version__,
            "layout": {
                "name": self.layout.name,
                "image_size": self.layout.image_size,
                "patch_size": self.layout.patch_size,
                "num_virtual_tokens": self.layout.num_virtual_tokens,
            },
            "preprocessing": dataclasses.asdict(self.preprocessing),
            "adjustment": dataclasses.asdict(self.adjustment),
            "generator": None if self.generator is None else self.generator.settings,
            "library_per_slot": self.library.ndim == 5,
            "in_range": self.in_range,
            "id2label": self.id2label,
            "server_labels": self.server_labels,
            "probe": self.probe_scores is not None,
            "head": None if self.head is None else list(self.head.weight.shape),
            "normalized_features": isinstance(self.head, EmbeddingHead),
            "score_head": head and {"labels": head.labels, "scale": head.scale, **dataclasses.asdict(head.report)},
        }
        files.write_files(Path(save_directory), settings, self.state_dict())

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, revision: str | None = None, token: str | None = None
    ) -> ImagePrompter:
        """Load a prompter from a directory, or from the Hub (with `huggingface_hub` installed).

        Raises:
            OSError: the directory or repository does not exist, or a file is missing.
            ValueError: a file is damaged, or does not hold what the configuration declares.
        """
        wanted = (files.CONFIG_FILE, files.WEIGHTS_FILE)
        folder = find_folder(pretrained_model_name_or_path, wanted, revision=revision, token=token)
        return cast(ImagePrompter, files.read_files(folder, cls))

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
        """Publish files and card on the Hub in one commit (with `huggingface_hub` installed).

        Text and metadata that people wrote into an existing card are kept.

        Args:
            repo_id: the repository, "user/name", which is made where it does not exist.
            private: whether a new repository is private; None: as the owner's settings say.
            token: a token with write access; None: the one of `hf auth login`.

        Returns:
            The repository's id.
        """
        return push_with_card(self, repo_id, private, token)

    def make_card(self, repo_id: str, num_views: int = 1) -> Any:
        """Make the `huggingface_hub.ModelCard` of a repository, also one of several `Views`, of which this is one."""
        from huggingface_hub import ModelCard, ModelCardData

        report = None if self.score_head is None else self.score_head.report
        tags = ["pgn-peft", "visual-prompting", "image-classification"]
        return ModelCard.from_template(
            ModelCardData(library_name="pgn-peft", pipeline_tag="image-classification", tags=tags),
            template_path=str(Path(__file__).with_name("card_template.md")),
            repo_id=repo_id,
            num_views=num_views,
            title=repo_id.rpartition("/")[2],
            in_range=self.in_range,
            has_probe=self.probe_scores is not None,
            has_head=self.head is not None,
            score_head=report,
            top_k=(report and report.top_k) or len(self.server_labels or self.id2label or {}),
            image_size="{} x {}".format(*self.layout.image_size),
            prompted_size="{} x {}".format(*self.layout.size),
            num_prompts=self.layout.num_virtual_tokens,
            layout=self.layout.name,
            labels=list_names(self.id2label),
            citation=CITATION,
        )

    def export_onnx(self, path: str | Path) -> None:
        """Write the prompter as an ONNX file (with `onnx` and `onnxscript` installed).

        From `image` (B, C, H, W) uint8, resized and cropped as `preprocessing` says, to `prompted` (B, C, H', W').

        Raises:
            ValueError: the prompts are not valid images.
        """
        self._check_in_range()
        example = torch.zeros(2, self.num_channels, *self.layout.image_size, dtype=torch.uint8)
        export_module(_EightBit(self).eval(), example, Path(path), "image", "prompted", {})


class _EightBit(nn.Module):
    """From 8-bit pixels to 8-bit prompted pixels."""

    def __init__(self, prompter: ImagePrompter) -> None:
        super().__init__()
        self.prompter = prompter

    def forward(self, image: Tensor) -> Tensor:
        return to_8_bit(self.prompter.prompted(image.float() / 255))
