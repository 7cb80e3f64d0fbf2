"""What the field found since the paper, tried on validation as small changes of PGN in every layer.

    python benchmarks/generator_trials.py --protocol few --shots 8 --model path/to/deit-tiny-patch16-224 \
        --data path/to/eurosat counting --seeds 0 --methods vapt fourier averaged slow distilled

Takes the arguments of `adaptation.py`, and never looks at the test split. `--smoke`: a tiny model, in seconds.

- `vapt`: prompts from the patch tokens of each layer, by a convolution shared by all channels, weights of the places
  and a bottleneck shared by all layers, added to static prompts (VAPT, ICLR 2026).
- `embedded`: the same from the patch embeddings alone, with a library for each layer.
- `fourier`: half of the library and of the static prompts are in Fourier form (VFPT, Zeng et al. 2024).
- `averaged`: the prediction of an exponential moving average of the weights.
- `distilled`: the generator's CNN has first learned the frozen backbone's features of images without labels, at most
  1,000; `-few`: of the labelled ones only; `-first`: for prompts of the first layer.
- `slow`: the library learns at a tenth of the static prompts' rate.
- `small`: a library of eight that starts at zero, mixed by softmax or sigmoid.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

import adaptation
import report
import torch
from bench import DEVICE, Material
from methods import Adapted, Built, Options, VPTDeep, new_head, pgn, pgn_deep, with_head
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import PreTrainedModel

from pgn_peft.nn.generator import resize_shorter_side
from pgn_peft.tuner.adapters import prompt_layer

Method = Callable[[PreTrainedModel, Material, Options], Built]
DECAY = 0.95
DISTILLATION_STEPS, DISTILLATION_BATCH, DISTILLATION_RATE = 400, 50, 3e-3


class VAPT(VPTDeep):
    """Prompts that every layer computes from its own patch tokens.

    Args:
        backbone: the frozen model.
        num_virtual_tokens: prompts P of each layer.
        num_patches: patch tokens N', of a square image.
        rank: length R of the bottleneck.
        embedded: compute them from the first layer's tokens only, with a library for each layer.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        num_virtual_tokens: int,
        num_patches: int,
        rank: int = 8,
        embedded: bool = False,
    ) -> None:
        super().__init__(backbone, num_virtual_tokens)
        self.embedded = embedded
        layers, _, hidden_size = self.prompts.shape
        self.kernels = nn.Parameter(torch.zeros(layers, 1, 1, 3, 3))
        with torch.no_grad():
            self.kernels[..., 1, 1] = 1.0
        self.places = nn.Parameter(torch.empty(layers, num_virtual_tokens, num_patches).normal_(std=0.02))
        self.down = nn.Linear(hidden_size, rank)
        self.library = nn.Parameter(torch.zeros(layers if embedded else 1, rank, hidden_size))

    def prompts_of(self, index: int, tokens: Tensor) -> Tensor:
        """Return the prompts (B, P, D) of a layer, which is given tokens (B, N, D)."""
        if index == 0 or not self.embedded:
            self.coefficients = self.mix(tokens[:, 1:], index)
        return self.prompts[index] + self.coefficients @ self.library[index if self.embedded else 0]

    def mix(self, patches: Tensor, index: int) -> Tensor:
        """Compute the coefficients (B, P, R) of a layer from its patch tokens (B, N', D)."""
        patches = F.layer_norm(patches, patches.shape[-1:])
        side = round(patches.shape[1] ** 0.5)
        grid = patches.mT.reshape(-1, 1, side, side)  # (B * D, 1, h, w)
        mixed = F.conv2d(grid, self.kernels[index], padding=1).view(*patches.mT.shape).mT  # (B, N', D)
        return F.relu(self.down(self.places[index] @ mixed))


def vapt(embedded: bool) -> Method:
    """Learn prompts for every layer, and their change with the image."""

    def build(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
        new_head(backbone, len(material.names))
        side = material.splits["train"].pixels.shape[-1] // backbone.config.patch_size
        model = VAPT(backbone, options.num_virtual_tokens, side**2, embedded=embedded).to(DEVICE)
        head = {id(parameter) for parameter in backbone.classifier.parameters()}
        own = [each for each in model.parameters() if each.requires_grad and id(each) not in head]
        return Adapted(model, material), with_head(backbone, own, options)

    return build


class FourierHalf(nn.Module):
    """The real part of the two-dimensional transform of the first half of some vectors (..., L, D); the rest as is."""

    def forward(self, vectors: Tensor) -> Tensor:
        """Transform (..., L, D)."""
        half = vectors.shape[-2] // 2
        transformed = torch.fft.fft2(vectors[..., :half, :], norm="ortho").real
        return torch.cat([transformed, vectors[..., half:, :]], dim=-2)


def fourier(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
    """Generate prompts from a library of which half is in Fourier form."""
    adapted, groups = pgn_deep(backbone, material, options)
    library = prompt_layer(adapted).library("default")
    for name in ("tokens", "slot_prompts"):
        parametrize.register_parametrization(library, name, FourierHalf())
    return adapted, groups


class Averaged(nn.Module):
    """A model that trains as usual and answers with an exponential moving average of its weights."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY), use_buffers=True)

    def forward(self, pixels: Tensor) -> Tensor:
        """Answer pixels in [0, 1] with logits."""
        if not self.training:
            return self.average(pixels)
        self.average.update_parameters(self.model)
        return self.model(pixels)


def averaged(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
    """Average the weights."""
    adapted, groups = pgn_deep(backbone, material, options)
    return Averaged(adapted), groups


def distil(
    trunk: nn.Module, backbone: PreTrainedModel, material: Material, pixels: Tensor, image_size: int | None
) -> None:
    """Train a generator's CNN to predict what the frozen backbone makes of images without labels."""
    pixels = pixels[torch.randperm(len(pixels))[:1000]]
    with torch.no_grad():
        features = [
            backbone.base_model(material.normalized(batch)).last_hidden_state[:, 0] for batch in pixels.split(50)
        ]
    target = torch.cat(features)
    target = (target - target.mean(dim=0)) / target.std(dim=0)
    readout = nn.Linear(trunk.num_features, target.shape[1]).to(DEVICE)
    optimizer = torch.optim.AdamW([*trunk.parameters(), *readout.parameters()], lr=DISTILLATION_RATE)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, DISTILLATION_STEPS)
    trunk.train()
    for _ in range(DISTILLATION_STEPS):
        chosen = torch.randint(len(pixels), (DISTILLATION_BATCH,))
        images = material.normalized(pixels[chosen])
        _, found = trunk(images if image_size is None else resize_shorter_side(images, image_size))
        loss = F.mse_loss(readout(found), target[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    print(f"  distilled: {loss.item():.2f} of the features' variance is not explained", flush=True)


def distilled(method: Method, split: str) -> Method:
    """Start a method's generator from what the backbone makes of a split's images."""

    def build(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
        adapted, groups = method(backbone, material, options)
        trunk = prompt_layer(adapted).generator("default").trunk
        adapted.model.disable_adapter_layers()
        distil(trunk, backbone, material, material.splits[split].pixels, options.generator_image_size)
        adapted.model.enable_adapter_layers()
        return adapted, groups

    return build


def slow(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
    """Let the library learn at a tenth of the rate of the static prompts."""
    adapted, groups = pgn_deep(backbone, material, options)
    tokens = prompt_layer(adapted).library("default").tokens
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter is not tokens]
    return adapted, [*groups, {"params": [tokens], "lr": options.rate / 10}]


def small(mixing: str) -> Method:
    """Generate prompts from a library of eight, which starts at zero: training starts with static prompts."""

    def build(backbone: PreTrainedModel, material: Material, options: Options) -> Built:
        fields = options.config | {"library_size": 8, "mixing": mixing}
        adapted, groups = pgn_deep(backbone, material, replace(options, config=fields))
        nn.init.zeros_(prompt_layer(adapted).library("default").tokens)
        return adapted, groups

    return build


TRIALS = {
    "vapt": vapt(embedded=False),
    "embedded": vapt(embedded=True),
    "fourier": fourier,
    "averaged": averaged,
    "slow": slow,
    "small": small("softmax"),
    "small-sigmoid": small("sigmoid"),
    "distilled": distilled(pgn_deep, "unlabelled"),
    "distilled-few": distilled(pgn_deep, "train"),
    "distilled-first": distilled(pgn, "unlabelled"),
    "distilled-first-few": distilled(pgn, "train"),
}


def main(command_line: list[str] | None = None) -> None:
    for name, build in TRIALS.items():
        adaptation.METHODS[name] = (build, adaptation.METHODS["pgn" if "first" in name else "pgn-deep"][1])
        report.NAMES[name] = name
    given = sys.argv[1:] if command_line is None else command_line
    quick = [name for name in TRIALS if "--smoke" not in given or "distilled" not in name]
    adaptation.main(["--methods", *quick, *given, "--no-test"])


if __name__ == "__main__":
    main()
