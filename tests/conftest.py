"""Tiny seeded models, random images, and the real files in ../shared where a machine has them."""

import dataclasses
import json
import os
import socket
import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
import transformers.integrations.peft
from loopback_hub import loopback_hub, use_hub
from packaging.version import Version

import pgn_peft  # noqa: F401  (registers the method)
from pgn_peft import PGNConfig

# Tiny models gain nothing from threads, and lose much where the machine is busy.
torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"

# Environment of scripts in their own processes.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}

TOKEN = "hf_secret"  # of the loopback Hub
# Of an adapter.
FILES = {"adapter_model.safetensors", "adapter_config.json", "preprocessor_config.json", "README.md"}

HANG = 1800  # seconds after which a process that hangs is ended; no test may fail because a machine is slow


# architecture -> its config class
ARCHITECTURES = {
    "ViTForImageClassification": "ViTConfig",
    "DeiTForImageClassification": "DeiTConfig",
    "ViTMSNForImageClassification": "ViTMSNConfig",
    "ViTModel": "ViTConfig",
    "DeiTModel": "DeiTConfig",
    "ViTMSNModel": "ViTMSNConfig",
    "Dinov2ForImageClassification": "Dinov2Config",
    "Dinov2WithRegistersForImageClassification": "Dinov2WithRegistersConfig",
    "Dinov2Model": "Dinov2Config",
    "Dinov2WithRegistersModel": "Dinov2WithRegistersConfig",
    "IJepaForImageClassification": "IJepaConfig",
    "IJepaModel": "IJepaConfig",
    "CLIPForImageClassification": "CLIPConfig",
    "CLIPVisionModel": "CLIPVisionConfig",
    "CLIPVisionModelWithProjection": "CLIPVisionConfig",
    "SiglipForImageClassification": "SiglipConfig",
    "SiglipVisionModel": "SiglipVisionConfig",
    "DINOv3ViTModel": "DINOv3ViTConfig",
    "BeitForImageClassification": "BeitConfig",
    "BeitModel": "BeitConfig",
    "Data2VecVisionForImageClassification": "Data2VecVisionConfig",
    "Data2VecVisionModel": "Data2VecVisionConfig",
    "Aimv2VisionModel": "Aimv2VisionConfig",
    "TimmWrapperForImageClassification": "TimmWrapperConfig",
    "TimmWrapperModel": "TimmWrapperConfig",
}
CLASSIFIERS = [name for name in ARCHITECTURES if name.endswith("Classification")]

# The ways in which architectures differ for PGN, one architecture for each.
REPRESENTATIVES = {
    "ViTForImageClassification": "CLS, then the patches; the head reads CLS",
    "DeiTForImageClassification": "two tokens before the patches",
    "Dinov2WithRegistersForImageClassification": "CLS beside the average, a head of width 2 D, registers, "
    "positions interpolated without being asked",
    "SiglipForImageClassification": "no CLS: all tokens are read; the config has a part for each of two towers",
    "CLIPVisionModelWithProjection": "features instead of a head; a norm before the first layer",
    "DINOv3ViTModel": "attention rotates the tokens that have positions",
    "BeitForImageClassification": "attention adds a bias for each pair of positions",
    "TimmWrapperForImageClassification": "positions are added outside of the embeddings",
}
# What the tiny models of some architectures need beside the sizes: all kinds of positions, so that a lost one shows.
FIELDS = {
    "BeitConfig": {"use_relative_position_bias": True, "use_absolute_position_embeddings": True},
    "Data2VecVisionConfig": {"use_shared_relative_position_bias": True, "use_absolute_position_embeddings": True},
}


SIZES = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def tiny_vit(architecture="ViTForImageClassification", num_labels=5, seed=0, **overrides):
    """A seeded two-layer ViT in eval mode: 32 px, patch 8, width 32."""
    start = {"initializer_range": 0.3}  # with the usual 0.02 so small a network hardly notices its prompts
    fields = SIZES | start | FIELDS.get(ARCHITECTURES[architecture], {}) | overrides
    if ARCHITECTURES[architecture] in ("CLIPConfig", "SiglipConfig"):  # two towers, of which the model has one
        attention = {name: fields.pop(name) for name in ("attn_implementation",) if name in fields}
        fields = {"vision_config": fields, **attention}
    if architecture.startswith("TimmWrapper"):
        fields = timm_fields(fields)
    config = getattr(transformers, ARCHITECTURES[architecture])(**fields, num_labels=num_labels)
    torch.manual_seed(seed)
    model = getattr(transformers, architecture)(config).eval()
    # Transformers starts DeiT's and MSN's tokens from zeros, which would let a lost one go unnoticed.
    for name, parameter in model.named_parameters():
        if name.endswith("embeddings.position_embeddings") or name.endswith("_token"):
            torch.nn.init.normal_(parameter, std=0.5)
        elif architecture.startswith(("CLIP", "Siglip", "Timm")) and parameter.ndim > 1:  # with starts of their own
            torch.nn.init.normal_(parameter, std=0.3)
        elif name.endswith(("relative_position_bias_table", "lambda_1", "lambda_2", "lambda1", "register_tokens")):
            torch.nn.init.normal_(parameter, std=1.0)
    return model


def timm_fields(fields):
    """The fields of `TimmWrapperConfig` for a ViT of the given sizes."""
    pytest.importorskip("timm", reason="timm is not installed")
    names = {
        "image_size": "img_size",
        "patch_size": "patch_size",
        "hidden_size": "embed_dim",
        "num_hidden_layers": "depth",
        "num_attention_heads": "num_heads",
        "num_channels": "in_chans",
    }
    sizes = {names[name]: value for name, value in fields.items() if name in names}
    others = {name: value for name, value in fields.items() if name in ("attn_implementation", "dtype")}
    arguments = {"mlp_ratio": 2.0, "dynamic_img_size": True, "global_pool": "avg"}
    return {"architecture": "vit_tiny_patch16_224", "model_args": sizes | arguments, **others}


def embeddings_of(model):
    """The module that makes the tokens, wrapped or not."""
    places = ("embeddings", "patch_embed")
    return next(module for name, module in model.named_modules() if name.rpartition(".")[2] in places)


def embed(model, pixel_values, **options):
    """The tokens of images with their positions, and the prompts behind them."""
    tokens = embeddings_of(model)(pixel_values, **options)
    timm_model = next((module for module in model.modules() if hasattr(module, "_pos_embed")), None)
    return tokens if timm_model is None else timm_model._pos_embed(tokens)


def layers_of(model):
    """The encoder's layers, wrapped or not."""
    layers = (module for name, module in model.named_modules() if name.endswith("blocks"))
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    return next(layers, None) or next(lists)


def widen_biases(model, count):
    """Let the biases that a plain model adds in attention hold as many tokens more, with a bias of zero."""

    def widen(module, inputs, bias):
        wide = bias.new_zeros(*bias.shape[:-2], bias.shape[-2] + count, bias.shape[-1] + count)
        wide[..., :-count, :-count] = bias
        return wide

    for module in model.modules():
        if type(module).__name__.endswith("RelativePositionBias"):
            module.register_forward_hook(widen)


def tiny_config(**overrides):
    """A PGN config that suits `tiny_vit`, with prompts of the first layer."""
    sizes = {"num_virtual_tokens": 3, "library_size": 6, "generator_width": 4, "generator_image_size": None}
    return PGNConfig(**(sizes | {"prompt_depth": 1} | overrides))


# Fields of an adapter in pixel space that suit `tiny_vit`.
PIXEL = {"prompt_space": "pixel", "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "num_virtual_tokens": None}


def answer(model, pixel_values, **kwargs):
    """Logits, or the features of a model without a head."""
    with torch.no_grad():
        outputs = model(pixel_values, **kwargs)
    return next(
        outputs[name] for name in ("logits", "image_embeds", "last_hidden_state") if outputs.get(name) is not None
    )


def assert_same(found, expected, tolerance=1e-5, valid_pixels=False):
    """Ask two results for the same values up to a tolerance, and for equality in all that is no float.

    For whatever was computed twice: by a loaded model, a copy, another process, a part of the batch. The last bit of
    an output depends on the address of a weight modulo 64 bytes where a CPU has no AVX-512. `torch.equal` is for
    tensors that were copied, saved or loaded, and for one model in memory that answers the same images twice.

    Args:
        found: tensors, numpy arrays, numbers, strings; or lists, tuples, dictionaries, dataclasses of such.
        expected: the same, with the same keys, shapes and dtypes.
        tolerance: the largest difference, as a share of the largest value in a tensor or of 1.
        valid_pixels: the adapter lies in pixel space, where a pixel can be rounded to the next of its 256 levels: the
            tolerance is 5e-3.
    """
    tolerance = 5e-3 if valid_pixels else tolerance
    assert_same_inside(found, expected, tolerance, "")


def assert_same_inside(found, expected, tolerance, place):
    """`assert_same` for the part of a result at `place`, as "['logits'][0]"."""
    if dataclasses.is_dataclass(expected) and not isinstance(expected, Mapping):
        assert type(found) is type(expected), place
        found, expected = vars(found), vars(expected)
    if isinstance(expected, np.ndarray):
        assert isinstance(found, np.ndarray), place
        found, expected = torch.from_numpy(found.copy()), torch.from_numpy(expected.copy())
    if isinstance(expected, Mapping):
        assert found.keys() == expected.keys(), place
        for key, value in expected.items():
            assert_same_inside(found[key], value, tolerance, f"{place}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected), place
        assert len(found) == len(expected), place
        for index, pair in enumerate(zip(found, expected, strict=True)):
            assert_same_inside(*pair, tolerance, f"{place}[{index}]")
    elif isinstance(expected, torch.Tensor) and expected.is_floating_point():
        # Of the largest value, since sums of large terms can come out small.
        largest = expected.abs().max().item() if expected.numel() else 0.0
        torch.testing.assert_close(
            found, expected, rtol=0, atol=tolerance * max(1.0, largest), msg=lambda text: f"{place} {text}"
        )
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), place
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=tolerance, abs=tolerance, nan_ok=True), place
    else:
        assert found == expected, place


assert_nearly_equal = assert_same


@contextmanager
def refused(error, *words):
    """Ask for an error whose message has all `words`: names of fields, and values, in any order."""
    with pytest.raises(error) as raised:
        yield
    message = str(raised.value)
    assert not [word for word in words if str(word) not in message], message


def edit_json(file, **fields):
    """Change fields of a saved configuration, which has no checksums afterwards."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    settings |= dict.fromkeys(settings.keys() & {"checksums"}) | fields
    file.write_text(json.dumps(settings), encoding="utf-8")


def move_adapter(model, seed=1):
    """Give all adapters random weights and statistics, so that a lost tensor shows."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if "pgn_" in name and tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator)
            positive = "running_var" in name or name.endswith("logit_scale")
            tensor.copy_(0.5 + noise if positive else noise - 0.5)
            if name.endswith("text_embeds"):
                tensor.div_(tensor.norm(dim=-1, keepdim=True))
    return model


@pytest.fixture(scope="session", autouse=True)
def _offline():
    """Refuse connections to other machines: no test needs a network, and no script asks for one."""
    connect = socket.socket.connect

    def connect_here(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise OSError(f"a test asked for {address}")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        yield


def with_output(command, folder, *more):
    """Replace the output folder in a training command, and add arguments."""
    command = list(command)
    command[command.index("--output_dir") + 1] = str(folder)
    return [*command, *more]


@pytest.fixture
def pixel_values():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that this process is a client of, logged in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with loopback_hub(token=TOKEN) as hub:
        use_hub(monkeypatch, hub, tmp_path / "cache", TOKEN)
        yield hub


@pytest.fixture(scope="session")
def shared():
    if not SHARED.is_dir():
        pytest.skip("the real weights and images are not on this machine (../shared)")
    return SHARED


# A Transformers model's own `add_adapter`, `set_adapter`, `delete_adapter` and so on, `save_pretrained` with adapters.
PEFT_FOR_TRANSFORMERS = getattr(transformers.integrations.peft, "MIN_PEFT_VERSION", "0")
own_adapter_methods = pytest.mark.skipif(
    Version(peft.__version__) < Version(PEFT_FOR_TRANSFORMERS),
    reason=f"the own adapter methods of Transformers {transformers.__version__} need PEFT {PEFT_FOR_TRANSFORMERS}: "
    "install that, or transformers<5.24",
)
