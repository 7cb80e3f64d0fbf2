"""Classification heads that need no gradient steps: ridge regression on features, and texts as classes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FOLDS = 5
PENALTIES = tuple(10.0**exponent for exponent in range(-4, 3))  # multiplied by the number of images
SHARPNESS = tuple(2.0 ** (exponent / 2) for exponent in range(0, 15))  # scales of the logits, 1 to 128


def fit_ridge(features: Tensor, labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor, float]:
    """Fit a linear classifier by ridge regression on one-hot labels.

    Features are standardised. The penalty is chosen by accuracy in cross-validation. The logits are then scaled to
    maximise the likelihood of the labels of held-out images.

    Args:
        features: (N, F), finite.
        labels: (N,) class indices, 0..M-1.
        num_labels: number of classes, M.

    Returns:
        Weight (M, F) and bias (M,) in float64, and the cross-validated accuracy.
    """
    predictions, best = cross_validate(features, labels, num_labels)
    sharpness = min(SHARPNESS, key=lambda factor: float(F.cross_entropy(factor * predictions, labels)))
    features, targets = features.double(), F.one_hot(labels, num_labels).double()
    weight, bias = _solve(features, targets)[best]
    accuracy = (predictions.argmax(dim=1) == labels).double().mean()
    return sharpness * weight, sharpness * bias, float(accuracy)


def cross_validate(features: Tensor, labels: Tensor, num_labels: int) -> tuple[Tensor, int]:
    """Predict each image by ridge regression on others, with the penalty for which most are right.

    Args:
        features: (N, F), finite.
        labels: (N,) 0..M-1.
        num_labels: M.

    Returns:
        Predictions (N, M) of the one-hot labels, and the penalty's place in `PENALTIES`.
    """
    features, targets = features.double(), F.one_hot(labels, num_labels).double()

    def predict(rows: Tensor, rest: Tensor) -> Tensor:
        solutions = _solve(features[rows], targets[rows])
        return torch.stack([features[rest] @ weight.mT + bias for weight, bias in solutions], dim=1)

    predictions = held_out(predict, labels)  # (N, number of penalties, M)
    accuracies = (predictions.argmax(dim=2) == labels[:, None]).double().mean(dim=0)
    errors = (predictions - targets[:, None]).square().mean(dim=(0, 2))
    best = max(range(len(PENALTIES)), key=lambda index: (float(accuracies[index]), -float(errors[index])))
    return predictions[:, best], best


def _solve(features: Tensor, targets: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Fit a weight (M, F) and a bias (M,) for each penalty."""
    mean, std = features.mean(dim=0), features.std(dim=0)
    std = torch.where(std > 1e-6 * std.amax(), std, torch.inf)  # a constant feature gets the weight 0
    prior = targets.mean(dim=0)
    standardised = (features - mean) / std
    number, width = features.shape
    if number < width:  # the same solution from the smaller product
        values, directions = torch.linalg.eigh(standardised @ standardised.mT)
        basis, projected = standardised.mT @ directions, directions.mT @ (targets - prior)
    else:
        values, basis = torch.linalg.eigh(standardised.mT @ standardised)
        projected = basis.mT @ (standardised.mT @ (targets - prior))
    solutions = []
    for penalty in PENALTIES:
        weight = (basis @ (projected / (values + penalty * number)[:, None])).mT / std
        solutions.append((weight, prior - weight @ mean))
    return solutions


def held_out(predict: Callable[[Tensor, Tensor], Tensor], labels: Tensor) -> Tensor:
    """Predict each image with a model fitted to other images, by five-fold cross-validation.

    Args:
        predict: takes the rows to fit and the rows to predict, and returns predictions for the latter.
        labels: (N,) classes, by which the folds are stratified.

    Returns:
        (N, ...) predictions.
    """
    parts = [(rest, predict(fitted, rest)) for fitted, rest in deal_folds(labels, FOLDS)]
    predictions = torch.cat([part for _, part in parts])
    return predictions[torch.cat([rest for rest, _ in parts]).argsort()]


def deal_folds(labels: Tensor, number: int) -> list[tuple[Tensor, Tensor]]:
    """Divide images for cross-validation, so that each fold has its share of every class.

    Args:
        labels: (N,) classes.
        number: of folds.

    Returns:
        For each fold the indices of the images outside of it, to fit, and of its own, to predict.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    # Stratified: rows are assigned to folds class by class.
    order = shuffled[labels[shuffled].argsort(stable=True)]
    fold = torch.empty_like(order)
    fold[order] = torch.arange(len(order)) % number
    rows = [(torch.nonzero(fold != index)[:, 0], torch.nonzero(fold == index)[:, 0]) for index in range(number)]
    return [(fitted, rest) for fitted, rest in rows if len(rest)]


class TextHead(nn.Module):
    """Logits as scaled cosine similarities between image embeddings and one text embedding per class.

    The text embeddings are not trained. They are NaN until they are set by `set_texts` or loaded from a file.

    Args:
        embedding_size: size of image and text embeddings, D.
        num_labels: number of classes, M.

    Source: CLIP, arXiv:2103.00020.
    """

    text_embeds: Tensor
    logit_scale: Tensor
    logit_bias: Tensor

    def __init__(self, embedding_size: int, num_labels: int) -> None:
        super().__init__()
        self.register_buffer("text_embeds", torch.full((num_labels, embedding_size), math.nan))
        self.register_buffer("logit_scale", torch.ones(()))
        self.register_buffer("logit_bias", torch.zeros(()))
        self._has_texts = False

    @property
    def is_set(self) -> bool:
        """Whether the texts have been set. Always True during compilation, as a graph cannot depend on values."""
        if not self._has_texts and not torch.compiler.is_compiling() and not self.text_embeds.is_meta:
            self._has_texts = not bool(self.text_embeds.isnan().any())  # checked once, since it synchronises a GPU
        return self._has_texts or torch.compiler.is_compiling()

    @torch.no_grad()
    def set_texts(self, text_embeds: Tensor, logit_scale: float, logit_bias: float = 0.0) -> None:
        """Set the text embeddings (M, D), of any norm, and the scale and bias of the cosines."""
        self.text_embeds.copy_(F.normalize(text_embeds.float(), dim=-1))
        self.logit_scale.fill_(logit_scale)
        self.logit_bias.fill_(logit_bias)

    def forward(self, features: Tensor) -> Tensor:
        """Compute the logits (B, M) of image embeddings (B, D) of any norm."""
        return F.linear(F.normalize(features.to(self.text_embeds.dtype), dim=-1), *self.linear())

    def linear(self) -> tuple[Tensor, Tensor]:
        """Return weight (M, D) and bias (M,) of the same logits as a linear map of normalised embeddings."""
        return self.logit_scale * self.text_embeds, self.logit_bias.expand(len(self.text_embeds))
