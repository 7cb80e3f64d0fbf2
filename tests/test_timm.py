"""timm's models: Vision Transformers with each pooling, and EVAs, whose attention rotates the patches."""

import numpy as np
import pytest
import torch
import train_image_classifier
from conftest import PIXEL, assert_same, layers_of, move_adapter, refused, tiny_config
from image_data import smoke_arguments
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import AutoImageProcessor, TimmWrapperConfig, TimmWrapperForImageClassification, ViTImageProcessor

from pgn_peft import Classifier, load_classifier
from pgn_peft.hub import plain_processor
from pgn_peft.inspection import attention_to_prompts
from pgn_peft.tuner.adapters import prompt_layer

pytest.importorskip("timm")

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
# name -> timm's architecture, and arguments beside the sizes
MODELS = {
    "ViT, CLS": ("vit_tiny_patch16_224", {"global_pool": "token"}),
    "ViT, average": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "ViT, attention pool": ("vit_base_patch16_siglip_224", {"mlp_ratio": 2}),
    "ViT, any size": ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "EVA-02": ("eva02_tiny_patch14_224", {}),
    "DINOv3": ("vit_small_patch16_dinov3", {}),
    "PE": ("vit_pe_core_tiny_patch16_384", {}),
    "rotations of each layer": ("vit_small_patch16_rope_mixed_224", {}),
}


def tiny_timm(name, num_labels=5):
    architecture, arguments = MODELS[name]
    torch.manual_seed(0)
    config = TimmWrapperConfig(architecture=architecture, model_args=SIZES | arguments, num_labels=num_labels)
    model = TimmWrapperForImageClassification(config).eval()
    for part, parameter in model.named_parameters():
        if parameter.ndim > 1 or part.endswith("_token"):
            torch.nn.init.normal_(parameter, std=0.3)
        elif "gamma" in part:  # layer scale, which starts so small that prompts would do nothing
            torch.nn.init.ones_(parameter)
    return model


def answer(model, pixel_values):
    with torch.no_grad():
        return model(pixel_values).logits


def answer_beside(model, prompts, pixel_values):
    """What a plain model answers if prompts stand behind CLS and registers from the first to the last layer."""
    inside, count = model.timm_model, prompts.shape[1]
    first = inside.num_prefix_tokens
    for layer in layers_of(model):
        if hasattr(layer.attn, "num_prefix_tokens"):
            layer.attn.num_prefix_tokens += count

    def join(module, inputs):
        return (torch.cat([inputs[0][:, :first], prompts, inputs[0][:, first:]], dim=1),)

    def leave(module, inputs, tokens):
        return torch.cat([tokens[:, :first], tokens[:, first + count :]], dim=1)

    inside.norm_pre.register_forward_pre_hook(join)
    layers_of(model)[-1].register_forward_hook(leave)
    return answer(model, pixel_values)


@pytest.mark.parametrize("name", MODELS)
def test_prompts_act_as_tokens_without_a_position(name, pixel_values, tmp_path):
    base = tiny_timm(name)
    before, structure, kind = answer(base, pixel_values), str(base), type(base.timm_model)
    model = move_adapter(get_peft_model(base, tiny_config(head="frozen"))).eval()
    prompts = prompt_layer(model).prompts("default", pixel_values)
    prompted = answer(model, pixel_values)
    assert_same(prompted, answer_beside(tiny_timm(name), prompts, pixel_values))
    assert (prompted - before).abs().max() > 1e-3
    with model.disable_adapter():  # torch's attention pool has another path for frozen weights
        assert_same(answer(model, pixel_values), before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_timm(name), tmp_path)
    assert_same(answer(loaded, pixel_values), prompted)
    unloaded = model.unload()
    assert_same(answer(unloaded, pixel_values), before)
    assert str(unloaded) == structure
    assert type(unloaded.timm_model) is kind


@pytest.mark.parametrize("name", ["ViT, CLS", "rotations of each layer"])
def test_prompts_in_every_layer_and_a_head_of_its_own_are_trained(name, pixel_values):
    base = tiny_timm(name)
    frozen = {part: tensor.clone() for part, tensor in base.state_dict().items()}
    model = move_adapter(get_peft_model(base, tiny_config(prompt_depth="all", id2label={0: "cat", 1: "dog"}))).train()
    model.get_base_model().gradient_checkpointing_enable()
    loss = model(pixel_values, labels=torch.tensor([0, 1, 0, 1])).loss
    loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters() if parameter.requires_grad)
    unloaded = model.unload()
    assert all(torch.equal(tensor, frozen[part]) for part, tensor in unloaded.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT, any size", "EVA-02"])
def test_it_compiles_to_one_graph(name, pixel_values):
    model = move_adapter(get_peft_model(tiny_timm(name), tiny_config())).eval()
    torch._dynamo.reset()  # which counts compilations of all models together
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert_same(answer(compiled, pixel_values), answer(model, pixel_values))


def test_other_image_sizes_where_the_model_takes_them(pixel_values):
    larger = torch.randn(2, 3, 48, 48)
    assert answer(move_adapter(get_peft_model(tiny_timm("ViT, any size"), tiny_config())), larger).shape == (2, 5)
    model = get_peft_model(tiny_timm("ViT, CLS"), tiny_config())
    with refused(ValueError, "32", "48"):
        answer(model, larger)
    with refused(ValueError, "32"):
        Classifier(model, ViTImageProcessor(size={"height": 48, "width": 48})).pipeline()


@pytest.mark.parametrize(
    ("architecture", "arguments", "error", "word"),
    [
        ("resnet10t", {}, TypeError, "ResNet"),
        ("vit_tiny_patch16_224", SIZES | {"patch_drop_rate": 0.5}, ValueError, "patch_drop_rate"),
        ("deit_tiny_distilled_patch16_224", SIZES, TypeError, "head"),
        ("vit_tiny_r_s16_p8_224", SIZES | {"patch_size": 1}, TypeError, "VisionTransformer"),
        ("vit_tiny_patch16_224", SIZES | {"global_pool": ""}, ValueError, "global_pool"),
    ],
)
def test_other_models_of_timm_are_refused(architecture, arguments, error, word):
    config = TimmWrapperConfig(architecture=architecture, model_args=arguments, num_labels=2)
    with refused(error, word):
        get_peft_model(TimmWrapperForImageClassification(config), tiny_config(num_labels=3))


def test_a_timm_model_with_prompts_returns_no_feature_maps(pixel_values):
    model = get_peft_model(tiny_timm("ViT, CLS"), tiny_config())
    with refused(ValueError, "output_hidden_states"):
        model(pixel_values, output_hidden_states=True)
    with refused(ValueError, "TimmWrapper"):
        attention_to_prompts(model, pixel_values)
    model = get_peft_model(tiny_timm("ViT, CLS"), tiny_config(**PIXEL))  # no tokens beside the patches
    assert [maps.shape for maps in model(pixel_values, output_hidden_states=True).hidden_states] == [(4, 32, 4, 4)] * 3


def save_timm(folder, **steps):
    """A tiny model of timm with the description of its image processing."""
    model = tiny_timm("ViT, CLS")
    model.config.pretrained_cfg = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "input_size": [3, 32, 32]} | steps
    model.save_pretrained(folder)


@pytest.mark.parametrize("steps", [{"crop_pct": 0.8, "interpolation": "bicubic"}, {"crop_mode": "squash"}])
def test_its_image_processing_becomes_an_image_processor(steps, tmp_path):
    save_timm(tmp_path, **({"crop_pct": 1.0, "interpolation": "bilinear"} | steps))
    wrapper = AutoImageProcessor.from_pretrained(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8))
    found = plain_processor(wrapper)(image, return_tensors="pt")["pixel_values"]
    assert (found - wrapper(image)["pixel_values"]).abs().max() < 0.05  # Pillow and torchvision round in other places
    wrapper.data_config["interpolation"] = "nearest"
    with refused(ValueError, "nearest"):
        plain_processor(wrapper)


@pytest.mark.slow
def test_the_script_trains_on_it(tmp_path):
    command = smoke_arguments(tmp_path)
    command[command.index("--model_name_or_path") + 1] = str(tmp_path / "timm")
    save_timm(tmp_path / "timm", crop_pct=0.9, interpolation="bicubic")
    train_image_classifier.main([*command, "--num_train_epochs", "1"])
    classifier = load_classifier(command[command.index("--output_dir") + 1])
    assert {entry["label"] for entry in classifier.pipeline()(Image.new("RGB", (40, 32), "red"))} == {"blue", "red"}
