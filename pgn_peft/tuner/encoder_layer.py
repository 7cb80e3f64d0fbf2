"""`PGNBlock`: wraps a layer of a backbone behind which prompts change, or end."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pgn_peft.tuner.config import PGNConfig
from pgn_peft.tuner.layer import PGNLayer, PGNTunerLayer


class PGNBlock(PGNTunerLayer):
    """A layer of the backbone. Where a deep adapter is active, the next layer's prompts take the place of this one's.

    As the last layer of a backbone that reads all its tokens, it also takes the prompts away, so that what is averaged
    are the image's own tokens, as without an adapter.

    It has no parameters and keeps nothing between calls. The prompts of all layers come with the tokens, made by
    `PGNLayer` behind them, so that a step which is checkpointed, compiled or run by several threads finds its own:

        [tokens, this layer's prompts, the next one's, ...] -> [what becomes of the tokens, the next one's, ...]

    Args:
        base_layer: tokens (B, N, D) to tokens (B, N, D), or to a tuple that begins with them.
        prompts: the layer that makes the prompts; it also knows which adapter is active.
        index: of this layer, from 0.
        ends: prompts are cut off behind this layer.

    Source: Jia et al. 2022 (arXiv:2203.12119), VPT-deep: a layer's prompts are thrown away behind it.
    """

    other_param_names = ("configs",)

    def __init__(self, base_layer: nn.Module, prompts: PGNLayer, index: int, ends: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.index = index
        self.ends = ends
        self._prompts = (prompts,)  # a tuple, so that it is not a submodule here too
        # The forward pass asks `prompts`; PEFT's reports on a model's state ask every tuner layer.
        self.merged_adapters: list[str] = []
        self._active_adapter: list[str] = []
        self._disable_adapters = prompts.disable_adapters
        self.training = base_layer.training

    @property
    def configs(self) -> dict[str, PGNConfig]:
        """The adapters' configs by name, from the layer that makes the prompts."""
        return self._prompts[0].configs

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer on its tokens (B, N + P, D) and put the next one's prompts behind what becomes of the N."""
        num_prompts, depth = self._prompts[0].running_prompts()
        if num_prompts == 0 or (depth == 1 and not self.ends):
            return self.base_layer(hidden_states, *args, **kwargs)
        waiting = num_prompts * max(0, depth - 1 - self.index)  # tokens of the layers to come
        end = hidden_states.shape[1] - waiting
        args = tuple(_cut_mask(value, end) for value in args)
        kwargs = {name: _cut_mask(value, end) for name, value in kwargs.items()}
        output = self.base_layer(hidden_states[:, :end], *args, **kwargs)
        if not waiting and not self.ends:
            return output
        tokens, *others = output if isinstance(output, tuple) else (output,)
        tokens = tokens[:, : end - num_prompts]
        if waiting:
            tokens = torch.cat([tokens, hidden_states[:, end:]], dim=1)
        return (tokens, *others) if isinstance(output, tuple) else tokens


def _cut_mask(value: Any, end: int) -> Any:
    """Cut an attention mask, which was made for the tokens of all layers, to those of one; leave anything else."""
    return value[..., :end, :end] if isinstance(value, Tensor) and value.ndim == 4 else value
