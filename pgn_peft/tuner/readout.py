"""Makes a classifier of a model without a classification head, for adapters that bring one.

Transformers' `Trainer` looks for labels in the signature of the class's `forward`, so a hook would not do.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, cast

from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from pgn_peft.tuner.backbones import HEAD, SUPPORTED, architecture_of
from pgn_peft.tuner.head import PGNHead
from pgn_peft.tuner.subclassing import add_methods, original_class


def make_classifier(model: nn.Module) -> None:
    """Let a model without a head answer with logits and a loss where an adapter with a head is active.

    Adds a module named `classifier`, in whose place a `PGNHead` has to be put. (PEFT would take one that is there
    before the adapter for an earlier adapter, and leave the model trainable.) A model that has one is left alone.
    """
    if not isinstance(getattr(model, HEAD, None), PGNHead):
        setattr(model, HEAD, nn.Identity())
        add_methods(model, _attributes)
        _keep_hooks(model)


def restore_model(model: nn.Module) -> None:
    """Undo `make_classifier`."""
    delattr(model, HEAD)
    original_class(model)
    _keep_hooks(model)


def check_can_classify(model: nn.Module) -> None:
    """Refuse a model that `make_classifier` would break.

    Raises:
        ValueError: it has a module of that name already, or its `forward` was replaced.
    """
    if hasattr(model, HEAD) and not isinstance(getattr(model, HEAD), PGNHead):
        raise ValueError(
            f"`id2label` and `num_labels` must be left out for a {type(model).__name__} with a {HEAD!r} of its own, "
            "which PGN does not know. Make the adapter on the model inside, or without labels."
        )
    if "forward" in vars(model) and "_hf_hook" not in vars(model):
        raise ValueError(
            f"`model` must have the `forward` of its class, but got a {type(model).__name__} in which it was "
            "replaced, as Accelerate's mixed precision does. Make the adapter before the model is prepared."
        )


def _keep_hooks(model: Any) -> None:
    """Let the hooks of a model that Accelerate has spread over devices run around its new `forward`."""
    if "_hf_hook" in vars(model):
        model._old_forward = MethodType(type(model).forward, model)


def _attributes(base: Any) -> dict[str, Any]:
    loss_function: Any = LOSS_MAPPING["ForImageClassification"]

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(self: Any, pixel_values: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any) -> Any:
        """Classify images by the head of the active adapter; without one, answer as the model does."""
        head = cast(PGNHead, self.classifier)
        if not head.answers():
            if isinstance(pixel_values, Tensor) and not pixel_values.is_floating_point():
                # A model of two towers, called with texts and images by position.
                return base.forward(self, pixel_values, *(() if labels is None else (labels,)), **kwargs)
            if labels is not None:
                raise ValueError(
                    "`labels` must be left out where no adapter with a head is active, but got a tensor. Activate one."
                )
            return base.forward(self, pixel_values=pixel_values, **kwargs)
        if kwargs.get("input_ids") is not None:
            raise ValueError(
                "`input_ids` must be left out where an adapter with a head is active, but got a tensor. The head "
                "classifies images alone; call the model without the adapter for texts."
            )
        backbone = SUPPORTED[cast(str, architecture_of(self))]
        compute = base.forward if backbone.image_method is None else getattr(base, backbone.image_method)
        output = compute(self, pixel_values=pixel_values, return_dict=True, **kwargs)
        logits = head(cast(Any, backbone.read)(self, output))
        loss = None
        if labels is not None:
            loss = loss_function(labels, logits, self.config)
        return ImageClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=getattr(output, "hidden_states", None),
            attentions=getattr(output, "attentions", None),
        )

    return {
        "forward": forward,
        "from_pretrained": base.from_pretrained,  # makes a model of the original class
        "main_input_name": "pixel_values",
        "accepts_loss_kwargs": False,  # Trainer then averages the loss over accumulated batches
    }
