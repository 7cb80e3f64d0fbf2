"""A frozen server that answers with scores, and heads that read a task's classes off them.

A head maps the server's features to the task's logits while it is trained (`forward`), and the server's answer to the
same logits where it is deployed (`read`): a server returns scores, not features.
"""

from __future__ import annotations

import torch
from bench import DEVICE, load_backbone
from torch import Tensor, nn
from torch.nn import functional as F

from pgn_peft.nn.heads import fit_ridge


class Server(nn.Module):
    """A frozen model and its own classifier.

    Args:
        model: a stock ViT, from whose CLS token the classifier reads.
        classifier: the weight (K, D) and bias (K,) of the scores.
        names: of the K classes.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, model: nn.Module, classifier: tuple[Tensor, Tensor], names: dict[int, str]) -> None:
        super().__init__()
        self.model, self.names = model.requires_grad_(False).eval(), names
        self.register_buffer("weight", classifier[0].detach())
        self.register_buffer("bias", classifier[1].detach())

    def features(self, pixel_values: Tensor) -> Tensor:
        """Answer normalised pixels with the features (B, D) that the classifier takes."""
        return self.model(pixel_values=pixel_values).last_hidden_state[:, 0].float()

    def scores(self, features: Tensor) -> Tensor:
        """Turn features (B, D) into the logits (B, K) of the server's classes, in float32."""
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features, self.weight, self.bias)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Answer normalised pixels with the logits (B, K)."""
        return self.scores(self.features(pixel_values))


def load_server(path: str, side: int | None) -> Server:
    """Load a stock `ViTForImageClassification`, with position embeddings for images of `side` pixels."""
    backbone = load_backbone(path, side)
    head = (backbone.classifier.weight, backbone.classifier.bias)
    return Server(backbone.vit, head, backbone.config.id2label).to(DEVICE)


def centre(scores: Tensor) -> Tensor:
    """Subtract each image's mean from scores (B, K): the same for logits and for log-probabilities."""
    return scores.double() - scores.double().mean(1, keepdim=True)


class Trained(nn.Module):
    """A linear head on the server's features, trained together with the prompts.

    With logits z = W h + b of all K classes, an answer determines z up to one number for each image, and so, where the
    centred W has rank D, the features h and this head.
    """

    def __init__(self, server: Server, num_labels: int) -> None:
        super().__init__()
        centred = (part.double() - part.double().mean(0) for part in (server.weight, server.bias))
        self.centred_weight, self.centred_bias = centred
        self.linear = nn.Linear(server.weight.shape[1], num_labels).to(server.weight.device)
        nn.init.normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Apply the head to features (B, D)."""
        return self.linear(features)

    @torch.no_grad()
    def read(self, scores: Tensor) -> Tensor:
        """Compute the same from an answer (B, K), logits or log-probabilities: exact, up to the scores' precision.

        Raises:
            ValueError: the scores do not determine the features.
        """
        classes, width = self.centred_weight.shape
        if torch.linalg.matrix_rank(self.centred_weight) < width:
            raise ValueError(f"The scores of {classes} classes do not determine the server's {width} features.")
        features = (centre(scores) - self.centred_bias) @ torch.linalg.pinv(self.centred_weight).T
        return self.linear(features.float())


class Ridge(nn.Module):
    """Ridge regression on the centred log-scores of training images, as `fit_to_answers` fits it.

    Args:
        server: the server.
        features: (N, D) of the training images, prompted or not, of which the server returns the scores.
        labels: (N,).
        num_labels: number of the task's classes, M.
    """

    def __init__(self, server: Server, features: Tensor, labels: Tensor, num_labels: int) -> None:
        super().__init__()
        self.scores = server.scores
        weight, bias, _ = fit_ridge(centre(self.scores(features)).cpu(), labels.cpu(), num_labels)
        self.weight, self.bias = weight.to(features.device), bias.to(features.device)

    def forward(self, features: Tensor) -> Tensor:
        """Turn the server's features (B, D) into the task's logits (B, M)."""
        return self.read(self.scores(features))

    def read(self, scores: Tensor) -> Tensor:
        """Apply the map to an answer (B, K), logits or log-probabilities."""
        return centre(scores) @ self.weight.mT + self.bias
