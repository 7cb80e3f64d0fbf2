"""The methods that are compared on latent tokens or weights, each as a model and its trained parameters.

Every model takes pixels (B, C, H, W) in [0, 1] and returns logits. All start from the same frozen backbone and a new
linear head, trained at the same rate for all; the searched learning rate is that of the other parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from bench import DEVICE, Material
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from pgn_peft import PGNConfig
from pgn_peft.nn.preprocessing import normalize
from pgn_peft.training import parameter_groups

HEAD_RATE = 3e-3
# Fields of PGN's config in all runs, unless a run sets them.
PGN_FIELDS = {"library_size": 64, "static_prompts": True, "mixing_init_std": 4.0}
LEAN_FIELDS = {"generator_width": 4, "generator_rank": 8, "library_size": 32}
# Learning rate of the library and the static prompts, as a multiple of the generator's.
LIBRARY_RATE = 10.0
Groups = list[dict[str, Any]]
Built = tuple[nn.Module, Groups]


@dataclass(frozen=True)
class Options:
    """What the methods have in common.

    Args:
        rate: the learning rate that is searched.
        num_virtual_tokens: prompts per image, P, of all methods with prompts.
        generator_image_size: side of what the generator sees, in pixels; None: of the image.
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
    """Train nothing: the lower bound of inference."""
    return Adapted(backbone.requires_grad_(False), material), []


def linear(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
    """Train the head alone."""
    new_head(backbone, len(material.names))
    return Adapted(backbone, material), [{"params": list(backbone.classifier.parameters()), "lr": HEAD_RATE}]


def full(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
    """Fine-tune everything."""
    new_head(backbone, len(material.names))
    body = backbone.base_model.requires_grad_(True)
    return Adapted(backbone, material), with_head(backbone, list(body.parameters()), options)


class VPTDeep(nn.Module):
    """Learned prompts before every layer, in place of those of the layer before (VPT-deep, Jia et al. 2022).

    Written without the package, so that it can be compared with `generator="static", prompt_depth="all"` and
    `accumulate_prompts=False`.
    """

    def __init__(self, backbone: PreTrainedModel, num_virtual_tokens: int) -> None:
        super().__init__()
        self.backbone, self.num_virtual_tokens = backbone, num_virtual_tokens
        lists = [module for module in backbone.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
        layers = list(max(lists, key=len))
        self.prompts = nn.Parameter(torch.empty(len(layers), num_virtual_tokens, backbone.config.hidden_size))
        nn.init.normal_(self.prompts, std=0.02)
        for index, layer in enumerate(layers):
            layer.register_forward_pre_hook(self._append(index))
        # The head may average all tokens.
        layers[-1].register_forward_hook(lambda layer, inputs, tokens: tokens[:, :-num_virtual_tokens])

    def _append(self, index: int) -> Callable[[nn.Module, tuple], tuple]:
        def hook(layer: nn.Module, inputs: tuple) -> tuple:
            tokens = inputs[0] if index == 0 else inputs[0][:, : -self.num_virtual_tokens]  # (B, N, D)
            prompts = self.prompts[index].expand(len(tokens), -1, -1).to(tokens.dtype)  # (B, P, D)
            return (torch.cat([tokens, prompts], dim=1), *inputs[1:])

        return hook

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
    model = get_peft_model(backbone, LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
    matrices = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    backbone.classifier.requires_grad_(True)
    return Adapted(model, material), with_head(backbone, matrices, options)


def pgn(backbone: PreTrainedModel, material: Material, options: Options, **config: Any) -> Built:
    """Generate prompts for each image; `config` are fields of `PGNConfig`, which those of the options override."""
    fields = PGN_FIELDS | {
        "num_virtual_tokens": options.num_virtual_tokens,
        "prompt_depth": 1,
        "generator_image_size": options.generator_image_size,
        "id2label": dict(enumerate(material.names)),
    }
    model = get_peft_model(backbone, PGNConfig(**(fields | config | options.config)))
    groups = parameter_groups(
        model, options.rate, library_learning_rate=options.rate * options.library_rate, head_learning_rate=HEAD_RATE
    )
    return Adapted(model, material), groups


def static(backbone: PreTrainedModel, material: Material, options: Options, **config: Any) -> Built:
    """Learn the same prompts for all images: VPT-shallow."""
    alike = replace(options, library_rate=1.0)
    return pgn(backbone, material, alike, generator="static", static_prompts=False, **config)


def static_sum(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
    """Learn the same prompts for all images and every layer, each added to those of the layer before."""
    return static(backbone, material, options, prompt_depth="all")


def pgn_lean(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
    """Generate prompts with few parameters: a quarter of the width, a factorised head."""
    return pgn(backbone, material, options, **LEAN_FIELDS)


def pgn_deep(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
    """Generate prompts for every layer, from random ones. Their libraries learn at the rate of the generator."""
    return pgn(backbone, material, replace(options, library_rate=1.0), prompt_depth="all", accumulate_prompts=False)


def pgn_sum(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
    """Generate prompts for every layer, each added to those of the layer before."""
    return pgn(backbone, material, replace(options, library_rate=3.0), prompt_depth="all")


def pgn_pixel(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
    """Generate a change of each patch of the image."""
    mean, std = map(list, material.scale)
    pixel = {"prompt_space": "pixel", "num_virtual_tokens": None, "static_prompts": False}
    return pgn(backbone, material, options, **pixel, image_mean=mean, image_std=std)


# name -> how it is built, and two learning rates to choose from: those between which it was best in trials on
# validation. Full fine-tuning and the head alone are the baselines.
METHODS: dict[str, tuple[Callable[..., Built], tuple[float, ...]]] = {
    "head": (linear, (HEAD_RATE,)),
    "static": (static, (3e-3, 1e-2)),
    "static-sum": (static_sum, (3e-3, 1e-2)),
    "pgn": (pgn, (1e-3, 3e-3)),
    "pgn-lean": (pgn_lean, (1e-3, 3e-3)),
    "vpt-deep": (vpt_deep, (3e-4, 1e-3)),
    "pgn-deep": (pgn_deep, (3e-4, 1e-3)),
    "pgn-sum": (pgn_sum, (1e-3, 3e-3)),
    "lora": (lora, (1e-3, 3e-3)),
    "full": (full, (1e-4, 3e-4)),
}

# What time and memory are measured of: how it is built, and the side of what the generator sees (None: the image's).
MEASURED: dict[str, tuple[Callable[..., Built], int | None]] = {
    "frozen": (frozen, None),
    "linear": (linear, None),
    "static": (static, None),
    "pgn": (pgn, None),
    "pgn, 64 px": (pgn, 64),
    "pgn-dense": (pgn_pixel, 64),
    "vpt-deep": (vpt_deep, None),
    "pgn-sum": (pgn_sum, 64),
    "lora": (lora, None),
    "full": (full, None),
}


def build_measured(
    name: str, backbone: PreTrainedModel, material: Material, num_virtual_tokens: int, config: dict[str, Any]
) -> Built:
    """Build one of `MEASURED`; `config` are further fields of `PGNConfig`."""
    build, generator_image_size = MEASURED[name]
    return build(backbone, material, Options(1e-3, num_virtual_tokens, generator_image_size, config))
