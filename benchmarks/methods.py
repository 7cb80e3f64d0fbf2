"""The methods that `adaptation.py` compares, each as a model and its trained parameters.

Every model takes pixels (B, C, H, W) in [0, 1] and returns logits. All start from the same frozen backbone and a new
linear head, trained at the same rate for all; the searched learning rate is that of the other parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from bench import DEVICE, Material
from peft import LNTuningConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from pgn_peft import PGNConfig
from pgn_peft.nn.generator import PromptGenerator, resize_shorter_side
from pgn_peft.nn.layout import to_levels
from pgn_peft.nn.preprocessing import normalize
from pgn_peft.training import parameter_groups, start_library_from_images
from pgn_peft.tuner.backbones import find_backbone, find_layers

HEAD_RATE = 3e-3
# Fields of PGN's config in all runs, unless a run sets them.
PGN_FIELDS = {"library_size": 64, "slot_prompts": True, "initial_logit_std": 4.0}
LEAN_FIELDS = {"generator_width": 4, "generator_rank": 8, "library_size": 32}
# Learning rate of the library and the slots' prompts, as a multiple of the generator's.
LIBRARY_RATE = 10.0
Groups = list[dict[str, Any]]
Built = tuple[nn.Module, Groups]


@dataclass(frozen=True)
class Options:
    """What the methods have in common.

    Args:
        rate: the learning rate that is searched.
        num_virtual_tokens: prompts per image, P, of all methods with prompts.
        generator_image_size: side of what the generator sees, in pixels.
        config: further fields of `PGNConfig`.
        library_rate: learning rate of the library, as a multiple of the generator's.
    """

    rate: float
    num_virtual_tokens: int
    generator_image_size: int | None
    config: dict[str, Any]
    library_rate: float = LIBRARY_RATE


class Adapted(nn.Module):
    """A model, adapted or not, from pixels in [0, 1] to logits."""

    def __init__(self, model: nn.Module, material: Material) -> None:
        super().__init__()
        self.model, self.scale = model, material.scale

    def forward(self, pixels: Tensor) -> Tensor:
        """Answer pixels in [0, 1] with logits."""
        return self.model(pixel_values=normalize(pixels, *self.scale)).logits


def new_head(backbone: PreTrainedModel, num_labels: int) -> None:
    """Freeze a backbone and give it a new linear head, started as Transformers starts one."""
    backbone.requires_grad_(False)
    backbone.classifier = nn.Linear(backbone.classifier.in_features, num_labels).to(DEVICE)
    nn.init.normal_(backbone.classifier.weight, std=0.02)
    nn.init.zeros_(backbone.classifier.bias)


def with_head(backbone: PreTrainedModel, others: list[nn.Parameter], options: Options) -> Groups:
    """Return the searched parameters at the searched rate, and the head at its own."""
    return [
        {"params": others, "lr": options.rate},
        {"params": list(backbone.classifier.parameters()), "lr": HEAD_RATE},
    ]


def frozen(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
    """Train nothing: the limit of inference."""
    return Adapted(backbone.requires_grad_(False), material), []


def linear(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
    """Train the head alone, without keeping the frozen features."""
    new_head(backbone, len(material.names))
    return Adapted(backbone, material), [{"params": list(backbone.classifier.parameters()), "lr": HEAD_RATE}]


def full(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
    """Fine-tune everything."""
    new_head(backbone, len(material.names))
    body = backbone.base_model.requires_grad_(True)
    return Adapted(backbone, material), with_head(backbone, list(body.parameters()), options)


class VPTDeep(nn.Module):
    """Learned prompts before every layer, those of the layer before thrown away (VPT-deep, Jia et al. 2022)."""

    def __init__(self, backbone: PreTrainedModel, num_virtual_tokens: int) -> None:
        super().__init__()
        self.backbone, self.num_virtual_tokens = backbone, num_virtual_tokens
        layers = [backbone.get_submodule(name) for name in find_layers(backbone, find_backbone(backbone).embeddings)]
        self.prompts = nn.Parameter(torch.empty(len(layers), num_virtual_tokens, backbone.config.hidden_size))
        nn.init.normal_(self.prompts, std=0.02)
        self.hooks = [layer.register_forward_pre_hook(self._append(index)) for index, layer in enumerate(layers)]
        # What reads the tokens may average all of them.
        self.hooks.append(
            layers[-1].register_forward_hook(lambda layer, inputs, tokens: tokens[:, :-num_virtual_tokens])
        )

    def _append(self, index: int) -> Callable[[nn.Module, tuple], tuple]:
        def hook(layer: nn.Module, inputs: tuple) -> tuple:
            tokens = inputs[0] if index == 0 else inputs[0][:, : -self.num_virtual_tokens]  # (B, N, D)
            return (torch.cat([tokens, self.prompts_of(index, tokens).to(tokens.dtype)], dim=1), *inputs[1:])

        return hook

    def prompts_of(self, index: int, tokens: Tensor) -> Tensor:
        """Return the prompts (B, P, D) of a layer, which is given tokens (B, N, D)."""
        return self.prompts[index].expand(len(tokens), -1, -1)

    def forward(self, pixel_values: Tensor) -> Any:
        """Answer normalised pixels with the backbone's outputs."""
        return self.backbone(pixel_values=pixel_values)


def vpt_deep(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
    """Learn prompts for every layer, the same for all images."""
    new_head(backbone, len(material.names))
    model = VPTDeep(backbone, options.num_virtual_tokens).to(DEVICE)
    return Adapted(model, material), with_head(backbone, [model.prompts], options)


def lora(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
    """Learn low-rank changes of all query and value projections, through PEFT."""
    new_head(backbone, len(material.names))
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(backbone, config)
    matrices = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    backbone.classifier.requires_grad_(True)
    return Adapted(model, material), with_head(backbone, matrices, options)


def layer_norm(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
    """Tune the scales and shifts of all layers' normalisation, through PEFT."""
    new_head(backbone, len(material.names))
    names = [name for name, module in backbone.named_modules() if isinstance(module, nn.LayerNorm)]
    model = get_peft_model(backbone, LNTuningConfig(target_modules=names))
    tuned = [parameter for name, parameter in model.named_parameters() if "ln_tuning_layers" in name]
    backbone.classifier.requires_grad_(True)
    return Adapted(model, material), with_head(backbone, tuned, options)


class Border(nn.Module):
    """Visual prompting: a learned border, added to the image as valid 8-bit pixels (Bahng et al. 2022)."""

    def __init__(self, model: nn.Module, side: int) -> None:
        super().__init__()
        self.model = model
        width = round(side * 30 / 224)
        self.border = nn.Parameter(torch.zeros(1, 3, side, side))
        mask = torch.ones(1, 1, side, side)
        mask[..., width:-width, width:-width] = 0
        self.register_buffer("mask", mask)

    def prompted(self, pixels: Tensor) -> Tensor:
        """Add the border to pixels (B, 3, H, W) in [0, 1]."""
        return to_levels(pixels + self.border * self.mask)

    def forward(self, pixels: Tensor) -> Tensor:
        """Answer pixels in [0, 1] with logits."""
        return self.model(self.prompted(pixels))


def border(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
    """Learn a border of pixels, 30 wide at 224 px."""
    new_head(backbone, len(material.names))
    model = Border(Adapted(backbone, material), material.splits["train"].pixels.shape[-1]).to(DEVICE)
    return model, with_head(backbone, [model.border], options)


class GeneratorAlone(nn.Module):
    """The generator's CNN with a linear head on the images, and no Vision Transformer."""

    def __init__(self, material: Material, options: Options) -> None:
        super().__init__()
        self.scale, self.image_size = material.scale, options.generator_image_size
        self.trunk = PromptGenerator(1, 1).trunk
        self.classifier = nn.Linear(self.trunk.num_features, len(material.names))

    def forward(self, pixels: Tensor) -> Tensor:
        """Answer pixels in [0, 1] with logits."""
        pixel_values = normalize(pixels, *self.scale)
        if self.image_size is not None:
            pixel_values = resize_shorter_side(pixel_values, self.image_size)
        _, features = self.trunk(pixel_values)
        return self.classifier(features)


def generator_alone(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
    """Train the generator's CNN as a classifier of its own. All of it learns at the searched rate."""
    model = GeneratorAlone(material, options).to(DEVICE)
    return model, [{"params": list(model.parameters()), "lr": options.rate}]


def pgn(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
    """Generate prompts for each image."""
    fields = PGN_FIELDS | {
        "num_virtual_tokens": options.num_virtual_tokens,
        "generator_image_size": options.generator_image_size,
        "id2label": dict(enumerate(material.names)),
    }
    model = get_peft_model(backbone, PGNConfig(**(fields | options.config)))
    groups = parameter_groups(
        model, options.rate, library_learning_rate=options.rate * options.library_rate, head_learning_rate=HEAD_RATE
    )
    return Adapted(model, material), groups


def _changed(options: Options, **fields: Any) -> Options:
    """Return options with some fields of the adapter's config set."""
    return replace(options, config=options.config | fields)


def static(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
    """Learn the same prompts for all images: VPT-shallow."""
    alike = replace(options, library_rate=1.0)
    return pgn(backbone, material, _changed(alike, generator="static", slot_prompts=False))


def pgn_lean(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
    """Generate prompts with as few parameters as it takes: a quarter of the width, a factorised head."""
    return pgn(backbone, material, _changed(options, **LEAN_FIELDS))


def pgn_deep(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
    """Generate prompts for every layer; a library and static prompts for each learn at the generator's rate."""
    return pgn(backbone, material, _changed(replace(options, library_rate=1.0), prompt_depth=None))


def pgn_dense(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
    """Generate a change of each patch of the image."""
    mean, std = map(list, material.scale)
    dense = {"prompt_space": "pixel", "prompt_layout": "dense", "num_virtual_tokens": None, "slot_prompts": False}
    return pgn(backbone, material, _changed(options, **dense, image_mean=mean, image_std=std))


def pgn_pixel(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
    """Generate prompts that are valid pixels: one ring of patches around the image, which is shrunk."""
    mean, std = map(list, material.scale)
    canvas = {"prompt_space": "pixel", "prompt_layout": "canvas", "num_virtual_tokens": None}
    changed = _changed(options, **canvas, image_mean=mean, image_std=std, slot_prompts=False)
    adapted, _ = pgn(backbone, material, changed)
    start_library_from_images(adapted.model, material.normalized(material.splits["train"].pixels[:500]))
    # The searched rate is that of the pixels: a generator and a head learn at a rate of their own beside them.
    groups = parameter_groups(
        adapted.model, HEAD_RATE, library_learning_rate=options.rate, head_learning_rate=HEAD_RATE
    )
    return adapted, groups
