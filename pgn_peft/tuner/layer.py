"""`PGNLayer`: wraps a backbone's embeddings and adds prompts, to their tokens or to the image."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pgn_peft.nn.generator import PromptGenerator
from pgn_peft.nn.jpeg import through_jpeg
from pgn_peft.nn.layout import PromptLayout, compose, make_layout
from pgn_peft.nn.library import AdditiveLibrary, PatchLibrary, TokenLibrary
from pgn_peft.nn.patch_inverse import PatchInverse
from pgn_peft.nn.preprocessing import denormalize, normalize
from pgn_peft.tuner.batch_adapters import BASE, adapters_of_batch, map_by_adapter
from pgn_peft.tuner.build import make_generator, make_library
from pgn_peft.tuner.checks import check_pixel_values, check_together
from pgn_peft.tuner.config import PGNConfig
from pgn_peft.tuner.embeddings import fixed_size, patch_projection, returns_grid, size_options, takes_size_option
from pgn_peft.tuner.offloading import loaded
from pgn_peft.tuner.tuner_layer import PGNTunerLayer
from pgn_peft.utils.values import filled


class PGNLayer(PGNTunerLayer):
    """The backbone's embeddings, with the prompts of the active adapters.

    Prompts in latent space are appended to the tokens. Prompts in pixel space become part of the image, which the
    backbone's own embeddings then read, as a hosted model does.

    Args:
        base_layer: the embeddings: pixels (B, C, H, W) to tokens (B, N, D), position embeddings included; or to a
            tuple that begins with them.
        carries: the positions come later: answer with tokens, prompts and their number for `append_prompts`.

    Source: arXiv:2210.06466: prompts are appended after the CLS and patch tokens.
    """

    adapter_layer_names = ("pgn_generator", "pgn_library")
    other_param_names = ("configs", "layouts")

    def __init__(self, base_layer: nn.Module, carries: bool = False) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.carries = carries
        self.pgn_generator = nn.ModuleDict()
        self.pgn_library = nn.ModuleDict()
        self.configs: dict[str, PGNConfig] = {}
        self.layouts: dict[str, PromptLayout] = {}  # of adapters in pixel space
        self.merged_adapters: list[str] = []
        self._active_adapter: list[str] = []
        self.fixed_size = fixed_size(base_layer)  # height and width of its images, in pixels; None: any
        self.takes_size_option = takes_size_option(base_layer)  # interpolates positions if it is told to
        self._hooks: list[RemovableHandle] = []
        self.extends_positions = False  # whether attention gives every token a position
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

    def library(self, adapter_name: str) -> TokenLibrary | PatchLibrary | AdditiveLibrary:
        """Return the library of an adapter."""
        return cast("TokenLibrary | PatchLibrary | AdditiveLibrary", self.pgn_library[adapter_name])

    def layout(self, adapter_name: str, image_size: tuple[int, int]) -> PromptLayout:
        """Return the layout of an adapter in pixel space for images of some height and width, in pixels.

        The "dense" layout follows the image; others are fixed.
        """
        layout = self.layouts[adapter_name]
        if layout.name == "dense":
            return make_layout("dense", image_size, layout.patch_size)
        return layout

    def generator(self, adapter_name: str) -> PromptGenerator | None:
        """Return the generator of an adapter; None for static prompts."""
        if adapter_name not in self.pgn_generator:
            return None
        return cast(PromptGenerator, self.pgn_generator[adapter_name])

    def train(self, mode: bool = True) -> Self:
        """Set the mode. A model in use is loaded already: its adapters' files may change from now on."""
        for config in self.configs.values():
            config.weights_file = None
        return super().train(mode)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._base_loaded = any(name.startswith(f"{prefix}base_layer.") for name in state_dict)
        for name, config in self.configs.items():
            if any(key.startswith(f"{prefix}pgn_library.{name}.") for key in state_dict):
                config.check_weights_file()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def prompts(self, adapter_name: str, pixel_values: Tensor) -> Tensor:
        """Generate the prompts of one adapter for a batch of images.

        Args:
            adapter_name: a loaded adapter, active or not.
            pixel_values: (B, C, H, W), normalised as for the backbone.

        Returns:
            (B, P, D) prompts; for an adapter with prompts in several layers (B, depth * P, D), layer by layer; for one
            in pixel space (B, P, C, p, p) patches in [0, 1], or changes of patches in the "dense" layout.
        """
        library, generator = self.library(adapter_name), self.generator(adapter_name)
        if generator is not None:
            coefficients = generator(pixel_values)
            share = filled(self.configs[adapter_name].prompt_dropout)
            if self.training and share > 0:
                dropped = torch.rand(len(coefficients), 1, 1, device=coefficients.device) < share
                coefficients = torch.where(dropped, coefficients.mean(dim=0, keepdim=True), coefficients)
            return library(coefficients)
        prompts = library.static_prompts(pixel_values.shape[0])
        if isinstance(library, AdditiveLibrary):  # one for all patches
            layout = self.layout(adapter_name, (pixel_values.shape[-2], pixel_values.shape[-1]))
            return prompts.expand(-1, layout.num_virtual_tokens, -1, -1, -1)
        return prompts

    def prompted_images(self, adapter_name: str, pixel_values: Tensor) -> Tensor:
        """Add the prompts of an adapter in pixel space to a batch of images.

        Args:
            adapter_name: an adapter in pixel space.
            pixel_values: (B, C, H, W), normalised as for the backbone.

        Returns:
            (B, C, H', W') prompted images, normalised.
        """
        config, library = self.configs[adapter_name], self.library(adapter_name)
        layout = self.layout(adapter_name, (pixel_values.shape[-2], pixel_values.shape[-1]))
        mean, std = filled(config.image_mean), filled(config.image_std)
        # Always in float32: half precision does not hold 8 bits of a normalised pixel.
        pixels = denormalize(pixel_values.float(), mean, std)
        patches = self.prompts(adapter_name, pixel_values).float()
        prompted = compose(pixels, patches, layout, cast(PatchLibrary, library).image_offset)
        if self.training and config.jpeg_quality is not None:
            # Half of the images: prompts that only saw JPEG are 8 points worse without it.
            encoded = torch.rand(len(prompted), 1, 1, 1, device=prompted.device) < 0.5
            prompted = torch.where(encoded, through_jpeg(prompted, config.jpeg_quality), prompted)
        return normalize(prompted, mean, std).to(pixel_values.dtype)

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute the tokens of the images and the prompts of the active adapters: (B, N + P, D).

        Prompts in latent space are generated from the image without patches and appended in order. An adapter with
        prompts in several layers appends all of them; each `PGNBlock` removes its layer's. In a mixed batch each image
        has the adapter that `adapters_of_batch` names for it.

        Returns:
            What the base layer does, with the prompts; where it `carries`, tokens (B, ...), prompts (B, P, D) and P.
        """
        names = adapters_of_batch()
        if names:
            tokens, prompts = map_by_adapter(
                names,
                pixel_values,
                lambda name, images: self._embed([] if name == BASE else [name], images, *args, **kwargs),
            )
        else:
            active = (
                [] if self.disable_adapters else [name for name in self.active_adapters if name in self.pgn_library]
            )
            tokens, prompts = self._embed(active, pixel_values, *args, **kwargs)
        if self.carries:
            return (tokens, prompts, self.running_prompts()[0]) if prompts.shape[1] else tokens
        tokens = torch.cat([tokens, prompts], dim=1) if prompts.shape[1] else tokens
        if not returns_grid(self.base_layer):
            return tokens
        side = self.projection.kernel_size
        return tokens, (pixel_values.shape[-2] // side[0], pixel_values.shape[-1] // side[1])

    def _embed(self, active: list[str], pixel_values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Compute tokens (B, N, D) and the prompts (B, P, D) to append to them."""
        check_together(active, self.configs)
        images = pixel_values
        for name in active:
            if name in self.layouts:  # one at most: PGNModel.set_adapter
                images = self.prompted_images(name, pixel_values)
                kwargs = kwargs | self.size_options((images.shape[-2], images.shape[-1]))
        tokens = self.base_layer(images, *args, **kwargs)
        if returns_grid(self.base_layer):
            tokens, _ = tokens
        # Appended after the position embeddings were added: a prompt has no position in the image.
        prompts = [self.prompts(name, pixel_values).to(tokens.dtype) for name in active if name not in self.layouts]
        none = tokens.new_zeros(tokens.shape[0], 0, tokens.shape[-1])
        return tokens, torch.cat(prompts, dim=1) if prompts else none

    def size_options(self, size: tuple[int, int]) -> dict[str, bool]:
        """Return the options that the backbone must be called with for images of this height and width, in pixels."""
        return size_options(self.fixed_size, size)

    def token_counts(self, adapter_name: str, image_size: tuple[int, int]) -> tuple[int, ...]:
        """Return what determines an image's number of tokens: the embedded size, number of prompts, and depth.

        Args:
            adapter_name: a loaded adapter, or "__base__".
            image_size: height and width of the image, in pixels.
        """
        size = self.layout(adapter_name, image_size).size if adapter_name in self.layouts else image_size
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
        self._hooks.append(backbone.register_forward_pre_hook(self.check_inputs, with_kwargs=True))

    def extend_positions(self, module: nn.Module, extend: Callable[[Any, int], Any]) -> None:
        """Extend the positions that a module of the backbone computes by the prompts, until `release`."""
        self.extends_positions = True
        # No lambda: a copy of the model would follow the original's adapters, and could not be pickled.
        self._hooks.append(module.register_forward_hook(partial(_extend, self, extend)))

    def release(self) -> None:
        """Remove the hooks of `check_calls_of` and `extend_positions`."""
        for hook in self._hooks:
            hook.remove()

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
        interpolate = kwargs.get("interpolate_pos_encoding") and self.takes_size_option
        if not self.takes_size_option:
            kwargs = {name: value for name, value in kwargs.items() if name != "interpolate_pos_encoding"}
        if self.disable_adapters:
            return args, kwargs
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                f"`adapter_names` must be passed to a PeftModel, but got {kwargs['adapter_names']!r} at the model "
                "inside, which would give every image the active adapter. Load it with PeftModel.from_pretrained."
            )
        if self.carries and kwargs.get("output_hidden_states") and self.running_prompts()[0]:
            raise ValueError(
                "`output_hidden_states` must be False for a model of timm with prompts, but got True: timm would take "
                "them for patches of its feature maps. Leave it out."
            )
        pixel_values = args[0] if args else kwargs.get("pixel_values")
        size = None if interpolate else self.fixed_size
        check_pixel_values(pixel_values, self.num_channels, size, self.takes_size_option)
        return args, kwargs


def _extend(
    layer: PGNLayer, extend: Callable[[Any, int], Any], module: nn.Module, inputs: tuple[Any, ...], positions: Any
) -> Any:
    return extend(positions, layer.running_prompts()[0])


def _follow_the_backbone(layer: PGNLayer, incompatible_keys: Any) -> None:
    """Compute what adapters in pixel space derive from the backbone's weights, where others have been loaded."""
    if layer._base_loaded and layer.layouts and not layer.projection.weight.is_meta:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be trained with afterwards
            inverse = PatchInverse(layer.projection.weight)
            for name in layer.layouts:
                layer.pgn_library[name].directions = inverse.directions(filled(layer.configs[name].image_std))
