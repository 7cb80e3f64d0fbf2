"""Texts as classes: zero-shot logits, training, loading, refusals."""

import json

import import_official
import numpy as np
import pytest
import torch
import train_image_classifier
from conftest import PIXEL, answer, assert_same, move_adapter, refused, tiny_config, tiny_vit
from image_data import smoke_arguments
from peft import AutoPeftModel, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from tiny_clip import NAMES, tokenizer, two_towers
from torch import nn
from transformers import CLIPImageProcessor, CLIPTextModelWithProjection, Trainer, TrainingArguments

from pgn_peft import Classifier, ImagePrompter, embed_texts, load_classifier, make_prompter, official, use_texts
from pgn_peft.nn.generator import PromptGenerator
from pgn_peft.nn.library import TokenLibrary
from pgn_peft.tuner.head import find_head

LABELS = dict(enumerate(NAMES))
PROCESSOR = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
SCALE = {"image_mean": list(PROCESSOR.image_mean), "image_std": list(PROCESSOR.image_std)}


def base_predictions(model, pixel_values, sentences):
    """What the model itself answers for images and sentences."""
    tokens = tokenizer()(sentences, padding="max_length", max_length=12, return_tensors="pt")
    inputs = {"input_ids": tokens["input_ids"]}
    if type(model).__name__ == "CLIPModel":
        inputs["attention_mask"] = tokens["attention_mask"]
    with torch.no_grad():
        return model(pixel_values=pixel_values, **inputs).logits_per_image


def adapted(base, texts=True, **overrides):
    model = get_peft_model(base, tiny_config(**({"head": "text", "id2label": LABELS} | overrides)))
    if texts:
        width = find_head(model).head("default").text_embeds.shape[1]
        use_texts(model, torch.randn(3, width, generator=torch.Generator().manual_seed(1)))
    return model.eval()


def logits_of(model, pixel_values, **options):
    with torch.no_grad():
        return model(pixel_values=pixel_values, **options).logits


@pytest.mark.parametrize("kind", ["CLIPModel", "SiglipModel"])
def test_without_prompts_it_is_the_models_own_zero_shot_answer(kind, pixel_values):
    base = two_towers(kind)
    structure, config = str(base), base.config.to_dict()
    sentences = [f"a photo of a {name}." for name in NAMES]
    own = base_predictions(base, pixel_values, sentences)
    model = adapted(base, texts=False)
    use_texts(model, embed_texts(model, tokenizer(), NAMES))
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(model, pixel_values), own)
        assert model.config.id2label == LABELS
    assert (logits_of(model, pixel_values) - own).abs().max() > 1e-3
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all("pgn_generator" in name or "pgn_library" in name for name in trained)
    unloaded = model.unload()
    assert str(unloaded) == structure
    assert unloaded.config.to_dict() == config
    torch.testing.assert_close(base_predictions(unloaded, pixel_values, sentences), own)


def test_several_sentences_of_a_class_are_averaged():
    base = two_towers()
    templates = ("a photo of a {}.", "a sketch of a {}.")
    each = torch.stack([embed_texts(base, tokenizer(), NAMES, [template]) for template in templates])
    mean = torch.nn.functional.normalize(each.mean(dim=0), dim=-1)
    torch.testing.assert_close(embed_texts(base, tokenizer(), NAMES, templates), mean)
    described = {name: [template.replace("{}", name) for template in templates] for name in NAMES}
    torch.testing.assert_close(embed_texts(base, tokenizer(), described), mean)
    tower = CLIPTextModelWithProjection(base.config.text_config).eval()
    tower.config.projection_dim = tower.text_projection.out_features
    assert embed_texts(tower, tokenizer(), NAMES).shape == (3, tower.text_projection.out_features)


@pytest.mark.parametrize("form", ["texts", "linear"])
def test_a_stranger_loads_it_with_every_loader(form, pixel_values, tmp_path):
    base = two_towers()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    model = move_adapter(adapted(base, texts=form == "texts", head="text" if form == "texts" else "trained")).eval()
    expected = logits_of(model, pixel_values)
    Classifier(model, PROCESSOR).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["auto_mapping"] == {
        "base_model_class": "CLIPModel",
        "parent_library": "transformers.models.clip.modeling_clip",
    }
    assert_same(logits_of(AutoPeftModel.from_pretrained(tmp_path / "adapter"), pixel_values), expected)
    quick = PeftModel.from_pretrained(
        type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapter", low_cpu_mem_usage=True
    )
    assert_same(logits_of(quick, pixel_values), expected)
    classifier = load_classifier(tmp_path / "adapter")
    assert_same(logits_of(classifier.model, pixel_values), expected)
    found = classifier.pipeline()(Image.new("RGB", (40, 32), "red"))
    assert {each["label"] for each in found} == set(NAMES)
    assert sum(each["score"] for each in found) == pytest.approx(1, abs=1e-4)


def test_texts_are_embedded_without_dropout():
    clip = two_towers()
    expected = embed_texts(clip, tokenizer(), NAMES)
    clip.config.text_config.attention_dropout = 0.5
    for part in clip.text_model.modules():
        if hasattr(part, "dropout"):
            part.dropout = 0.5
    assert_same(embed_texts(clip.train(), tokenizer(), NAMES), expected)
    assert clip.training


def test_texts_are_there_however_they_were_loaded(pixel_values, tmp_path):
    model = adapted(two_towers())
    expected = logits_of(model, pixel_values)
    model.save_pretrained(tmp_path)
    trained = PeftModel.from_pretrained(two_towers(), tmp_path, is_trainable=True)
    trained(pixel_values=pixel_values, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    second = adapted(two_towers())
    second.load_adapter(tmp_path, "two", is_trainable=True)
    second.set_adapter("two")
    assert_same(logits_of(second, pixel_values), expected)
    third = adapted(two_towers(), texts=False)
    set_peft_model_state_dict(third, get_peft_model_state_dict(model))
    assert_same(logits_of(third, pixel_values), expected)
    fourth = adapted(two_towers(), texts=False)
    fourth.load_state_dict(model.state_dict())
    assert_same(logits_of(fourth, pixel_values), expected)


def test_an_adapter_without_its_texts_is_saved_with_a_warning(tmp_path, caplog):
    model = adapted(two_towers(), texts=False)
    model.save_pretrained(tmp_path / "unset")
    assert "texts" in caplog.text
    caplog.clear()
    use_texts(model, torch.randn(3, 16), logit_scale=10)
    model.save_pretrained(tmp_path / "set")
    PeftModel.from_pretrained(two_towers(), tmp_path / "set")
    assert not caplog.text


def test_siglips_image_tower_needs_scale_and_bias(pixel_values):
    model = adapted(tiny_vit("SiglipVisionModel"), texts=False)
    with refused(ValueError, "logit_scale", "logit_bias"):
        use_texts(model, torch.randn(3, 32))
    use_texts(model, torch.randn(3, 32), logit_scale=112, logit_bias=-16)
    assert logits_of(model, pixel_values).shape == (4, 3)


def test_wrappers_do_not_hide_scale_and_bias():
    model = adapted(two_towers("SiglipModel"), texts=False)
    use_texts(nn.DataParallel(model), torch.randn(3, 32))
    head, base = find_head(model).head("default"), model.get_base_model()
    assert_same(head.logit_scale, base.logit_scale.exp()[0].detach())
    assert_same(head.logit_bias, base.logit_bias[0].detach())


def test_calls_with_texts(pixel_values):
    clip = two_towers()
    inputs = dict(tokenizer()(NAMES, padding="max_length", max_length=12, return_tensors="pt"))
    own = clip(inputs["input_ids"], pixel_values).logits_per_image.detach()
    model = adapted(clip)
    with refused(ValueError, "input_ids"):
        model(pixel_values=pixel_values, **inputs)
    trained = get_peft_model(two_towers(), tiny_config(id2label=LABELS)).eval()
    with trained.disable_adapter(), torch.no_grad():
        assert_same(trained(inputs["input_ids"], pixel_values).logits_per_image, own)
        assert_same(trained(pixel_values=pixel_values, **inputs).logits_per_image, own)


def test_gradients_of_accumulated_batches_are_those_of_one(tmp_path):
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rows = [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(images)]
    norms = []
    for accumulated in (1, 2):
        torch.manual_seed(0)
        model = adapted(two_towers(), generator_norm="group")
        arguments = TrainingArguments(
            str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=8 // accumulated,
            gradient_accumulation_steps=accumulated,
            max_grad_norm=1e9,
            logging_steps=1,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            remove_unused_columns=False,
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        assert trainer.label_names == ["labels"]
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[0] > 0
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_a_mixed_batch_has_texts_of_each_adapter_and_of_none(pixel_values):
    fields = PIXEL | SCALE  # equally many tokens with and without
    model = adapted(two_towers(), **fields)
    model.add_adapter("other", tiny_config(head="text", id2label=LABELS, **fields))
    use_texts(model, torch.randn(3, 16), adapter_name="other")
    move_adapter(model).eval()
    mixed = logits_of(model, pixel_values, adapter_names=["default", "other", "__base__", "default"])
    model.set_adapter("other")
    assert_same(mixed[1:2], logits_of(model, pixel_values[1:2]), valid_pixels=True)
    model.set_adapter("default")
    assert_same(mixed[[0, 3]], logits_of(model, pixel_values[[0, 3]]), valid_pixels=True)
    with model.disable_adapter():
        # The base has the active adapter's texts.
        assert_same(mixed[2:3], logits_of(model, pixel_values[2:3]))


@pytest.mark.parametrize("head", ["text", "trained"])
def test_in_pixel_space_the_client_reads_embeddings(head, pixel_values, tmp_path):
    base = tiny_vit("CLIPVisionModelWithProjection")
    width = base.config.projection_dim
    model = adapted(base, texts=False, head=head, **PIXEL | SCALE)
    if head == "text":
        with refused(ValueError, "use_texts"):
            make_prompter(model, PROCESSOR)
        move_adapter(model)
        texts = np.random.default_rng(0).normal(size=(3, width)).astype("float32")
        use_texts(model, texts, logit_scale=20)
    prompter = make_prompter(model.eval(), PROCESSOR)
    image = Image.fromarray(torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy())
    served = answer(tiny_vit("CLIPVisionModelWithProjection"), prompter.pixel_values([image]))
    expected = logits_of(model, PROCESSOR(image, return_tensors="pt")["pixel_values"])
    assert_same(prompter.classify(served.detach().clone()), expected, tolerance=1e-3)
    prompter.save_pretrained(tmp_path)
    features = torch.randn(2, width)
    assert_same(ImagePrompter.from_pretrained(tmp_path).classify(features), prompter.classify(features))


@pytest.mark.parametrize(
    ("embeds", "options", "word"),
    [
        (torch.randn(3, 15), {}, "(3, 16)"),
        (torch.zeros(3, 16), {}, "zero"),
        (torch.full((3, 16), torch.nan), {}, "finite"),
        (torch.randn(3, 16), {"logit_scale": -1}, "logit_scale"),
        (torch.randn(3, 16), {"adapter_name": "none"}, "none"),
    ],
)
def test_wrong_texts_are_refused(embeds, options, word):
    with refused(ValueError, word):
        use_texts(adapted(two_towers(), texts=False), embeds, **options)


def test_texts_that_are_missing_give_no_logits(pixel_values):
    with refused(ValueError, "text"):
        logits_of(adapted(two_towers(), texts=False).eval(), pixel_values)


@pytest.mark.parametrize(
    ("arguments", "error", "word"),
    [
        ((tiny_vit, NAMES), AttributeError, "ViTForImageClassification"),  # no tower for texts
        ((two_towers, NAMES, ["a photo"]), ValueError, "{}"),
        ((two_towers, {"cat": []}), ValueError, "cat"),
        ((two_towers, LABELS), TypeError, "classes"),
        ((two_towers, {"cat": "a photo of a cat"}), TypeError, "classes"),
        ((two_towers, "cat"), TypeError, "classes"),
    ],
)
def test_what_is_no_list_of_texts_is_not_embedded(arguments, error, word):
    make, *texts = arguments
    with refused(error, word):
        embed_texts(make(), tokenizer(), *texts)


@pytest.mark.parametrize(
    ("make", "fields", "word"),
    [(tiny_vit, {"id2label": LABELS}, "ViTForImageClassification"), (two_towers, {}, "id2label")],
)
def test_models_and_configs_that_cannot_have_texts_are_refused(make, fields, word):
    with refused(ValueError, word):
        get_peft_model(make(), tiny_config(head="text", **fields))


def test_an_adapter_with_another_head_takes_no_texts():
    with refused(ValueError, "text"):
        use_texts(get_peft_model(tiny_vit(), tiny_config()), torch.randn(3, 16))


def test_a_network_of_the_paper_becomes_a_classifier_by_its_texts(pixel_values, tmp_path):
    two_towers().save_pretrained(tmp_path / "clip")
    tokenizer().save_pretrained(tmp_path / "clip")
    PROCESSOR.save_pretrained(tmp_path / "clip")
    torch.manual_seed(0)
    network = official.OfficialNetwork(PromptGenerator(4, 8, width=4).eval(), TokenLibrary(8, 32))
    torch.save(official.state_dict(network), tmp_path / "network.pt")
    import_official.main(
        [
            *("--checkpoint", str(tmp_path / "network.pt"), "--model_name_or_path", str(tmp_path / "clip")),
            *("--labels", "Cat", "dog", "owl", "--output_dir", str(tmp_path / "adapter")),
        ]
    )
    model = load_classifier(tmp_path / "adapter").model
    assert model.config.id2label == {0: "Cat", 1: "dog", 2: "owl"}
    # As the official code computes it: prompts behind the patches, cosines times the model's scale.
    base = two_towers()
    prompts = network.prompts(pixel_values)
    base.vision_model.embeddings.register_forward_hook(lambda _, inputs, tokens: torch.cat([tokens, prompts], dim=1))
    texts = embed_texts(base, tokenizer(), NAMES, ["This is a photo of a {}"])
    with torch.no_grad():
        images = torch.nn.functional.normalize(base.get_image_features(pixel_values).pooler_output, dim=-1)
        expected = base.logit_scale.exp() * images @ texts.mT
    assert_same(logits_of(model, pixel_values), expected)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["text tower", "file"])
def test_the_script_trains_prompts_for_texts(source, tmp_path, capsys):
    command = smoke_arguments(tmp_path)
    command[command.index("--model_name_or_path") + 1] = str(tmp_path / "clip")
    base = two_towers() if source == "text tower" else tiny_vit("CLIPVisionModelWithProjection", projection_dim=16)
    base.save_pretrained(tmp_path / "clip")
    PROCESSOR.save_pretrained(tmp_path / "clip")
    tokenizer().save_pretrained(tmp_path / "clip")
    more = ["--head", "text", "--num_train_epochs", "1", "--templates", "a photo of a {}", "a sketch of a {}"]
    if source == "file":
        save_file({"texts": torch.randn(2, 16)}, tmp_path / "texts.safetensors")
        more += ["--text_embeds", str(tmp_path / "texts.safetensors")]
    results = train_image_classifier.main([*command, *more])
    printed = capsys.readouterr().out
    assert "zero-shot classification has" in printed
    model = load_classifier(command[command.index("--output_dir") + 1]).model
    head = find_head(model).head("default")
    assert head.is_set
    assert results["trainable_parameters"] == sum(
        parameter.numel() for name, parameter in model.named_parameters() if "pgn_" in name
    )
    if source == "text tower":
        expected = embed_texts(
            base, tokenizer(), list(model.config.id2label.values()), ["a photo of a {}", "a sketch of a {}"]
        )
        torch.testing.assert_close(head.text_embeds, expected)


def test_the_script_refuses_texts_for_other_models(tmp_path):
    with pytest.raises(SystemExit, match="`model_name_or_path` must be a model for images and texts with --head text"):
        train_image_classifier.main([*smoke_arguments(tmp_path), "--head", "text"])
