"""Ridge regression as a classifier, its penalty chosen by cross-validation. Plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

FOLDS = 5
PENALTIES = tuple(10.0**exponent for exponent in range(-4, 3))  # times the number of images
SHARPNESS = tuple(2.0 ** (exponent / 2) for exponent in range(0, 15))  # of the logits: 1 to 128


def fit_ridge(features: Tensor, labels: Tensor, num_labels: int) -> tuple[Tensor, Tensor, float]:
    """Fit a linear classifier by ridge regression on one-hot labels.

    Features are standardised. The penalty is the most accurate one in cross-validation. The logits are then scaled so
    that their softmax gives the labels of held-out images the highest likelihood.

    Args:
        features: (N, F), finite.
        labels: (N,) 0..M-1.
        num_labels: M.

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
    """Predict each image from a model of others, by cross-validation in five parts.

    Args:
        predict: gets the rows to fit and those to predict, and returns predictions of the latter.
        labels: (N,) classes, of which each part has its share.

    Returns:
        (N, ...) predictions.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    # Dealt out class by class, so that each fold has its share of every class.
    order = shuffled[labels[shuffled].argsort(stable=True)]
    fold = torch.empty_like(order)
    fold[order] = torch.arange(len(order)) % FOLDS
    rows = [(torch.nonzero(fold != index)[:, 0], torch.nonzero(fold == index)[:, 0]) for index in range(FOLDS)]
    parts = [(rest, predict(fitted, rest)) for fitted, rest in rows if len(rest)]
    predictions = torch.cat([part for _, part in parts])
    return predictions[torch.cat([rest for rest, _ in parts]).argsort()]
