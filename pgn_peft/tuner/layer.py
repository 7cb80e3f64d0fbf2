"""`PGNLayer`: wraps a backbone's embeddings and adds prompts, to their tokens or to the image."""

from __future__ import annotations

import math
from typing import Any, Self, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import CONFIG_NAME
from torch import Tensor, nn

from pgn_peft.nn.generator import PromptGenerator
from pgn_peft.nn.layout import PromptLayout, compose, make_layout
from pgn_peft.nn.library import PatchLibrary, TokenLibrary
from pgn_peft.nn.patch_inverse import PatchInverse
from pgn_peft.nn.preprocessing import denormalize, normalize
from pgn_peft.tuner.backbones import patch_projection
from pgn_peft.tuner.batch_adapters import BASE, adapters_of_batch, map_by_adapter
from pgn_peft.tuner.build import make_generator, make_library
from pgn_peft.tuner.checks import check_pixel_values, check_together
from pgn_peft.tuner.config import PGNConfig
from pgn_peft.tuner.offloading import loaded
from pgn_peft.tuner.positions import fixed_size, size_options
from pgn_peft.utils.checksums import compare_part
from pgn_peft.utils.values import filled

NO_MERGE = (
    "A PGN adapter cannot be merged into the model's weights: its prompts depend on the image. Call `unload()` to get "
    "the model back without it, or keep the adapter."
)


class PGNTunerLayer(BaseTunerLayer, nn.Module):
    """Base class of PGN's tuner layers, around embeddings, encoder layers and head."""

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

    def adapter_modules(self, adapter_name: str) -> list[nn.Module]:
        """List the modules of an adapter in this layer."""
        containers = [getattr(self, name) for name in self.adapter_layer_names]
        return [container[adapter_name] for container in containers if adapter_name in container]

    def expect_tensors(self, adapter_name: str) -> None:
        """Fill the new tensors of a saved adapter with NaN, until its file is loaded.

        Transformers' `load_adapter` only reports the tensors that it did not find, and initialises them at random.
        """
        for module in self.adapter_modules(adapter_name):
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
        for container in self.adapter_layer_names:
            if adapter_name not in getattr(self, container):
                continue
            module = getattr(self, container)[adapter_name]
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
        base_dtypes = (weight.dtype for weight in self.base_layer.parameters() if weight.is_floating_point())
        dtype = torch.float32 if upcast else next(base_dtypes, torch.float32)
        for module in self.adapter_modules(adapter_name):
            if not upcast or next(module.parameters()).dtype.itemsize < 4:
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
        with loaded(self.base_layer):
            weight = next(self.base_layer.parameters(), None)
            device = None if weight is None else weight.device
        if device is not None and not any(parameter.is_meta for parameter in module.parameters()):
            module.to(device)
        return module.train(self.base_layer.training)


def _floating_tensors(module: nn.Module) -> list[Tensor]:
    """List the floating-point tensors of a module that are in a saved file."""
    return [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]


class PGNLayer(PGNTunerLayer):
    """The backbone's embeddings, with the prompts of the active adapters.

    Prompts in latent space are appended to the tokens. Prompts in pixel space become part of the image, which the
    backbone's own embeddings then read, as a hosted model does.

    Args:
        base_layer: the embeddings: pixels (B, C, H, W) to tokens (B, N, D), position embeddings included.

    Source: arXiv:2210.06466: prompts are appended after the CLS and patch tokens.
    """

    adapter_layer_names = ("pgn_generator", "pgn_library")
    other_param_names = ("configs", "layouts")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.pgn_generator = nn.ModuleDict()
        self.pgn_library = nn.ModuleDict()
        self.configs: dict[str, PGNConfig] = {}
        self.layouts: dict[str, PromptLayout] = {}  # of adapters in pixel space
        self.merged_adapters: list[str] = []
        self._active_adapter: list[str] = []
        self.fixed_size = fixed_size(base_layer)  # height and width of its images, in pixels; None: any
        self.training = base_layer.training

    @property
    def projection(self) -> nn.Conv2d:
        """The backbone's patch projection."""
        return patch_projection(self.base_layer)

    @property
    def hidden_size(self) -> int:
        """The backbone's width D."""
        return self.projection.out_channels

    @property
    def num_channels(self) -> int:
        """The channels C of the backbone's images."""
        return self.projection.in_channels

    def update_layer(self, adapter_name: str, config: PGNConfig) -> None:
        """Create the generator and the library of an adapter."""
        self.configs[adapter_name] = config
        self.layouts.pop(adapter_name, None)
        directions = None
        if config.prompt_space == "pixel":
            self.layouts[adapter_name] = make_layout(
                filled(config.prompt_layout),
                (filled(config.image_size),) * 2,
                filled(config.patch_size),
                config.num_virtual_tokens,
            )
            with loaded(self.projection):
                directions = PatchInverse(self.projection.weight).directions(filled(config.image_std))
        library = make_library(config, self.hidden_size, self.num_channels, directions)
        self.pgn_library[adapter_name] = self._settle(library)
        generator = make_generator(config, self.num_channels)
        if generator is None:
            self._forget(self.pgn_generator, adapter_name)
        else:
            self.pgn_generator[adapter_name] = self._settle(generator)

    def library(self, adapter_name: str) -> TokenLibrary | PatchLibrary:
        """Return the library of an adapter."""
        return cast("TokenLibrary | PatchLibrary", self.pgn_library[adapter_name])

    def generator(self, adapter_name: str) -> PromptGenerator | None:
        """Return the generator of an adapter; None for static prompts."""
        if adapter_name not in self.pgn_generator:
            return None
        return cast(PromptGenerator, self.pgn_generator[adapter_name])

    def prompts(self, adapter_name: str, pixel_values: Tensor) -> Tensor:
        """Generate the prompts of one adapter for a batch of images.

        Args:
            adapter_name: a loaded adapter, active or not.
            pixel_values: (B, C, H, W), normalised as for the backbone.

        Returns:
            (B, P, D) prompts; for an adapter with prompts in several layers (B, depth * P, D), layer by layer; for one
            in pixel space (B, P, C, p, p) patches in [0, 1].
        """
        library, generator = self.library(adapter_name), self.generator(adapter_name)
        if generator is None:
            return library.static_prompts(pixel_values.shape[0])
        return library(generator(pixel_values))

    def prompted_images(self, adapter_name: str, pixel_values: Tensor) -> Tensor:
        """Add the prompts of an adapter in pixel space to a batch of images.

        Args:
            adapter_name: an adapter in pixel space.
            pixel_values: (B, C, H, W), normalised as for the backbone.

        Returns:
            (B, C, H', W') prompted images, normalised.
        """
        config, library = self.configs[adapter_name], cast(PatchLibrary, self.library(adapter_name))
        mean, std = filled(config.image_mean), filled(config.image_std)
        # Always in float32: half precision does not hold 8 bits of a normalised pixel.
        pixels = denormalize(pixel_values.float(), mean, std)
        patches = self.prompts(adapter_name, pixel_values).float()
        prompted = compose(pixels, patches, self.layouts[adapter_name], library.image_offset)
        return normalize(prompted, mean, std).to(pixel_values.dtype)

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute the tokens of the images and the prompts of the active adapters: (B, N + P, D).

        Prompts in latent space are generated from the image without patches and appended in order. An adapter with
        prompts in several layers appends all of them; each `PGNBlock` removes its layer's. In a mixed batch each image
        has the adapter that `adapters_of_batch` names for it.
        """
        names = adapters_of_batch()
        if names:
            return map_by_adapter(
                names,
                pixel_values,
                lambda name, images: self._embed([] if name == BASE else [name], images, *args, **kwargs),
            )
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.pgn_library]
        return self._embed(active, pixel_values, *args, **kwargs)

    def _embed(self, active: list[str], pixel_values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        check_together(active, self.configs)
        images = pixel_values
        for name in active:
            if name in self.layouts:  # one at most: PGNModel.set_adapter
                images = self.prompted_images(name, pixel_values)
                kwargs = kwargs | self.size_options(self.layouts[name].size)
        tokens = self.base_layer(images, *args, **kwargs)  # (B, N, D)
        # Appended after the position embeddings were added: a prompt has no position in the image.
        prompts = [self.prompts(name, pixel_values).to(tokens.dtype) for name in active if name not in self.layouts]
        return torch.cat([tokens, *prompts], dim=1) if prompts else tokens

    def size_options(self, size: tuple[int, int]) -> dict[str, bool]:
        """Return the options that the backbone must be called with for images of this height and width, in pixels."""
        return size_options(self.fixed_size, size)

    def token_counts(self, adapter_name: str, image_size: tuple[int, int]) -> tuple[int, ...]:
        """Return what determines an image's number of tokens: the embedded size, number of prompts, and depth.

        Args:
            adapter_name: a loaded adapter, or "__base__".
            image_size: height and width of the image, in pixels.
        """
        size = self.layouts[adapter_name].size if adapter_name in self.layouts else image_size
        return (*size, *self._count_prompts(adapter_name))

    def running_prompts(self) -> tuple[int, int]:
        """Return the number of prompts P after the tokens, and of layers with their own, in the current call."""
        names = adapters_of_batch()
        if names:
            return self._count_prompts(names[0])  # the same for all images: `token_counts`
        active = () if self.disable_adapters else self.active_adapters
        counts = [self._count_prompts(name) for name in active if name in self.configs]
        # One with prompts in several layers is active alone: `check_together`.
        return sum([number for number, _ in counts]), max([1, *(depth for _, depth in counts)])

    def _count_prompts(self, adapter_name: str) -> tuple[int, int]:
        if adapter_name == BASE or adapter_name in self.layouts:
            return 0, 1
        config = self.configs[adapter_name]
        return filled(config.num_virtual_tokens), filled(config.prompt_depth)

    def check_calls_of(self, backbone: nn.Module) -> None:
        """Run `check_inputs` before each forward pass of the backbone, until `release`."""
        self._input_check = backbone.register_forward_pre_hook(self.check_inputs, with_kwargs=True)

    def release(self) -> None:
        """Remove the hook of `check_calls_of`."""
        self._input_check.remove()

    def check_inputs(
        self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Check the backbone's input before it is cast and embedded; a forward pre-hook of the backbone.

        Checks shapes and dtypes only, so that the model compiles to one graph; `ImageCollator` checks values.

        Returns:
            The arguments; without `interpolate_pos_encoding` for a backbone that always interpolates and has no such
            option, so that all backbones can be called alike.

        Raises:
            TypeError: `pixel_values` is not a floating-point tensor.
            ValueError: `pixel_values` has the wrong number of axes, channels or pixels; or `adapter_names` was passed
                to the model inside a `PeftModel`.
        """
        interpolate = kwargs.get("interpolate_pos_encoding")
        if self.fixed_size is None:
            kwargs = {name: value for name, value in kwargs.items() if name != "interpolate_pos_encoding"}
        if self.disable_adapters:
            return args, kwargs
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"`adapter_names` must be passed to a PeftModel, but got {kwargs['adapter_names']!r} at the model "
                "inside, which would give every image the active adapter. Load it with PeftModel.from_pretrained."
            )
        pixel_values = args[0] if args else kwargs.get("pixel_values")
        check_pixel_values(pixel_values, self.num_channels, None if interpolate else self.fixed_size)
        return args, kwargs
