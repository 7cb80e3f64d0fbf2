"""`PGNLayer`: wraps a backbone's embeddings and adds the prompts, as tokens behind them or as pixels before them."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from pgn_peft.backbones import own_image_size, patch_projection, takes_any_size
from pgn_peft.checks import check_pixel_values, check_together
from pgn_peft.config import PGNConfig
from pgn_peft.layout import PromptLayout, compose, make_layout
from pgn_peft.preprocessing import denormalize, normalize
from pgn_peft.projection import PatchInverse
from pgn_peft.rows import BASE, current_rows, map_rows
from pgn_peft.weights import make_generator, make_library

NO_MERGE = (
    "A PGN adapter cannot be merged into the model's weights: its prompts depend on the image. Call `unload()` to get "
    "the model back without it, or keep the adapter."
)


class ForwardsAttributes:
    """A wrapper around `base_layer` that answers for attributes which it does not have itself."""

    def __getattr__(self, name: str) -> Any:
        # Transformers reads attributes such as `embeddings.patch_embeddings` through the wrapper.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


class PGNTunerLayer(ForwardsAttributes, BaseTunerLayer):
    """What PGN's two tuner layers, the prompts and the head, have in common."""

    # Names of ModuleDicts by adapter name; each must begin with the method's prefix in PEFT.
    adapter_layer_names: tuple[str, ...] = ()
    # Saved adapters whose tensors have not been loaded yet; see `expect_tensors`.
    _expected: frozenset[str] = frozenset()

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
        `train` and `eval`, which every loader calls at its end, raise if one was left out.
        """
        for module in self.adapter_modules(adapter_name):
            for part in module.modules():
                part._is_hf_initialized = True  # Transformers' mark: it leaves such modules as they are
            for tensor in _floating_tensors(module):
                tensor.fill_(math.nan)
        self._expected |= {adapter_name}

    def train(self, mode: bool = True) -> Self:
        """Set the mode, as in torch.

        Raises:
            ValueError: a tensor of a saved adapter was not loaded.
        """
        for adapter_name in self._expected:
            tensors = [tensor for module in self.adapter_modules(adapter_name) for tensor in _floating_tensors(module)]
            if any(tensor.is_meta for tensor in tensors):
                continue  # still being loaded
            self._expected -= {adapter_name}
            if any(bool(tensor.isnan().any()) for tensor in tensors):
                raise ValueError(
                    f"`{adapter_name}` must be loaded from a file with all tensors of the adapter, but got one "
                    "without some of them; `PGNConfig.from_pretrained` names these. Save or fetch the adapter again."
                )
        return super().train(mode)

    @staticmethod
    def _forget(modules: nn.ModuleDict, adapter_name: str) -> None:
        """Drop what an earlier adapter of the same name has left where the new one has nothing."""
        if adapter_name in modules:
            del modules[adapter_name]

    def _settle(self, module: nn.Module) -> nn.Module:
        """Put a new adapter's module where the base layer is and into the base layer's mode.

        Without this, an adapter added to a model in eval mode would update its BatchNorm during inference.
        """
        weight = next(self.base_layer.parameters(), None)
        if weight is not None and not any(parameter.is_meta for parameter in module.parameters()):
            module.to(weight.device)
        return module.train(self.base_layer.training)


def _floating_tensors(module: nn.Module) -> list[Tensor]:
    """List the floating-point tensors of a module that are in a saved file."""
    return [tensor for tensor in module.state_dict().values() if tensor.is_floating_point()]


class PGNLayer(PGNTunerLayer, nn.Module):
    """The backbone's embeddings, with the prompts of the active adapters.

    Prompts in latent space are appended to the tokens. Prompts in pixel space are laid into the image, which the
    backbone's own embeddings then read: what a model behind an interface will do with the same image.

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
        self._any_size = takes_any_size(base_layer)
        self._base_loaded = False  # whether a state dict that is being loaded has tensors of the backbone
        self.register_load_state_dict_post_hook(_follow_the_backbone)
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

    @property
    def fixed_size(self) -> tuple[int, int] | None:
        """Height and width of the backbone's images in pixels; None where it takes any without being told."""
        return None if self._any_size else own_image_size(self.base_layer)

    def update_layer(self, adapter_name: str, config: PGNConfig) -> None:
        """Create the generator and the library of an adapter."""
        self.configs[adapter_name] = config
        self.layouts.pop(adapter_name, None)
        directions = None
        if config.prompt_space == "pixel":
            self.layouts[adapter_name] = make_layout(
                config.prompt_layout, (config.image_size,) * 2, config.patch_size, config.num_virtual_tokens
            )
            directions = PatchInverse(self.projection.weight).directions(config.image_std)
        library = make_library(config, self.hidden_size, self.num_channels, directions)
        self.pgn_library[adapter_name] = self._settle(library)
        generator = make_generator(config, self.num_channels)
        if generator is None:
            self._forget(self.pgn_generator, adapter_name)
        else:
            self.pgn_generator[adapter_name] = self._settle(generator)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._base_loaded = any(name.startswith(f"{prefix}base_layer.") for name in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def prompts(self, adapter_name: str, pixel_values: Tensor) -> Tensor:
        """Generate the prompts of one adapter for a batch of images.

        Args:
            adapter_name: a loaded adapter, active or not.
            pixel_values: (B, C, H, W), normalised as for the backbone.

        Returns:
            (B, P, D) prompts; for an adapter with prompts in several layers (B, depth * P, D), layer by layer; for one
            in pixel space (B, P, C, p, p) patches in [0, 1].
        """
        library = self.pgn_library[adapter_name]
        if adapter_name not in self.pgn_generator:
            return library.static_prompts(pixel_values.shape[0])
        return library(self.pgn_generator[adapter_name](pixel_values))

    def prompted_images(self, adapter_name: str, pixel_values: Tensor) -> Tensor:
        """Lay the prompts of an adapter in pixel space into a batch of images.

        Args:
            adapter_name: an adapter in pixel space.
            pixel_values: (B, C, H, W), normalised as for the backbone.

        Returns:
            (B, C, H', W') prompted images, normalised.
        """
        config, offset = self.configs[adapter_name], self.pgn_library[adapter_name].image_offset
        # In float32, whatever the backbone computes in: half precision does not hold 8 bits of a normalised pixel.
        pixels = denormalize(pixel_values.float(), config.image_mean, config.image_std)
        patches = self.prompts(adapter_name, pixel_values).float()
        prompted = compose(pixels, patches, self.layouts[adapter_name], offset)
        return normalize(prompted, config.image_mean, config.image_std).to(pixel_values.dtype)

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Make the tokens of the image and the prompts of the active adapters: (B, N + P, D).

        Tokens of adapters in latent space are appended in order; they are generated from the image without patches.
        One with prompts in several layers appends all of them, and each `PGNBlock` takes its layer's away. In a mixed
        batch each image has the adapter that `current_rows` names for it.
        """
        rows = current_rows()
        if rows:
            return map_rows(
                rows,
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
                kwargs = self._with_positions(name, kwargs)
        tokens = self.base_layer(images, *args, **kwargs)  # (B, N, D)
        # Appended after the position embeddings were added: a prompt has no place in the image.
        prompts = [self.prompts(name, pixel_values).to(tokens.dtype) for name in active if name not in self.layouts]
        return torch.cat([tokens, *prompts], dim=1) if prompts else tokens

    def _with_positions(self, adapter_name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Have the position embeddings interpolated where the prompted image is not of the backbone's own size."""
        if self.fixed_size in (None, self.layouts[adapter_name].size):
            return kwargs
        return kwargs | {"interpolate_pos_encoding": True}

    def token_counts(self, adapter_name: str, image_size: tuple[int, int]) -> tuple[int, ...]:
        """Return what decides how many tokens an image becomes: the size that is embedded, prompts, and their depth.

        Args:
            adapter_name: a loaded adapter, or "__base__".
            image_size: height and width of the image, in pixels.
        """
        size = self.layouts[adapter_name].size if adapter_name in self.layouts else image_size
        return (*size, *self._count_prompts(adapter_name))

    def running_prompts(self) -> tuple[int, int]:
        """Return the prompts P behind the tokens, and how many layers have their own, in the call that runs now."""
        rows = current_rows()
        if rows:
            return self._count_prompts(rows[0])  # alike in all rows: `token_counts`
        active = () if self.disable_adapters else self.active_adapters
        counts = [self._count_prompts(name) for name in active if name in self.configs]
        # One with prompts in several layers is active alone: `check_together`.
        return sum([number for number, _ in counts]), max([1, *(depth for _, depth in counts)])

    def _count_prompts(self, adapter_name: str) -> tuple[int, int]:
        if adapter_name == BASE or adapter_name in self.layouts:
            return 0, 1
        config = self.configs[adapter_name]
        return config.num_virtual_tokens, config.prompt_depth

    def check_inputs(
        self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Check what the backbone is called with, before it casts and embeds it; a forward pre-hook of the backbone.

        Checks shapes and dtypes only, so that the compiled graph stays whole; values are `ImageCollator`'s business.

        Returns:
            The arguments, without `interpolate_pos_encoding` for a backbone that does so by itself and has no such
            option, so that all backbones can be called alike.

        Raises:
            TypeError: `pixel_values` is not a floating-point tensor.
            ValueError: it has the wrong number of axes, channels or pixels; or `adapter_names` came past PEFT.
        """
        interpolate = kwargs.get("interpolate_pos_encoding")
        if self._any_size:
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


def _follow_the_backbone(layer: PGNLayer, incompatible_keys: Any) -> None:
    """Compute what adapters in pixel space derive from the backbone's weights, where others have been loaded."""
    if layer._base_loaded and layer.layouts and not layer.projection.weight.is_meta:
        inverse = PatchInverse(layer.projection.weight)
        for name in layer.layouts:
            layer.pgn_library[name].directions = inverse.directions(layer.configs[name].image_std)
