"""`PGNLayer` wraps a backbone's embeddings and adds the prompts; `PGNBlock` replaces them between encoder layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from pgn_peft.nn.generator import PromptGenerator
from pgn_peft.nn.images import PILLOW_MODES
from pgn_peft.nn.layout import PromptLayout
from pgn_peft.nn.library import AdditiveLibrary, TokenLibrary
from pgn_peft.nn.patch_inverse import PatchInverse
from pgn_peft.tuner.config import PGNConfig
from pgn_peft.tuner.embeddings import fixed_size, patch_projection, returns_grid, size_options, takes_size_option
from pgn_peft.tuner.mixed_batch import BASE, adapters_of_batch, map_by_adapter
from pgn_peft.tuner.prompts import LatentPrompts, PixelPrompts, make_generator, make_library
from pgn_peft.tuner.tuner_layer import PGNTunerLayer, floating_tensors
from pgn_peft.utils import not_none


class PromptedLayer(PGNTunerLayer):
    """A tuner layer that knows how many prompts the active adapters have."""

    other_param_names = ("configs",)
    configs: dict[str, PGNConfig]  # by adapter name; one dictionary for all layers of a model

    def running_prompts(self) -> tuple[int, int, bool]:
        """Return what `count_prompts` does for all active adapters together, in the current call."""
        names = adapters_of_batch()
        if names:
            return self.count_prompts(names[0])  # the same for all images of a pass
        active = () if self.disable_adapters else self.active_adapters
        counts = [self.count_prompts(name) for name in active if name in self.configs]
        if len(counts) == 1:
            return counts[0]
        return sum([number for number, *_ in counts]), 1, False  # none with prompts in several layers

    def count_prompts(self, adapter_name: str) -> tuple[int, int, bool]:
        """Return an adapter's number of latent prompts P, of layers with their own, and whether they accumulate."""
        if adapter_name == BASE or self.configs[adapter_name].prompt_space == "pixel":
            return 0, 1, False
        config = self.configs[adapter_name]
        return not_none(config.num_virtual_tokens), cast(int, config.prompt_depth), bool(config.accumulate_prompts)


class PGNLayer(PromptedLayer):
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

    def __init__(self, base_layer: nn.Module, carries: bool = False) -> None:
        super().__init__(base_layer)
        self.configs = {}
        self.carries = carries
        self.fixed_size = fixed_size(base_layer)  # height and width of its images, in pixels; None: any
        self.takes_size_option = takes_size_option(base_layer)  # interpolates positions if it is told to
        self.extends_positions = False  # whether attention gives every token a position
        self._hooks: list[RemovableHandle] = []
        self._unchecked: set[str] = set()  # loaded adapters whose tensors have not been checked yet
        self._base_loaded = False  # whether a state dict that is being loaded has tensors of the backbone
        self.register_load_state_dict_post_hook(_follow_the_backbone)

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
        directions = None
        if config.prompt_space == "pixel":
            directions = PatchInverse(self.projection.weight).directions(not_none(config.image_std))
        self.add_adapter_module("pgn_library", adapter_name, make_library(config, directions))
        self.add_adapter_module("pgn_generator", adapter_name, make_generator(config))

    def adapter(self, adapter_name: str) -> LatentPrompts | PixelPrompts:
        """Return the prompts of an adapter."""
        config, generator = self.configs[adapter_name], self.generator(adapter_name)
        library = self.library(adapter_name)
        if isinstance(library, AdditiveLibrary):
            return PixelPrompts(config, library, generator)
        return LatentPrompts(config, library, generator)

    def library(self, adapter_name: str) -> TokenLibrary | AdditiveLibrary:
        """Return the library of an adapter."""
        return cast("TokenLibrary | AdditiveLibrary", self.pgn_library[adapter_name])

    def generator(self, adapter_name: str) -> PromptGenerator | None:
        """Return the generator of an adapter; None for static prompts."""
        if adapter_name not in self.pgn_generator:
            return None
        return cast(PromptGenerator, self.pgn_generator[adapter_name])

    def layout(self, adapter_name: str, image_size: tuple[int, int]) -> PromptLayout:
        """Return the layout of an adapter in pixel space for images of some height and width, in pixels."""
        return cast(PixelPrompts, self.adapter(adapter_name)).layout(image_size)

    def prompts(self, adapter_name: str, pixel_values: Tensor) -> Tensor:
        """Generate the prompts of one adapter for a batch of images.

        Args:
            adapter_name: a loaded adapter, active or not.
            pixel_values: (B, C, H, W), normalised as for the backbone.

        Returns:
            (B, P, D) prompts; for an adapter with prompts in several layers (B, depth * P, D), layer by layer; for one
            in pixel space changes of patches (B, P, C, p, p).
        """
        return self.adapter(adapter_name).generate(pixel_values)

    def prompted_images(self, adapter_name: str, pixel_values: Tensor) -> Tensor:
        """Add the prompts of an adapter in pixel space to normalised images (B, C, H, W)."""
        return self.adapter(adapter_name).images(pixel_values)

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Compute the tokens of the images and the prompts of the active adapters: (B, N + P, D).

        Prompts in latent space are generated from the image and appended in order. An adapter with prompts in several
        layers appends all of them; each `PGNBlock` removes its layer's. In a mixed batch each image has the adapter
        that `adapters_of_batch` names for it.

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
            names = () if self.disable_adapters else tuple(self.active_adapters)
            active = [name for name in names if name in self.pgn_library]
            tokens, prompts = self._embed(active, pixel_values, *args, **kwargs)
        if self.carries:
            return (tokens, prompts, self.running_prompts()[0]) if prompts.shape[1] else tokens
        tokens = torch.cat([tokens, prompts], dim=1) if prompts.shape[1] else tokens
        if not returns_grid(self.base_layer):
            return tokens
        side = self.projection.kernel_size
        return tokens, (pixel_values.shape[-2] // side[0], pixel_values.shape[-1] // side[1])

    def _embed(self, names: list[str], pixel_values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Compute tokens (B, N, D) and the prompts (B, P, D) to append to them."""
        check_together(names, self.configs)
        adapters = [self.adapter(name) for name in names]
        images = pixel_values
        for adapter in adapters:
            images = adapter.images(images)
        tokens = self.base_layer(images, *args, **kwargs)
        if returns_grid(self.base_layer):
            tokens, _ = tokens
        # Appended after the position embeddings were added: a prompt has no position in the image.
        prompts = [
            adapter.generate(pixel_values).to(tokens.dtype)
            for adapter in adapters
            if isinstance(adapter, LatentPrompts)
        ]
        none = tokens.new_zeros(tokens.shape[0], 0, tokens.shape[-1])
        return tokens, torch.cat(prompts, dim=1) if prompts else none

    def size_options(self, size: tuple[int, int]) -> dict[str, bool]:
        """Return the options that the backbone must be called with for images of this height and width, in pixels."""
        return size_options(self.fixed_size, size)

    def add_hook(self, hook: RemovableHandle) -> None:
        """Remember a hook in the model, for `release`."""
        self._hooks.append(hook)

    def check_calls_of(self, backbone: nn.Module) -> None:
        """Run `check_inputs` before each forward pass of the backbone, until `release`."""
        self.add_hook(backbone.register_forward_pre_hook(self.check_inputs, with_kwargs=True))

    def extend_positions(self, module: nn.Module, extend: Callable[[Any, int], Any]) -> None:
        """Extend the positions that a module of the backbone computes by the prompts, until `release`."""
        self.extends_positions = True
        # No lambda: a copy of the model would follow the original's adapters, and could not be pickled.
        self.add_hook(module.register_forward_hook(partial(_extend, self, extend)))

    def release(self) -> None:
        """Remove all hooks from the model."""
        for hook in self._hooks:
            hook.remove()

    def expect_tensors(self, adapter_name: str) -> None:
        """Fill the new tensors of a saved adapter with NaN; the next forward pass checks that a file replaced them."""
        super().expect_tensors(adapter_name)
        self._unchecked.add(adapter_name)

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
            ValueError: `pixel_values` has the wrong number of axes, channels or pixels; `adapter_names` was passed to
                the model inside a `PeftModel`; or a loaded adapter lacks a tensor.
        """
        interpolate = kwargs.get("interpolate_pos_encoding") and self.takes_size_option
        if not self.takes_size_option:
            kwargs = {name: value for name, value in kwargs.items() if name != "interpolate_pos_encoding"}
        if self.disable_adapters:
            return args, kwargs
        if self._unchecked and not torch.compiler.is_compiling():
            self._check_loaded()
        if kwargs.get("adapter_names") is not None:
            raise ValueError(
                "`adapter_names` is an argument of PeftModel; the model inside would give every image the active "
                "adapter. Load the adapters with PeftModel.from_pretrained, and call that."
            )
        if self.carries and kwargs.get("output_hidden_states") and self.running_prompts()[0]:
            raise ValueError("With output_hidden_states=True timm would take prompts for patches. Leave it out.")
        pixel_values = args[0] if args else kwargs.get("pixel_values")
        check_pixel_values(pixel_values, self.num_channels, None if interpolate else self.fixed_size)
        return args, kwargs

    def _check_loaded(self) -> None:
        """Refuse adapters without some of their tensors, which Transformers' `load_adapter` only reports."""
        unchecked, self._unchecked = self._unchecked, set()
        for name in unchecked & self.configs.keys():
            for container, module in self.adapter_modules(name).items():
                if any(bool(tensor.isnan().any()) for tensor in floating_tensors(module) if not tensor.is_meta):
                    self._unchecked = unchecked
                    raise ValueError(
                        f"Adapter {name!r} was loaded from a file without all tensors of {container}. Save or fetch "
                        "the adapter again."
                    )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._base_loaded = any(name.startswith(f"{prefix}base_layer.") for name in state_dict)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class PGNBlock(PromptedLayer):
    """An encoder layer. If the active adapter is deep, the next layer's prompts replace its own, or are added to them.

    As the last layer of a backbone that reads all its tokens, it also removes the prompts, so that the classifier
    averages the image's own tokens only.

    It has no parameters and no state. `PGNLayer` appends the prompts of all layers to the tokens, so that gradient
    checkpointing, compiled graphs and threads always use the prompts of their own call:

        [tokens, this layer's prompts, the next layer's, ...] -> [new tokens, (new prompts +) the next layer's, ...]

    Args:
        base_layer: tokens (B, N, D) to tokens (B, N, D), or to a tuple that begins with them.
        embeddings: the layer that makes the prompts, whose adapters' configs are shared.
        index: of this layer, from 0.
        ends: prompts are removed after this layer.

    Source: Jia et al. 2022 (arXiv:2203.12119), VPT-deep: a layer's prompts are discarded after it.
    """

    def __init__(self, base_layer: nn.Module, embeddings: PGNLayer, index: int, ends: bool) -> None:
        super().__init__(base_layer)
        self.configs = embeddings.configs
        self.index = index
        self.ends = ends
        self._disable_adapters = embeddings.disable_adapters

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the layer on the image tokens and its own prompts, then add or put the next layer's in their place."""
        num_prompts, depth, accumulates = self.running_prompts()
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
        tokens, prompts = tokens.split([end - num_prompts, num_prompts], dim=1)
        if waiting:
            added, later = later.split([num_prompts, waiting - num_prompts], dim=1)
            tokens = torch.cat([tokens, prompts + added if accumulates else added, later], dim=1)
        return (tokens, *others) if isinstance(output, tuple) else tokens


def check_together(adapter_names: Sequence[str], configs: Mapping[str, PGNConfig]) -> None:
    """Refuse adapters that cannot be active at the same time.

    Raises:
        ValueError: more than one is in pixel space, or one of several has prompts in several layers.
    """
    active = [configs[name] for name in adapter_names]
    in_pixels = [config for config in active if config.prompt_space == "pixel"]
    if len(in_pixels) > 1 or (len(active) > 1 and any(config.prompt_depth != 1 for config in active)):
        raise ValueError(
            f"The adapters {', '.join(adapter_names)} cannot be active together: at most one can be in pixel space, "
            "and one with prompts in several layers must be active alone."
        )


def check_pixel_values(pixel_values: Any, num_channels: int, image_size: tuple[int, int] | None) -> None:
    """Check shape and dtype of a backbone's input.

    Args:
        pixel_values: must be (B, C, H, W), floating point.
        num_channels: channels C that the backbone takes.
        image_size: height and width that it takes, in pixels; None: any.

    Raises:
        TypeError: `pixel_values` is not a floating-point tensor.
        ValueError: `pixel_values` has the wrong number of axes, channels or pixels.
    """
    if not isinstance(pixel_values, Tensor) or not pixel_values.is_floating_point():
        found = pixel_values.dtype if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
        raise TypeError(
            f"`pixel_values` is of {found}, and must be a floating-point tensor of normalised images. Run the image "
            "processor first: processor(images=..., return_tensors='pt')."
        )
    shape = tuple(pixel_values.shape)
    if len(shape) != 4:
        raise ValueError(
            f"`pixel_values` has the shape {shape} instead of (B, C, H, W). Write pixel_values[None] for one image."
        )
    if shape[1] != num_channels:
        mode = PILLOW_MODES.get(num_channels, "...")
        raise ValueError(
            f"`pixel_values` has {shape[1]} channels (shape {shape}), and the model takes {num_channels}. Convert the "
            f"images, e.g. image.convert({mode!r})."
        )
    if image_size is not None and shape[2:] != image_size:
        raise ValueError(
            f"`pixel_values` measures {shape[2]} x {shape[3]} pixels, and the model takes {image_size[0]} x "
            f"{image_size[1]}. Resize the images, or pass interpolate_pos_encoding=True where the model has it."
        )


def _cut_mask(value: Any, end: int) -> Any:
    """Cut an attention mask for the prompts of all layers to one layer's tokens; return other values unchanged."""
    return value[..., :end, :end] if isinstance(value, Tensor) and value.ndim == 4 else value


def _extend(
    layer: PGNLayer, extend: Callable[[Any, int], Any], module: nn.Module, inputs: tuple[Any, ...], positions: Any
) -> Any:
    return extend(positions, layer.running_prompts()[0])


def _follow_the_backbone(layer: PGNLayer, incompatible_keys: Any) -> None:
    """Compute what adapters in pixel space derive from the backbone's weights, where others have been loaded."""
    in_pixels = [name for name, config in layer.configs.items() if config.prompt_space == "pixel"]
    if layer._base_loaded and in_pixels and not layer.projection.weight.is_meta:
        with torch.inference_mode(False):  # a tensor made in inference mode could not be trained with afterwards
            inverse = PatchInverse(layer.projection.weight)
            for name in in_pixels:
                layer.library(name).directions = inverse.directions(not_none(layer.configs[name].image_std))
