"""`Views`: a server sees each image in several ways, and its answers are read together."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgn_peft.nn.heads import cross_validate, fit_ridge
from pgn_peft.prompter import files
from pgn_peft.prompter.image_prompter import ImagePrompter
from pgn_peft.prompter.score_head import (
    EmbeddingTable,
    ScoreHead,
    ScoreTable,
    check_classes,
    fit_label_mapping,
    is_embedding,
    read_table,
)
from pgn_peft.utils.files import find_folder
from pgn_peft.utils.markdown import push_with_card

VIEW = "view_{}"
Table = ScoreTable | EmbeddingTable


class Views:
    """Send an image in one way or several, and read the answers together.

    The logits of an image are the sum of those that the prompters' heads compute, each from the answer to its view.

    Args:
        prompters: one for each view, all with the same `id2label`.
    """

    def __init__(self, prompters: Sequence[ImagePrompter]) -> None:
        self.prompters = list(prompters)

    def __call__(self, images: Any) -> list[Any]:
        """Return the views of one image or several, each as `ImagePrompter` returns it."""
        return [prompter(images) for prompter in self.prompters]

    def read_answers(self, answers: Sequence[Any]) -> list[dict[str, Any]]:
        """Convert a server's answers to one image to probabilities of the task's classes.

        Args:
            answers: one for each view: entries with `label` and `score`, or an embedding.

        Returns:
            Entries with `label` and `score`, best first.

        Raises:
            ValueError: there is no head, or there are more or fewer answers than views.
        """
        logits = [_logits(*pair) for pair in zip(self.prompters, answers, strict=True)]
        probabilities = torch.stack(logits).sum(dim=0).softmax(-1).tolist()
        entries = [{"label": label, "score": probabilities[index]} for index, label in self._names.items()]
        return sorted(entries, key=lambda entry: -entry["score"])

    def fit_answers(self, answers: Sequence[Sequence[Any]], labels: Sequence[int] | Tensor) -> float:
        """Fit one head to a server's answers to all views of training images together.

        Args:
            answers: for each view the answers to all images: entries with `label` and `score`, or embeddings.
            labels: the images' classes, 0..M-1.

        Returns:
            The cross-validated accuracy, of ridge regression or Bayesian label mapping, whichever is better.

        Raises:
            ValueError: a class has fewer than two images, or a label is out of range.
        """
        tables = [read_table(each) for each in answers]
        num_labels = len(self._names)
        classes = check_classes(labels, len(answers[0]), num_labels)
        kind, predicted = predict_held_out(tables, classes, num_labels)
        accuracy = float((predicted.argmax(1) == classes).double().mean())
        if kind == "ridge":
            weight, bias, _ = fit_ridge(torch.cat([table.features for table in tables], dim=1), classes, num_labels)
            weights = weight.split([table.features.shape[1] for table in tables], dim=1)
        else:
            weights = tuple(fit_label_mapping(each, classes, num_labels)[0] for each in _all_probabilities(tables))
            bias = torch.zeros(num_labels)
        for prompter, table, part in zip(self.prompters, tables, weights, strict=True):
            head = table.make_head(kind, part, bias, accuracy)
            if isinstance(head, ScoreHead):
                prompter.score_head = head
            else:
                prompter.head = head
            bias = torch.zeros_like(bias)  # counts once
        return accuracy

    @property
    def _names(self) -> dict[int, str]:
        return self.prompters[0].id2label or {}

    # Files.

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write a folder `view_0`, `view_1`, ... for each view; for one view the files of an `ImagePrompter`."""
        folder = Path(save_directory)
        for earlier in _folders_of_views(folder):
            shutil.rmtree(earlier)
        for target, prompter in zip(self._places(folder), self.prompters, strict=True):
            prompter.save_pretrained(target)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, revision: str | None = None, token: str | None = None
    ) -> Views:
        """Load from a directory, or from the Hub (with `huggingface_hub` installed), as `ImagePrompter` does."""
        wanted = [f"{folder}{file}" for folder in ("", "view_*/") for file in (files.CONFIG_FILE, files.WEIGHTS_FILE)]
        folder = find_folder(pretrained_model_name_or_path, wanted, revision=revision, token=token)
        return cls([ImagePrompter.from_pretrained(each) for each in _folders_of_views(folder) or [folder]])

    def push_to_hub(self, repo_id: str, private: bool | None = None, token: str | None = None) -> str:
        """Publish files and card on the Hub, as `ImagePrompter.push_to_hub` does; return the repository's id."""
        return push_with_card(self, repo_id, private, token)

    def make_card(self, repo_id: str) -> Any:
        """Make the `huggingface_hub.ModelCard` of a repository."""
        return self.prompters[0].make_card(repo_id, num_views=len(self.prompters))

    def export_onnx(self, folder: str | Path) -> None:
        """Write each view as `view_0.onnx`, `view_1.onnx`, ...; see `ImagePrompter.export_onnx`."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for index, prompter in enumerate(self.prompters):
            prompter.export_onnx(Path(folder, f"{VIEW.format(index)}.onnx"))

    def _places(self, folder: Path) -> list[Path]:
        number = len(self.prompters)
        return [folder] if number == 1 else [folder / VIEW.format(index) for index in range(number)]


def _folders_of_views(folder: Path) -> list[Path]:
    found = folder.glob("view_*")
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name.removeprefix("view_")))


def predict_held_out(tables: Sequence[Table], classes: Tensor, num_labels: int) -> tuple[str, Tensor]:
    """Predict each image from the answers to all of its views, by a head that was fitted to others.

    Args:
        tables: the answers to each view.
        classes: (N,).
        num_labels: M.

    Returns:
        "ridge" or "mapping", whichever is right more often, and its predictions (N, M).
    """
    features = torch.cat([table.features for table in tables], dim=1)
    predictions = {"ridge": cross_validate(features, classes, num_labels)[0]}
    if probabilities := _all_probabilities(tables):
        mapped = [fit_label_mapping(each, classes, num_labels)[1] for each in probabilities]
        predictions["mapping"] = torch.stack(mapped).clamp(min=1e-30).log().sum(dim=0)
    return max(predictions.items(), key=lambda item: int((item[1].argmax(1) == classes).sum()))


def _all_probabilities(tables: Sequence[Table]) -> list[Tensor]:
    """Return the probabilities of all views, or nothing if one has none."""
    found = [table.probabilities for table in tables if table.probabilities is not None]
    return found if len(found) == len(tables) else []


def _logits(prompter: ImagePrompter, answer: Any) -> Tensor:
    """Compute the task's logits (M,) of the answer to one view."""
    if is_embedding(answer):
        return prompter.classify(torch.as_tensor(answer)[None])[0].double()
    if prompter.score_head is None:
        raise ValueError("No head for scores: call `fit_answers` first.")
    return prompter.score_head.read([answer])[0]
