"""`PGNTunerLayer`: what all of PGN's layers in a model have in common."""

from __future__ import annotations

import math
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

NO_MERGE = (
    "A PGN adapter cannot be merged into the model's weights: its prompts depend on the image. Call `unload()` to get "
    "the model back without it, or keep the adapter."
)
# The fields of a config that determine the shape of a tensor, by a part of its name.
SHAPED_BY = {
    "static_prompts": "`num_virtual_tokens`, `prompt_depth` and `static_prompts`",
    "pgn_library": "`library_size`, `prompt_depth`, `num_virtual_tokens` and the base model's width",
    ".trunk.": "`generator_width` and `num_channels`",
    "pgn_generator": "`num_virtual_tokens`, `library_size`, `generator_rank` and `generator_width`",
    "pgn_head": "`num_labels` and the base model's width",
}


class PGNTunerLayer(nn.Module, BaseTunerLayer):
    """Base class of PGN's tuner layers, around embeddings, encoder layers and head.

    A module first: torch's FSDP2 gives each module that it shards another class, which Python refuses for the other
    order.
    """

    # Names of ModuleDicts by adapter name; each must begin with the method's prefix in PEFT.
    adapter_layer_names: tuple[str, ...] = ()
    base_layer: nn.Module

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        for name in self.adapter_layer_names:
            self.add_module(name, nn.ModuleDict())
        self.merged_adapters: list[str] = []
        self._active_adapter: list[str] = []
        self.training = base_layer.training

    def __getattr__(self, name: str) -> Any:
        # Transformers reads attributes such as `embeddings.patch_embeddings` through the wrapper.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    @property
    def reference_module(self) -> nn.Module:
        """The module of the base whose device and dtype new adapters take."""
        return self.base_layer

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: prompts depend on the image."""
        raise ValueError(NO_MERGE)

    def unmerge(self) -> None:
        """Do nothing: an adapter is never merged."""

    def enable_adapters(self, enabled: bool) -> None:
        """Turn adapters on or off. Do not change `requires_grad`, as PEFT would on leaving `disable_adapter()`."""
        self._disable_adapters = not enabled

    def adapter_modules(self, adapter_name: str) -> dict[str, nn.Module]:
        """Return the modules of an adapter in this layer, by the names of the ModuleDicts that hold them."""
        containers = {name: getattr(self, name) for name in self.adapter_layer_names}
        return {name: modules[adapter_name] for name, modules in containers.items() if adapter_name in modules}

    def add_adapter_module(self, container: str, adapter_name: str, module: nn.Module | None) -> None:
        """Put a new adapter's module on the base layer's device and in its mode, in place of one of the same name.

        Without the mode, an adapter that is added to a model in eval mode would update its BatchNorm in inference.
        """
        modules: nn.ModuleDict = getattr(self, container)
        if adapter_name in modules:
            del modules[adapter_name]
        if module is None:
            return
        weight = next(self.reference_module.parameters(), None)
        if weight is not None and not any(parameter.is_meta for parameter in module.parameters()):
            module.to(weight.device)
        modules[adapter_name] = module.train(self.base_layer.training)

    def expect_tensors(self, adapter_name: str) -> None:
        """Fill the new tensors of a saved adapter with NaN, until its file is loaded.

        Transformers' `load_adapter` only reports the tensors that it did not find, and initialises them at random.
        """
        for module in self.adapter_modules(adapter_name).values():
            for part in module.modules():
                # Transformers' mark: it leaves such modules as they are.
                part._is_hf_initialized = True  # type: ignore[assignment]  # torch knows tensors and modules only
            for tensor in floating_tensors(module):
                tensor.fill_(math.nan)

    def cast_adapter(self, adapter_name: str, upcast: bool) -> None:
        """Cast an adapter's part of this layer, with its buffers, which PEFT's own function does not cast.

        Args:
            adapter_name: a loaded adapter.
            upcast: cast half precision to float32, as PEFT does by default; else to the base layer's dtype.
        """
        base_dtypes = (weight.dtype for weight in self.reference_module.parameters() if weight.is_floating_point())
        dtype = torch.float32 if upcast else next(base_dtypes, torch.float32)
        for module in self.adapter_modules(adapter_name).values():
            if not upcast or any(tensor.dtype.itemsize < 4 for tensor in floating_tensors(module)):
                module.to(dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        # Torch's own message about another shape does not say which field of the configuration it comes from.
        error_messages: list[str] = args[-1]
        for container in self.adapter_layer_names:
            for name, tensor in getattr(self, container).state_dict(prefix=f"{prefix}{container}.").items():
                found = state_dict.get(name)
                if found is not None and found.shape != tensor.shape:
                    fields = next(fields for part, fields in SHAPED_BY.items() if part in name)
                    error_messages.append(
                        f"{name} has the shape {tuple(found.shape)} in the file, and {tuple(tensor.shape)} by the "
                        f"adapter's configuration: {fields} must be those that it was trained with."
                    )
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def floating_tensors(module: nn.Module) -> list[Tensor]:
    """List the floating-point tensors of a module that are in a saved file."""
    return [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
