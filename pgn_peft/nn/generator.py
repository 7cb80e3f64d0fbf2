"""The prompt generator: a small CNN (the trunk) and a head that map an image to mixing coefficients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pgn_peft.nn.functional import is_exporting, resize


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation, also for a single value per channel and for frozen weights.

    Differs from `torch.nn.BatchNorm2d` in training mode: it uses the running statistics, and does not update them,
    if its weight is frozen, or if a channel has a single value (one image of 1 x 1 pixels, as the last batch of an
    epoch can have), for which torch raises an error.

    The counter of batches is not saved. Only cumulative averages need it, and tools that average or cast weights
    change its dtype and shape.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.register_buffer("num_batches_tracked", torch.tensor(0), persistent=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)  # in files of earlier versions
        nn.Module._load_from_state_dict(self, state_dict, prefix, *args)  # torch's version requires the counter

    def forward(self, input: Tensor) -> Tensor:
        """Normalise (B, C, H, W), channel by channel."""
        values_per_channel = input.shape[0] * input.shape[2] * input.shape[3]
        if self.training and (values_per_channel == 1 or not self.weight.requires_grad):
            return F.batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        return super().forward(input)


def group_norm(num_channels: int) -> nn.GroupNorm:
    """Return a group normalisation with up to 8 groups. It has no running statistics."""
    return nn.GroupNorm(math.gcd(num_channels, 8), num_channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {"batch": BatchNorm2d, "group": group_norm}


class Shortcut(nn.Conv2d):
    """The 1 x 1 convolution with a bias in the shortcut of a strided block.

    Differs from `torch.nn.Conv2d` in how it is computed: it selects the pixels that the stride keeps, then convolves
    with a stride of 1. On CPUs without AVX-512, the backward pass of a strided 1 x 1 convolution with fewer than 8
    channels in channels-last writes out of bounds (oneDNN 3.12, torch 2.14.1).
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)
        self.keep_every = stride

    def forward(self, input: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride), rounded up."""
        kept = input[..., :: self.keep_every, :: self.keep_every]
        # Give the weight the strides of its gradient. In channels-last torch would choose different ones, and
        # DistributedDataParallel would warn.
        return self._conv_forward(kept, self.weight.flatten(1)[..., None, None], self.bias)


class ResidualBlock(nn.Module):
    """conv-norm-ReLU-conv-norm plus a shortcut, then ReLU of the sum.

    The shortcut of a strided block is a 1 x 1 convolution with a bias and without a norm, as in the official code.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.norm1 = norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm2 = norm(out_channels)
        self.shortcut = nn.Identity() if stride == 1 else Shortcut(in_channels, out_channels, stride)

    def forward(self, features: Tensor) -> Tensor:
        """Map (B, in_channels, H, W) to (B, out_channels, H / stride, W / stride), rounded up."""
        residual = F.relu(self.norm1(self.conv1(features)))
        residual = self.norm2(self.conv2(residual))
        return F.relu(residual + self.shortcut(features))


class ResNet10(nn.Module):
    """The official trunk: a strided stem, a max-pool, four residual blocks, a global average.

    Args:
        num_channels: channels of the image.
        width: channels of the stem; the blocks have 1, 2, 4 and 8 times as many.
        norm: "batch" or "group".

    Source: the "resnet10" of the official code of arXiv:2210.06466, which has width 16 and batch norm.
    """

    def __init__(self, num_channels: int = 3, width: int = 16, norm: str = "batch") -> None:
        super().__init__()
        make_norm = NORMS[norm]
        self.stem_conv = nn.Conv2d(num_channels, width, kernel_size=3, stride=2, padding=1, bias=False)
        self.stem_norm = make_norm(width)
        # Not a list, whose tensors would have "0" in their names: PEFT would take that for an adapter called "0".
        self.block1 = ResidualBlock(width, width, stride=1, norm=make_norm)
        self.block2 = ResidualBlock(width, 2 * width, stride=2, norm=make_norm)
        self.block3 = ResidualBlock(2 * width, 4 * width, stride=2, norm=make_norm)
        self.block4 = ResidualBlock(4 * width, 8 * width, stride=2, norm=make_norm)
        self.num_place_features, self.num_features = 4 * width, 8 * width

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Compute spatial and global features.

        Args:
            pixel_values: (B, C, H, W) images of any size.

        Returns:
            The output of the third block, (B, 4 * width, H / 16, W / 16), rounded up; and the average of the last
            block's output over all positions, (B, 8 * width).
        """
        if not is_exporting():  # ExecuTorch's norms refuse channels-last
            # Convolutions with few channels are up to twice as fast in channels-last.
            pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
        features = self.stem_norm(self.stem_conv(pixel_values))
        # Pooling before the ReLU gives the same values with a quarter of the ReLUs.
        features = F.relu(F.max_pool2d(features, kernel_size=3, stride=2, padding=1))
        places = self.block3(self.block2(self.block1(features)))
        return places, self.block4(places).mean(dim=(2, 3))


TRUNKS = {"resnet10": ResNet10}


def resize_shorter_side(pixel_values: Tensor, size: int) -> Tensor:
    """Resize images (B, C, H, W) so that their shorter side measures `size` pixels, keeping the aspect ratio."""
    height, width = pixel_values.shape[-2:]
    shorter = min(height, width)
    return resize(pixel_values, (size * height // shorter, size * width // shorter))


class FactorisedHead(nn.Module):
    """Mixing logits as products of a query for each prompt and a key for each library entry, as in attention.

    Differs from the official code, whose head is one linear layer with about ten times as many parameters.

    Args:
        num_features: number of the trunk's features, F.
        num_virtual_tokens: prompts per image, P.
        library_size: entries of the library, L.
        rank: length of a query and of a key, R.
    """

    def __init__(self, num_features: int, num_virtual_tokens: int, library_size: int, rank: int) -> None:
        super().__init__()
        self.queries = nn.Linear(num_features, num_virtual_tokens * rank)
        self.keys = nn.Parameter(torch.empty(library_size, rank).normal_(std=rank**-0.5))
        self.bias = nn.Parameter(torch.zeros(num_virtual_tokens * library_size))

    def forward(self, features: Tensor) -> Tensor:
        """Map features (B, F) to logits (B, P * L)."""
        queries = self.queries(features).unflatten(-1, (-1, self.keys.shape[1]))  # (B, P, R)
        return (queries @ self.keys.T).flatten(1) + self.bias  # (B, P * L)


class DenseHead(nn.Module):
    """Mixing logits for each patch of an image of any size, from the features at its position and of the whole image.

    Args:
        num_place_features: number of the trunk's spatial features, F'.
        num_features: number of its global features, F.
        library_size: entries of the library, L.
        patch_size: side of the backbone's patches, in pixels.

    Differs from the official code, whose prompts belong to P slots and not to positions in the image.
    """

    def __init__(self, num_place_features: int, num_features: int, library_size: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.places = nn.Conv2d(num_place_features, library_size, kernel_size=1)
        self.image = nn.Linear(num_features, library_size, bias=False)

    def forward(self, places: Tensor, features: Tensor, image_size: torch.Size) -> Tensor:
        """Map features (B, F', h, w) and (B, F) to logits (B, P, L) of the P patches, row by row."""
        grid = (image_size[0] // self.patch_size, image_size[1] // self.patch_size)
        logits = resize(self.places(places), grid) + self.image(features)[:, :, None, None]
        return logits.flatten(2).transpose(1, 2)


class PromptGenerator(nn.Module):
    """Map an image to the coefficients that mix its prompts from the library.

    Args:
        num_virtual_tokens: prompts per image, P; with `patch_size` it is only recorded.
        library_size: entries of the library, L.
        trunk: the CNN, a key of `TRUNKS`.
        num_channels: channels of the image.
        image_size: length that the image's shorter side is resized to, in pixels; None: no resizing.
        width: channels of the trunk's stem.
        norm: "batch", as in the official code, or "group", which needs no running statistics.
        mixing_init_std: standard deviation of the initial bias of the logits; 0 keeps torch's small default, with
            which all prompts start as nearly the same mixture.
        rank: length of queries and keys of a factorised head; None: one linear layer, as in the official code.
        patch_size: side of a patch in pixels, for a `DenseHead` with one prompt per patch; None: P prompts per image.

    Attributes:
        settings: the arguments that determine the parameters, for saving.

    Source: arXiv:2210.06466 and its official code.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        library_size: int,
        trunk: str = "resnet10",
        num_channels: int = 3,
        image_size: int | None = None,
        width: int = 16,
        norm: str = "batch",
        mixing_init_std: float = 0.0,
        rank: int | None = None,
        patch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.num_virtual_tokens = num_virtual_tokens
        self.library_size = library_size
        self.image_size = image_size
        self.settings: dict[str, Any] = {
            "num_virtual_tokens": num_virtual_tokens,
            "library_size": library_size,
            "trunk": trunk,
            "image_size": image_size,
            "width": width,
            "norm": norm,
            "rank": rank,
        }
        self.trunk = TRUNKS[trunk](num_channels=num_channels, width=width, norm=norm)
        self.head: nn.Linear | FactorisedHead | DenseHead
        if patch_size is not None:
            self.head = DenseHead(self.trunk.num_place_features, self.trunk.num_features, library_size, patch_size)
        elif rank is None:
            self.head = nn.Linear(self.trunk.num_features, num_virtual_tokens * library_size)
        else:
            self.head = FactorisedHead(self.trunk.num_features, num_virtual_tokens, library_size, rank)
        if mixing_init_std > 0:
            biased = self.head.places if isinstance(self.head, DenseHead) else self.head
            nn.init.normal_(cast(Tensor, biased.bias), std=mixing_init_std)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters, float32 unless the whole model was cast."""
        # Read from a convolution: dynamic quantisation replaces the parameters of linear layers by methods.
        return self.trunk.stem_conv.weight.dtype

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Compute the mixing coefficients.

        Args:
            pixel_values: (B, C, H, W), normalised as for the backbone, any floating dtype.

        Returns:
            (B, P, L) coefficients, non-negative; those of a prompt sum to 1.
        """
        size = pixel_values.shape[-2:]
        pixel_values = pixel_values.to(self.dtype)
        if self.image_size is not None:
            pixel_values = resize_shorter_side(pixel_values, self.image_size)
        places, features = self.trunk(pixel_values)
        if isinstance(self.head, DenseHead):
            logits = self.head(places, features, size)
        else:
            logits = self.head(features).unflatten(1, (self.num_virtual_tokens, -1))  # (B, P, L)
        return logits.softmax(dim=-1)
