"""Models that lack a part which an adapter needs: a classification head, or a module after which prompts can go.

Both get methods of their own, for one instance. Hooks would not do: Transformers' `Trainer` looks for labels in the
signature of the class's `forward`, and timm adds positions in a method.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.loss.loss_utils import LOSS_MAPPING
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils.generic import can_return_tuple

from pgn_peft.nn.functional import extend_joined_rotations
from pgn_peft.tuner.backbones import HEAD, SUPPORTED, architecture_of
from pgn_peft.tuner.head import PGNHead

# From a class to the attributes of its subclass.
Attributes = Callable[[Any], dict[str, Any]]


def make_classifier(model: nn.Module) -> None:
    """Let a model without a head answer with logits and a loss where an adapter with a head is active.

    Adds a module named `classifier`, in whose place a `PGNHead` has to be put. (PEFT would take one that is there
    before the adapter for an earlier adapter, and leave the model trainable.) A model that has one is left alone.
    """
    if not isinstance(getattr(model, HEAD, None), PGNHead):
        setattr(model, HEAD, nn.Identity())
        _add_methods(model, _classifier)
        _keep_hooks(model)


def restore_model(model: nn.Module) -> None:
    """Undo `make_classifier`."""
    delattr(model, HEAD)
    restore_class(model)
    _keep_hooks(model)


def append_prompts(backbone: nn.Module) -> None:
    """Let a timm model append the prompts that its wrapped `patch_embed` returns, after it has added positions."""
    _add_methods(backbone, _position_embedding)


def restore_class(module: nn.Module) -> None:
    """Give a module that got methods the class that it had before."""
    module.__class__ = type(module).__mro__[1]


def can_get_head(model: nn.Module) -> bool:
    """Whether `make_classifier` can change a model: it has no `classifier` yet, and the `forward` of its class.

    Accelerate's mixed precision replaces `forward`; its hooks for models on several devices do too, and are kept.
    """
    taken = hasattr(model, HEAD) and not isinstance(getattr(model, HEAD), PGNHead)
    return not taken and ("forward" not in vars(model) or "_hf_hook" in vars(model))


def _keep_hooks(model: Any) -> None:
    """Let the hooks of a model that Accelerate has spread over devices run around its new `forward`."""
    if "_hf_hook" in vars(model):
        model._old_forward = MethodType(type(model).forward, model)


def _classifier(base: Any) -> dict[str, Any]:
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
                raise ValueError("`labels` were passed, but no adapter with a head is active. Activate one.")
            return base.forward(self, pixel_values=pixel_values, **kwargs)
        if kwargs.get("input_ids") is not None:
            raise ValueError(
                "`input_ids` were passed, but an adapter with a head is active, which classifies images alone. Call "
                "the model without the adapter for texts."
            )
        backbone = SUPPORTED[cast(str, architecture_of(self))]
        compute = base.forward if backbone.image_method is None else getattr(base, backbone.image_method)
        output = compute(self, pixel_values=pixel_values, return_dict=True, **kwargs)
        logits = head(cast(Any, backbone.read)(self, output))
        return ImageClassifierOutput(
            loss=None if labels is None else loss_function(labels, logits, self.config),
            logits=logits,
            hidden_states=getattr(output, "hidden_states", None),
            attentions=getattr(output, "attentions", None),
        )

    return {
        "forward": forward,
        "from_pretrained": base.from_pretrained,  # makes a model of the original class
        "main_input_name": "pixel_values",
    }


def _position_embedding(base: Any) -> dict[str, Any]:
    def _pos_embed(self: Any, x: Any) -> Any:
        if not isinstance(x, tuple):
            return base._pos_embed(self, x)
        tokens, prompts, number = x
        output = base._pos_embed(self, tokens)
        if not isinstance(output, tuple):
            return torch.cat([output, prompts], dim=1)
        tokens, rotations = output  # of the patches; prompts are not rotated
        tokens = torch.cat([tokens, prompts], dim=1)
        return tokens, None if rotations is None else extend_joined_rotations(rotations, number)

    return {"_pos_embed": _pos_embed}


def _add_methods(module: nn.Module, attributes: Attributes) -> None:
    """Make a module an instance of a subclass of its class.

    The subclass keeps name and module of the class, which PEFT and Transformers write into files.
    """
    base: Any = type(module)
    module.__class__ = _subclass(base, attributes)


@cache
def _subclass(base: Any, attributes: Attributes) -> Any:
    def reduce(self: Any, protocol: Any) -> Any:
        """Pickle and copy without the name of the class, under which pickle would find the original."""
        _, _, *state = super(made, self).__reduce_ex__(protocol)
        return _new, (base, attributes), *state

    own = {name: getattr(base, name) for name in ("__doc__", "__module__", "__qualname__")}
    made: Any = type(base.__name__, (base,), own | attributes(base) | {"__reduce_ex__": reduce})
    return made


def _new(base: Any, attributes: Attributes) -> Any:
    made = _subclass(base, attributes)
    return made.__new__(made)
