"""What training takes less memory with: gradient checkpointing and quantised backbones. The answers stay right."""

import pytest
import timing
import torch
from conftest import PIXEL, answer, assert_same, move_adapter, tiny_config, tiny_vit
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import Trainer, TrainingArguments, ViTForImageClassification

KINDS = {
    "latent": {},
    "static": {"generator": "static"},
    "pixel": PIXEL,
    "frozen head": {"head": "frozen"},
    "deep": {"prompt_depth": "all"},
    "deep and static": {"prompt_depth": 2, "generator": "static"},
}
LABELS = torch.tensor([0, 1, 2, 3])

kinds = pytest.mark.parametrize("kind", KINDS)
reentrant = pytest.mark.parametrize("use_reentrant", [False, True])
# Each kind once, the two that are used most in both ways.
kinds_and_reentrant = pytest.mark.parametrize(
    ("kind", "use_reentrant"),
    [("latent", False), *((kind, True) for kind in KINDS if kind != "frozen head"), ("deep", False)],
)
# Transformers renames `gradient_checkpointing_enable`; the floor knows the old name only.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


def adapted(kind="latent", use_reentrant=None):
    """A model in training mode, with gradient checkpointing unless `use_reentrant` is None."""
    model = move_adapter(get_peft_model(tiny_vit(num_hidden_layers=4), tiny_config(**KINDS[kind]))).train()
    if use_reentrant is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    return model


def step(model, pixel_values):
    """Gradients by name, and bytes that the forward pass kept for the backward pass."""
    losses = []
    kept = timing.count_saved_bytes(
        lambda: losses.append(model(pixel_values, labels=LABELS).loss), list(model.parameters())
    )
    losses[0].backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    return gradients, kept


@kinds_and_reentrant
def test_checkpointing_keeps_less_and_changes_nothing(kind, use_reentrant, pixel_values):
    plain = adapted(kind)
    expected, kept = step(plain, pixel_values)
    model = adapted(kind, use_reentrant)
    gradients, kept_with_checkpointing = step(model, pixel_values)
    assert_same(gradients, expected, tolerance=1e-2 if kind == "pixel" else 1e-4)
    assert all(gradient.abs().sum() > 0 for name, gradient in gradients.items() if "shortcut.bias" not in name)
    assert kept_with_checkpointing < 0.6 * kept
    # BatchNorm has seen the batch once, not once more when layers were computed again.
    assert_same(dict(model.named_buffers()), dict(plain.named_buffers()))
    counts = [buffer.item() for name, buffer in model.named_buffers() if "num_batches_tracked" in name]
    assert set(counts) == (set() if "static" in kind else {1})


@reentrant
def test_checkpointing_with_nothing_but_the_head_trained(use_reentrant, pixel_values):
    model = adapted(use_reentrant=use_reentrant)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("pgn_head" in name)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients, _ = step(model, pixel_values)
    assert gradients
    assert all(gradient.abs().sum() > 0 for gradient in gradients.values())
    assert_same(dict(model.named_buffers()), before)


@pytest.mark.parametrize("kind", ["latent", "pixel"])
def test_gradients_of_the_input_are_not_needed_and_do_no_harm(kind, pixel_values):
    expected, _ = step(adapted(kind), pixel_values)
    # As PEFT and Transformers ask for them where the base is quantised.
    base = tiny_vit(num_hidden_layers=4)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    base.enable_input_require_grads()
    asked = []
    base.get_input_embeddings().register_forward_hook(lambda *call: asked.append(call[2].requires_grad))
    model = move_adapter(get_peft_model(base, tiny_config(**KINDS[kind]))).train()
    gradients, _ = step(model, pixel_values)
    assert asked == [True]
    assert_same(gradients, expected, tolerance=1e-2 if kind == "pixel" else 1e-4)


@pytest.mark.parametrize(("kind", "use_reentrant"), [("latent", False), ("deep", True)])
def test_trainer_reaches_the_same_weights(kind, use_reentrant, tmp_path):
    generator = torch.Generator().manual_seed(0)
    rows = [{"pixel_values": torch.randn(3, 32, 32, generator=generator), "labels": n % 5} for n in range(8)]
    weights = {}
    for checkpointing in False, True:
        model = adapted(kind)
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=rows).train()
        assert model.base_model.model.vit.layers[0].gradient_checkpointing is checkpointing
        weights[checkpointing] = model.state_dict()
    assert_same(weights[True], weights[False], tolerance=1e-3)


class Int8Linear(nn.Linear):
    """A stand-in for a quantisation library's layer: whole numbers, and a scale for each output."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, features):
        return F.linear(features, self.weight.to(features.dtype) * self.scale.to(features.dtype), self.bias)


def stand_in(folder, **loading):
    model = ViTForImageClassification.from_pretrained(folder, **loading)
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Int8Linear(module))
    return model


def torchao(folder, **loading):
    pytest.importorskip("torchao", reason="torchao is not installed")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    config = TorchAoConfig(Int8WeightOnlyConfig())
    return ViTForImageClassification.from_pretrained(folder, quantization_config=config, **loading)


def bitsandbytes(folder, **loading):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_8bit=True)
    return ViTForImageClassification.from_pretrained(folder, quantization_config=config, device_map="cpu", **loading)


LOADERS = {"stand-in": stand_in, "torchao": torchao, "bitsandbytes": bitsandbytes}
slow = pytest.mark.slow
loaders = pytest.mark.parametrize(
    "library", ["stand-in", pytest.param("torchao", marks=slow), pytest.param("bitsandbytes", marks=slow)]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    tiny_vit(hidden_size=64, intermediate_size=128).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("library", "kind"),
    [
        *(("stand-in", kind) for kind in ("latent", "pixel", "frozen head", "deep and static")),
        pytest.param("torchao", "latent", marks=slow),
        pytest.param("bitsandbytes", "latent", marks=slow),
    ],
)
def test_a_quantised_backbone_is_trained_on_saved_and_left_as_it_was(library, kind, folder, tmp_path, pixel_values):
    load = LOADERS[library]
    base = load(folder).eval()
    before = answer(base, pixel_values)
    torch.manual_seed(0)
    model = get_peft_model(base, tiny_config(**KINDS[kind])).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {torch.float32}
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(3):
        loss = model(pixel_values, labels=LABELS).loss
        loss.backward()
        assert all(parameter.grad is not None for parameter in trained)
        assert {name for name, p in model.named_parameters() if p.grad is not None and "pgn_" not in name} == set()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] < 10
    after = answer(model.eval(), pixel_values)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(folder), tmp_path).eval()
    assert_same(answer(loaded, pixel_values), after, valid_pixels=kind == "pixel")
    # On the base as it was before it was quantised, the adapter answers nearly the same.
    exact = PeftModel.from_pretrained(ViTForImageClassification.from_pretrained(folder), tmp_path).eval()
    assert (answer(exact, pixel_values) - after).norm() < 0.2 * after.norm()
    assert not torch.equal(after, before)
    assert torch.equal(answer(model.unload(), pixel_values), before)


@loaders
def test_a_head_starts_as_the_quantised_one_it_is_a_copy_of(library, folder):
    base = LOADERS[library](folder)
    features = torch.randn(50, 64)
    expected = base.classifier(features).detach()
    model = get_peft_model(base, tiny_config())
    # Its logits differ by no more than the roundings of the quantised layer.
    torch.testing.assert_close(model.base_model.model.classifier(features), expected, atol=0.2, rtol=0.01)


def test_a_quantised_backbone_in_half_precision_and_checkpointed(folder, pixel_values):
    model = get_peft_model(stand_in(folder, dtype=torch.bfloat16), tiny_config()).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    gradients, _ = step(model, pixel_values)
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.slow
def test_a_backbone_in_4_bits_is_trained_on(folder, tmp_path, pixel_values):
    """Saved before an answer in eval mode: on CPUs with bfloat16 bitsandbytes 0.50 then packs the weights, and taking
    a state dict, also of a plain model, changes its answers.
    """
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    from transformers import BitsAndBytesConfig

    def load():
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
            llm_int8_skip_modules=["classifier"],
        )
        return ViTForImageClassification.from_pretrained(folder, quantization_config=config, device_map="cpu")

    model = get_peft_model(load(), tiny_config(id2label={0: "cat", 1: "dog"})).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    for _ in range(3):
        model(pixel_values, labels=torch.tensor([0, 1, 0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not any(torch.equal(*pair) for pair in zip(trained, before, strict=True))
    model.save_pretrained(tmp_path)
    after = answer(model.eval(), pixel_values)
    assert_same(answer(PeftModel.from_pretrained(load(), tmp_path).eval(), pixel_values), after)
    with model.disable_adapter():
        assert_same(answer(model, pixel_values), answer(load().eval(), pixel_values))
