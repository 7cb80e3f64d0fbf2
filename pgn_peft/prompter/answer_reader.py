"""`AnswerReader`: the half of a client that reads what a server answers. `ImagePrompter` is the other half."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pgn_peft.prompter.answer_report import AnswerReport, describe
from pgn_peft.prompter.answers import by_label, compare_with_probe, map_scores, read_entries
from pgn_peft.prompter.embedding_head import fit_embedding_head, text_head
from pgn_peft.prompter.score_fitting import fit_to_answers
from pgn_peft.prompter.score_head import ScoreHead
from pgn_peft.prompter.score_scale import find_scale
from pgn_peft.utils.labels import normalize_id2label
from pgn_peft.utils.values import filled


class AnswerReader(nn.Module):
    """Read the task's classes off a server's scores, features or embeddings.

    Args:
        id2label: names of the task's classes by index.
        label_mapping: for each of these classes the index of the server's class that stands for it.
        server_labels: names of the server's classes by index.
        head: the adapter's own head, for a server that answers with features or embeddings.
        probe_scores: the unmodified model's scores (M,) for `ImagePrompter.probe`.
        score_head: classifies from the server's scores, in place of `label_mapping`.
    """

    probe_scores: Tensor | None

    def __init__(
        self,
        id2label: Mapping[int, str] | None = None,
        label_mapping: Sequence[int] | None = None,
        server_labels: Mapping[int, str] | None = None,
        head: nn.Linear | None = None,
        probe_scores: Tensor | None = None,
        score_head: ScoreHead | None = None,
    ) -> None:
        super().__init__()
        self.id2label = None if id2label is None else dict(id2label)
        self.label_mapping = None if label_mapping is None else list(label_mapping)
        self.server_labels = None if server_labels is None else dict(server_labels)
        self.head = head
        self.register_buffer("probe_scores", probe_scores)
        self.score_head = score_head

    def read_answer(self, answer: Iterable[Any]) -> list[dict[str, Any]]:
        """Convert a server's answer to scores of the task's classes.

        Args:
            answer: what `pipeline("image-classification")` or an inference endpoint returns for one image: entries
                with `label` and `score`, as dictionaries or objects. A pipeline returns five labels unless asked for
                more: pass top_k with the number of its classes.

        Returns:
            Entries with `label`, a class of the task, and `score`, best first. With a `score_head` the scores are
            probabilities. With a label mapping they are those of the classes that stand for the task's, made to sum
            to 1 if all of them are in the answer.

        Raises:
            TypeError: `answer` is not a list of entries with `label` and `score`.
            ValueError: `answer` lacks scores that are needed, or is about other classes.
        """
        entries = read_entries(answer)
        scores = by_label(entries)
        own = self.head is not None and scores.keys() <= set(filled(self.id2label).values())
        if self.score_head is not None and not (own and scores.keys().isdisjoint(self.score_head.labels)):
            probabilities = self.score_head.read_entries(entries).softmax(-1).tolist()
            scores = {label: probabilities[index] for index, label in filled(self.id2label).items()}
        elif self.head is not None and not own:
            raise ValueError(
                f"`answer` must be about the adapter's own classes, but got {', '.join(map(repr, list(scores)[:3]))}. "
                "The adapter's head cannot be computed from this server's scores: fit one to its answers "
                "(prompter.fit_answers(answers, labels)), pass its features to `classify`, or host the model with "
                "this head."
            )
        elif self.label_mapping is not None:
            scores = map_scores(scores, filled(self.id2label), self.label_mapping, filled(self.server_labels))
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
        self.score_head = fit_to_answers(answers, labels, len(self._named_classes()))
        return filled(self.score_head.report.accuracy)

    def describe_answer(self, answer: Iterable[Any]) -> AnswerReport:
        """Describe what a server returns: how many scores, of how many digits, and whether `score_head` can read them.

        Args:
            answer: to the probe or to another image, asked for as in use (`top_k`).

        Raises:
            TypeError: `answer` is not a list of entries with `label` and `score`.
            ValueError: `answer` is empty.
        """
        entries = read_entries(answer)
        if not entries:
            raise ValueError("`answer` must hold scores, but got none. Pass on what the server answered for an image.")
        return describe(entries, self.score_head, None if self.server_labels is None else len(self.server_labels))

    def _named_classes(self) -> dict[int, str]:
        if self.id2label is None:
            raise ValueError(
                "`id2label` must name the task's classes, but got None. Set it: "
                "prompter.id2label = dict(enumerate(names))."
            )
        return self.id2label

    # The server's features and embeddings.

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
            raise ValueError(
                "`features` must be for an adapter with a head of its own, but got head='frozen'. Use `read_answer`, "
                "or give the prompter a head with `use_texts` or `fit_embeddings`."
            )
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
        head, labels = text_head(text_embeds, logit_scale), normalize_id2label(id2label)
        if len(labels) != head.out_features:
            raise ValueError(
                f"`id2label` must name the {head.out_features} classes of `text_embeds`, but got {len(labels)} names. "
                "Pass one text embedding for each class."
            )
        self.head, self.id2label = head, labels

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
        self.head, accuracy = fit_embedding_head(embeddings, labels, len(self._named_classes()))
        return accuracy

    def check_server(self, answer: Iterable[Any]) -> float:
        """Check by a server's answer to `probe()` that images reach its model unchanged.

        Returns:
            The largest difference from the unmodified model's scores, as a share of the largest score.

        Raises:
            TypeError: `answer` is not a list of entries with `label` and `score`.
            ValueError: the scores differ by more than rounding, or the model's scores were not recorded.
        """
        if self.probe_scores is None:
            raise ValueError(
                "`probe_scores` must be known to check a server, but got None: the model has no classification head. "
                "Make the prompter from a model that has one."
            )
        entries = read_entries(answer)
        scores = [score for _, score in entries]
        complete = len(scores) == len(self.probe_scores)
        if complete and find_scale([scores], complete) == "logits":
            scores = torch.tensor(scores).softmax(0).tolist()
        elif scores and max(scores) > 1:  # percentages, or no scores of this model: compared below
            scores = [score / 100 for score in scores]
        found = by_label(zip((label for label, _ in entries), scores, strict=True))
        return compare_with_probe(found, self.probe_scores.tolist(), filled(self.server_labels))
