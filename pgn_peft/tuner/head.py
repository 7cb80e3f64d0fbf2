"""`PGNHead`: wraps a model's classification head, so that each adapter has its own head and labels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from pgn_peft.nn.heads import TextHead
from pgn_peft.tuner.config import PGNConfig
from pgn_peft.tuner.mixed_batch import BASE, adapters_of_batch, map_by_adapter
from pgn_peft.tuner.prompts import make_head
from pgn_peft.tuner.tuner_layer import PGNTunerLayer
from pgn_peft.utils.labels import Labels, number_labels

logger = logging.getLogger(__name__)


class PGNHead(PGNTunerLayer):
    """The head of the first active adapter, or the model's own.

    It also writes the labels of the head in use into the model's config, where Transformers' losses and pipelines read
    `num_labels`, `id2label` and `problem_type`.

    Args:
        base_layer: the model's head, features (B, F) to logits (B, number of labels); None: the model has none, and
            `make_classifier` has added this layer.
        model_config: the model's `PretrainedConfig`, or None for a model that has none.
        embeddings: the wrapped embeddings; a head that is added goes to their device.
    """

    adapter_layer_names = ("pgn_head",)
    other_param_names = ("configs",)

    def __init__(self, base_layer: nn.Module | None, model_config: Any, embeddings: PGNTunerLayer) -> None:
        super().__init__(nn.Identity().train(embeddings.training) if base_layer is None else base_layer)
        self.is_added = base_layer is None
        self.configs: dict[str, PGNConfig] = {}
        self.shows_features = False  # answer with features where there is no head for logits
        self._own_labels = labels_of(self.base_layer, model_config)
        self.base_labels = Labels({}) if self.is_added else self._own_labels
        self._embeddings = (embeddings,)  # a tuple, so that it is not a submodule here too
        self._disable_adapters = embeddings.disable_adapters
        self._model_config = model_config
        self._shown: str | None = None  # the adapter whose labels the model's config shows

    @property
    def reference_module(self) -> nn.Module:
        """The head of the base, or without one its embeddings."""
        return self._embeddings[0].base_layer if self.is_added else self.base_layer

    def update_layer(self, adapter_name: str, config: PGNConfig) -> None:
        """Create the head of an adapter: a copy of the model's where the labels are the same, else a new one.

        An adapter with `head="frozen"` gets none: the model's head is used, with its `label_mapping` if it has one.
        One with `head="text"` waits for its texts.
        """
        self.configs[adapter_name] = config
        head = make_head(config)
        base = cast(nn.Linear, self.base_layer)  # or a quantised one: `resolve`
        if isinstance(head, nn.Linear) and self.base_labels.id2label == config.id2label:
            with torch.no_grad():
                head.weight.copy_(plain_weight(base))
                head.bias.copy_(base.bias if base.bias is not None else torch.zeros(()))
        self.add_adapter_module("pgn_head", adapter_name, head)

    def head(self, adapter_name: str | None) -> nn.Linear | TextHead | None:
        """Return the head of an adapter; None if it uses the model's own."""
        if adapter_name is None or adapter_name not in self.pgn_head:
            return None
        return cast("nn.Linear | TextHead", self.pgn_head[adapter_name])

    def answers(self) -> bool:
        """Whether there is a head to compute logits with: the model's, an active adapter's, or its texts."""
        if not self.is_added or self.shows_features:
            return True
        active = self.head(self._first_active())
        names = adapters_of_batch()
        if names:
            zero_shot = BASE in names and isinstance(active, TextHead)
            return zero_shot or any(self.head(name) is not None for name in names)
        return isinstance(active, TextHead) if self.disable_adapters else active is not None

    def _first_active(self) -> str | None:
        return next(iter(self.active_adapters), None)

    def labels(self, adapter_name: str | None) -> Labels:
        """Return the labels of an adapter; those of the model for a name that it has no adapter of, or None."""
        config = None if adapter_name is None else self.configs.get(adapter_name)
        if config is None or config.id2label is None:
            return self.base_labels
        return Labels(config.id2label, config.problem_type)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits (B, number of the active adapter's labels).

        In a mixed batch each image has the head of its own adapter. A model without a head of its own, its adapters
        switched off, answers by the texts of the active one: zero-shot.
        """
        if self.is_added and self.shows_features:
            return features
        names = adapters_of_batch()
        if names:
            (logits,) = map_by_adapter(names, features, lambda name, rows: (self.classify(name, rows),))
            return logits
        return self.classify(None if self.disable_adapters else self._first_active(), features)

    def classify(self, adapter_name: str | None, features: Tensor) -> Tensor:
        """Return the logits (B, M) of an adapter's head, or of the model's own for None."""
        head = self.head(adapter_name)
        if head is None and self.is_added:  # zero-shot, see `answers`
            head = self.head(self.texts_of_base(adapters_of_batch() or ()))
        if isinstance(head, TextHead):
            self.check_texts(head)
            return head(features)
        if head is not None:
            weight = head.weight  # a method, where `torch.ao.quantization.quantize_dynamic` has replaced the layer
            return head(features.to(weight.dtype) if isinstance(weight, Tensor) else features)
        logits = self.base_layer(features)
        config = None if adapter_name is None else self.configs.get(adapter_name)
        if config is not None and config.label_mapping is not None:
            return logits[..., torch.tensor(config.label_mapping, device=logits.device)]
        return logits

    def texts_of_base(self, names: Sequence[str]) -> str | None:
        """Name the adapter whose texts the base is compared with: the active one, or else the first one with texts."""
        return next((name for name in (*self.active_adapters, *names) if isinstance(self.head(name), TextHead)), None)

    @staticmethod
    def check_texts(head: nn.Module | None) -> None:
        """Refuse a head without texts.

        Raises:
            ValueError: none have been given.
        """
        if isinstance(head, TextHead) and not head.is_set:
            raise ValueError("No text embeddings: call use_texts(model, embed_texts(...)) first.")

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters; the first one's head is used, and its labels are written into the model's config."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.sync_config_labels()

    def enable_adapters(self, enabled: bool) -> None:
        """Turn adapters on or off; off restores the model's own head and labels."""
        super().enable_adapters(enabled)
        self.sync_config_labels()

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter's head and labels."""
        super().delete_adapter(adapter_name)
        self.sync_config_labels()

    def sync_config_labels(self) -> None:
        """Write the labels of the head in use into the model's config."""
        # A frozen head has the model's names, and perhaps another `problem_type`. Texts classify without prompts too.
        name = self._first_active()
        self._show(None if self.disable_adapters and not isinstance(self.head(name), TextHead) else name)

    def show_base_labels(self) -> None:
        """Write the model's own labels into its config again."""
        self._show(None)

    def _show(self, adapter_name: str | None) -> None:
        self.record_labels()
        self._shown = adapter_name if adapter_name in self.configs else None
        if hasattr(self._model_config, "id2label"):
            shown = self._own_labels if self.is_added and self.head(self._shown) is None else self.labels(self._shown)
            shown.show_in(self._model_config)

    def record_labels(self) -> None:
        """Record the labels in the model's config, where users rename classes, in the config of the adapter in use.

        Transformers' losses write the problem type there too, which they infer from the first labels.
        """
        config = None if self._shown is None else self.configs.get(self._shown)
        if config is None:
            return
        config.problem_type = config.problem_type or getattr(self._model_config, "problem_type", None)
        names = Labels.of(self._model_config)
        if config.id2label is not None and names is not None and len(names.id2label) == config.num_labels:
            config.id2label = names.id2label

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        for name, head in self.pgn_head.items():
            # PEFT also reads the state dict of an adapter that it is about to fill from a file.
            if isinstance(head, TextHead) and not (head.is_set or self.configs[name].inference_mode):
                logger.warning("saving %r without its texts: give it `text_embeds` first, by use_texts(...)", name)
        # Whatever saves an adapter reads the state dict first, and writes the config afterwards.
        self.record_labels()
        super()._save_to_state_dict(*args, **kwargs)


def find_head(model: nn.Module) -> PGNHead | None:
    """Find the layer with the adapters' heads; None in a model for features."""
    return next((module for module in model.modules() if isinstance(module, PGNHead)), None)


def plain_weight(linear: nn.Linear) -> Tensor:
    """Return a linear layer's weight (M, D) in floating point, also if it is quantised.

    Args:
        linear: `torch.nn.Linear`, or what a quantisation library puts in its place.
    """
    weight = linear.weight
    if type(weight) is nn.Parameter and weight.is_floating_point():
        return weight
    # Each library packs weights differently, but its layer maps unit vectors to the columns of the weight.
    floats = (tensor.dtype for tensor in (weight, linear.bias) if tensor is not None and tensor.is_floating_point())
    units = torch.eye(linear.in_features, dtype=next(floats, torch.float32), device=weight.device)
    columns = linear(units)  # (D, M), the bias added to each
    return (columns if linear.bias is None else columns - linear.bias).mT


def labels_of(head: nn.Module, model_config: Any) -> Labels:
    """Read a model's own labels from its config; where they do not fit its linear head, number the outputs of that."""
    labels = Labels.of(model_config)
    outputs = getattr(head, "out_features", None)
    if labels is None or (outputs is not None and outputs != len(labels.id2label)):
        labels = Labels(number_labels(outputs or 0))
    return labels
