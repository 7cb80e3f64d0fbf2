"""`PGNTunerLayer`: what all of PGN's layers in a model have in common."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from pgn_peft.tuner.offloading import loaded
from pgn_peft.utils.checksums import compare_part

NO_MERGE = (
    "A PGN adapter cannot be merged into the model's weights: its prompts depend on the image. Call `unload()` to get "
    "the model back without it, or keep the adapter."
)


class PGNTunerLayer(nn.Module, BaseTunerLayer):
    """Base class of PGN's tuner layers, around embeddings, encoder layers and head.

    A module first: torch's FSDP2 gives each module that it shards another class, which Python refuses for the other
    order.
    """

    # Names of ModuleDicts by adapter name; each must begin with the method's prefix in PEFT.
    adapter_layer_names: tuple[str, ...] = ()
    base_layer: nn.Module
    # Saved adapters whose tensors have not been loaded yet; see `expect_tensors`.
    _expected: frozenset[str] = frozenset()

    def __getattr__(self, name: str) -> Any:
        # Transformers reads attributes such as `embeddings.patch_embeddings` through the wrapper.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)

    @property
    def anchor(self) -> nn.Module:
        """The module of the base whose device and dtype new adapters take."""
        return self.base_layer

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse: prompts depend on the image."""
        raise ValueError(NO_MERGE)

    def unmerge(self) -> None:
        """Do nothing: an adapter is never merged."""

    def enable_adapters(self, enabled: bool) -> None:
        """Turn adapters on or off, and leave it as it is which of them are trained.

        PEFT would make a frozen adapter trainable when it is turned on again, as `disable_adapter()` does on leaving.
        """
        self._disable_adapters = not enabled

    def adapter_modules(self, adapter_name: str) -> dict[str, nn.Module]:
        """Return the modules of an adapter in this layer, by the names of the ModuleDicts that hold them."""
        containers = {name: getattr(self, name) for name in self.adapter_layer_names}
        return {name: modules[adapter_name] for name, modules in containers.items() if adapter_name in modules}

    def expect_tensors(self, adapter_name: str) -> None:
        """Fill the new tensors of a saved adapter with NaN, until its file is loaded.

        Transformers' `load_adapter` only reports the tensors that it did not find, and initialises them at random.
        """
        for module in self.adapter_modules(adapter_name).values():
            for part in module.modules():
                # Transformers' mark: it leaves such modules as they are.
                part._is_hf_initialized = True  # type: ignore[assignment]  # torch knows tensors and modules only
            for tensor in _floating_tensors(module):
                tensor.fill_(math.nan)
        self._expected |= {adapter_name}

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Freeze or unfreeze. Freezing checks the tensors of saved adapters that Transformers has loaded.

        Its `load_adapter` shows a tuner neither the file nor the tensors, but freezes each tuner layer afterwards.

        Raises:
            ValueError: a tensor was not loaded, or differs from the one that was saved.
        """
        if not requires_grad:
            for adapter_name in self._expected:
                self._check_loaded(adapter_name)
            self._expected = frozenset()
        return super().requires_grad_(requires_grad)

    def _check_loaded(self, adapter_name: str) -> None:
        for container, module in self.adapter_modules(adapter_name).items():
            if any(bool(tensor.isnan().any()) for tensor in _floating_tensors(module)):
                raise ValueError(
                    f"`{adapter_name}` must be loaded from a file with all tensors of the adapter, but got one "
                    f"without some of {container}; `PGNConfig.from_pretrained` names these. Save or fetch the adapter "
                    "again."
                )
            checksum = self.configs[adapter_name].saved_checksums.get(container)
            if checksum is not None:
                compare_part(container, module.state_dict(), checksum, CONFIG_NAME)

    def cast_adapter(self, adapter_name: str, upcast: bool) -> None:
        """Cast an adapter's part of this layer, with its buffers, which PEFT's own function does not cast.

        Args:
            adapter_name: a loaded adapter.
            upcast: cast half precision to float32, as PEFT does by default; else to the base layer's dtype.
        """
        base_dtypes = (weight.dtype for weight in self.anchor.parameters() if weight.is_floating_point())
        dtype = torch.float32 if upcast else next(base_dtypes, torch.float32)
        for module in self.adapter_modules(adapter_name).values():
            if not upcast or next(iter(_floating_tensors(module))).dtype.itemsize < 4:
                module.to(dtype)

    @staticmethod
    def _forget(modules: nn.ModuleDict, adapter_name: str) -> None:
        """Remove the module of an earlier adapter of the same name, if there is one."""
        if adapter_name in modules:
            del modules[adapter_name]

    def _settle(self, module: nn.Module) -> nn.Module:
        """Move a new adapter's module to the base layer's device, and set the base layer's mode.

        Without this, an adapter added to a model in eval mode would update its BatchNorm during inference.
        """
        with loaded(self.anchor):
            weight = next(self.anchor.parameters(), None)
            device = None if weight is None else weight.device
        if device is not None and not any(parameter.is_meta for parameter in module.parameters()):
            module.to(device)
        return module.train(self.base_layer.training)


def _floating_tensors(module: nn.Module) -> list[Tensor]:
    """List the floating-point tensors of a module that are in a saved file."""
    return [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]
