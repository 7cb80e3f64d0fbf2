"""`PGNBlock`: wraps an encoder layer after which prompts are replaced or removed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pgn_peft.tuner.config import PGNConfig
from pgn_peft.tuner.layer import PGNLayer
from pgn_peft.tuner.tuner_layer import PGNTunerLayer


class PGNBlock(PGNTunerLayer):
    """An encoder layer. If the active adapter is deep, its prompts are replaced by the next layer's.

    As the last layer of a backbone that reads all its tokens, it also removes the prompts, so that the classifier
    averages the image's own tokens only.

    It has no parameters and no state. `PGNLayer` appends the prompts of all layers to the tokens, so that gradient
    checkpointing, compiled graphs and threads always use the prompts of their own call:

        [tokens, this layer's prompts, the next layer's prompts, ...] -> [new tokens, the next layer's prompts, ...]

    Args:
        base_layer: tokens (B, N, D) to tokens (B, N, D), or to a tuple that begins with them.
        prompts: the layer that makes the prompts, whose active adapters apply.
        index: of this layer, from 0.
        ends: prompts are removed after this layer.

    Source: Jia et al. 2022 (arXiv:2203.12119), VPT-deep: a layer's prompts are discarded after it.
    """

    other_param_names = ("configs",)

    def __init__(self, base_layer: nn.Module, prompts: PGNLayer, index: int, ends: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.index = index
        self.ends = ends
        self._prompts = (prompts,)  # a tuple, so that it is not a submodule here too
        # Not used in the forward pass; PEFT's reports on a model's state read these from every tuner layer.
        self.merged_adapters: list[str] = []
        self._active_adapter: list[str] = []
        self._disable_adapters = prompts.disable_adapters
        self.training = base_layer.training

    @property
    def configs(self) -> dict[str, PGNConfig]:
        """The adapters' configs by name, from the layer that makes the prompts."""
        return self._prompts[0].configs

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer on the image tokens and its own prompts, then replace those prompts with the next layer's."""
        num_prompts, depth = self._prompts[0].running_prompts()
        if num_prompts == 0 or (depth == 1 and not self.ends):
            return self.base_layer(hidden_states, *args, **kwargs)
        waiting = num_prompts * max(0, depth - 1 - self.index)  # prompts of later layers
        end = hidden_states.shape[1] - waiting
        args = tuple(_cut_mask(value, end) for value in args)
        kwargs = {name: _cut_mask(value, end) for name, value in kwargs.items()}
        # In backward `split` joins the gradients once, where two slices fill zeros and add.
        own, later = hidden_states.split([end, waiting], dim=1)
        output = self.base_layer(own, *args, **kwargs)
        if not waiting and not self.ends:
            return output
        tokens, *others = output if isinstance(output, tuple) else (output,)
        tokens = tokens[:, : end - num_prompts]
        if waiting:
            tokens = torch.cat([tokens, later], dim=1)
        return (tokens, *others) if isinstance(output, tuple) else tokens


def _cut_mask(value: Any, end: int) -> Any:
    """Cut an attention mask for the prompts of all layers to one layer's tokens; return other values unchanged."""
    return value[..., :end, :end] if isinstance(value, Tensor) and value.ndim == 4 else value
