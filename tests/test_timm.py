"""timm's models: Vision Transformers with each pooling, and EVAs, whose attention rotates the patches."""

import pytest
import torch
from conftest import assert_nearly_equal, layers_of, move_adapter, tiny_config
from peft import PeftModel, get_peft_model
from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

from pgn_peft.tuner.adapters import prompt_layer

pytest.importorskip("timm")

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
# name -> timm's architecture, and arguments beside the sizes
MODELS = {
    "ViT, CLS": ("vit_tiny_patch16_224", {"global_pool": "token"}),
    "ViT, average": ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}),
    "ViT, attention pool": ("vit_base_patch16_siglip_224", {"mlp_ratio": 2}),
    "ViT, any size": ("vit_tiny_patch16_224", {"dynamic_img_size": True}),
    "DeiT-III": ("deit3_small_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "CLIP": ("vit_base_patch16_clip_224", {}),
    "EVA-02": ("eva02_tiny_patch14_224", {}),
    "DINOv3": ("vit_small_patch16_dinov3", {}),
    "PE": ("vit_pe_core_tiny_patch16_384", {}),
    "rotations of each layer": ("vit_small_patch16_rope_mixed_224", {}),
}
ROTATING = {"EVA-02", "DINOv3", "PE", "rotations of each layer"}


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
    assert_nearly_equal(prompted, answer_beside(tiny_timm(name), prompts, pixel_values))
    assert (prompted - before).abs().max() > 1e-3
    with model.disable_adapter():
        assert torch.equal(answer(model, pixel_values), before)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_timm(name), tmp_path)
    assert_nearly_equal(answer(loaded, pixel_values), prompted)
    unloaded = model.unload()
    assert torch.equal(answer(unloaded, pixel_values), before)
    assert str(unloaded) == structure
    assert type(unloaded.timm_model) is kind


@pytest.mark.parametrize("name", ["ViT, CLS", "EVA-02", "rotations of each layer"])
def test_prompts_in_every_layer_and_a_head_of_its_own_are_trained(name, pixel_values):
    base = tiny_timm(name)
    frozen = {part: tensor.clone() for part, tensor in base.state_dict().items()}
    model = move_adapter(get_peft_model(base, tiny_config(prompt_depth=None, id2label={0: "cat", 1: "dog"}))).train()
    model.get_base_model().gradient_checkpointing_enable()
    loss = model(pixel_values, labels=torch.tensor([0, 1, 0, 1])).loss
    loss.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters() if parameter.requires_grad)
    unloaded = model.unload()
    assert all(torch.equal(tensor, frozen[part]) for part, tensor in unloaded.state_dict().items())


@pytest.mark.parametrize("name", ["ViT, any size", "EVA-02"])
def test_it_compiles_to_one_graph(name, pixel_values):
    model = move_adapter(get_peft_model(tiny_timm(name), tiny_config())).eval()
    torch._dynamo.reset()  # which counts compilations of all models together
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(answer(compiled, pixel_values), answer(model, pixel_values))


def test_other_image_sizes_where_the_model_takes_them(pixel_values):
    larger = torch.randn(2, 3, 48, 40)
    assert answer(move_adapter(get_peft_model(tiny_timm("ViT, any size"), tiny_config())), larger).shape == (2, 5)
    model = get_peft_model(tiny_timm("ViT, CLS"), tiny_config())
    with pytest.raises(ValueError, match="`pixel_values` must measure 32 x 32 pixels"):
        answer(model, larger)


@pytest.mark.parametrize(
    ("architecture", "arguments", "error", "message"),
    [
        ("resnet10t", {}, TypeError, "`model` must wrap a VisionTransformer or an Eva of timm, but got a ResNet"),
        (
            "vit_tiny_patch16_224",
            SIZES | {"patch_drop_rate": 0.5},
            ValueError,
            "`patch_drop_rate` must be 0, but got 0.5",
        ),
    ],
)
def test_other_models_of_timm_are_refused(architecture, arguments, error, message):
    config = TimmWrapperConfig(architecture=architecture, model_args=arguments, num_labels=2)
    with pytest.raises(error, match=message):
        get_peft_model(TimmWrapperForImageClassification(config), tiny_config())
