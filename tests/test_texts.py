"""Texts as classes, and heads of an adapter's own on models that have none."""

import copy
import json
import pickle

import import_official
import pytest
import torch
import train_image_classifier
from conftest import answer, assert_nearly_equal, move_adapter, tiny_config, tiny_vit
from peft import AutoPeftModel, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import save_file
from smoke_material import smoke_arguments
from tiny_clip import NAMES, tokenizer, two_towers
from transformers import CLIPImageProcessor, CLIPTextModelWithProjection, Trainer, TrainingArguments

from pgn_peft import Classifier, embed_texts, load_classifier, make_prompter, official, use_texts
from pgn_peft.nn.generator import PromptGenerator
from pgn_peft.nn.library import TokenLibrary
from pgn_peft.nn.text_head import TextHead
from pgn_peft.training import head_alone
from pgn_peft.tuner.head import find_head

LABELS = dict(enumerate(NAMES))
PROCESSOR = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
HEADLESS = [
    "ViTModel",
    "DeiTModel",
    "Dinov2WithRegistersModel",
    "IJepaModel",
    "CLIPVisionModelWithProjection",
    "SiglipVisionModel",
    "DINOv3ViTModel",
    "BeitModel",
    "Aimv2VisionModel",
    "TimmWrapperModel",
]


def own_answer(model, pixel_values, sentences):
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
    own = own_answer(base, pixel_values, sentences)
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
    torch.testing.assert_close(own_answer(unloaded, pixel_values, sentences), own)


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
    fields = {"linear": {"head": "trained"}, "texts": {}}[form]
    model = move_adapter(adapted(base, texts=form != "linear", **fields)).eval()
    expected = logits_of(model, pixel_values)
    Classifier(model, PROCESSOR).save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["auto_mapping"] == {
        "base_model_class": "CLIPModel",
        "parent_library": "transformers.models.clip.modeling_clip",
    }
    assert_nearly_equal(logits_of(AutoPeftModel.from_pretrained(tmp_path / "adapter"), pixel_values), expected)
    quick = PeftModel.from_pretrained(
        type(base).from_pretrained(tmp_path / "base"), tmp_path / "adapter", low_cpu_mem_usage=True
    )
    assert_nearly_equal(logits_of(quick, pixel_values), expected)
    classifier = load_classifier(tmp_path / "adapter")
    assert_nearly_equal(logits_of(classifier.model, pixel_values), expected)
    found = classifier.pipeline()(Image.new("RGB", (40, 32), "red"))
    assert {each["label"] for each in found} == set(NAMES)
    assert sum(each["score"] for each in found) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("architecture", HEADLESS)
def test_a_model_without_a_head_gets_one_and_gives_it_back(architecture, pixel_values, tmp_path):
    base = tiny_vit(architecture)
    before, structure, config, kind = answer(base, pixel_values), str(base), base.config.to_dict(), type(base)
    model = move_adapter(get_peft_model(base, tiny_config(id2label=LABELS))).eval()
    expected = logits_of(model, pixel_values)
    assert expected.shape == (4, 3)
    assert model.config.id2label == LABELS
    with model.disable_adapter():
        assert torch.equal(answer(model, pixel_values), before)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with model.disable_adapter():  # a copy follows its own switches
            assert_nearly_equal(logits_of(copied, pixel_values), expected)
    torch._dynamo.reset()  # which counts compilations of all models together
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(logits_of(compiled, pixel_values), expected)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(architecture), tmp_path)
    assert_nearly_equal(logits_of(loaded, pixel_values), expected)
    inside = tiny_vit(architecture)
    inside.load_adapter(str(tmp_path))
    assert_nearly_equal(logits_of(inside.eval(), pixel_values), expected)
    unloaded = model.unload()
    assert type(unloaded) is kind
    assert str(unloaded) == structure
    assert unloaded.config.to_dict() == config
    assert_nearly_equal(answer(unloaded, pixel_values), before)


@pytest.mark.parametrize(("architecture", "reference"), [("ViTModel", "ViTFor"), ("Dinov2Model", "Dinov2For")])
def test_such_a_head_reads_what_transformers_classifiers_read(architecture, reference, pixel_values):
    model = move_adapter(get_peft_model(tiny_vit(architecture), tiny_config(id2label=LABELS))).eval()
    classifier = move_adapter(
        get_peft_model(tiny_vit(f"{reference}ImageClassification"), tiny_config(id2label=LABELS))
    ).eval()
    names = {name.partition(".pgn_")[2]: tensor for name, tensor in model.state_dict().items() if ".pgn_" in name}
    for name, tensor in classifier.state_dict().items():
        if ".pgn_" in name:
            tensor.copy_(names[name.partition(".pgn_")[2]])
    backbone = getattr(classifier.get_base_model(), reference.lower().removesuffix("for"))
    own = {name: tensor for name, tensor in backbone.state_dict().items() if "pgn_" not in name}
    model.get_base_model().load_state_dict(own, strict=False)
    torch.testing.assert_close(logits_of(model, pixel_values), logits_of(classifier, pixel_values))


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
    scale = {"image_mean": list(PROCESSOR.image_mean), "image_std": list(PROCESSOR.image_std)}
    fields = {"prompt_space": "pixel", "num_virtual_tokens": None, **scale}  # equally many tokens with and without
    model = adapted(two_towers(), **fields)
    model.add_adapter("other", tiny_config(head="text", id2label=LABELS, **fields))
    use_texts(model, torch.randn(3, 16), adapter_name="other")
    move_adapter(model).eval()
    names = ["default", "other", "__base__", "default"]
    mixed = logits_of(model, pixel_values, adapter_names=names)
    model.set_adapter("other")
    assert_nearly_equal(mixed[1:2], logits_of(model, pixel_values[1:2]))
    model.set_adapter("default")
    assert_nearly_equal(mixed[[0, 3]], logits_of(model, pixel_values[[0, 3]]))
    with model.disable_adapter():
        assert_nearly_equal(mixed[2:3], logits_of(model, pixel_values[2:3]))


def test_without_texts_of_its_own_the_base_cannot_answer_in_a_mixed_batch(pixel_values):
    model = move_adapter(get_peft_model(tiny_vit("ViTModel"), tiny_config(id2label=LABELS))).eval()
    with pytest.raises(ValueError, match="cat, dog, owl and '__base__' with features"):
        model(pixel_values, adapter_names=["default", "__base__", "default", "default"])


def test_in_pixel_space_the_client_reads_embeddings(pixel_values):
    scale = {"image_mean": list(PROCESSOR.image_mean), "image_std": list(PROCESSOR.image_std)}
    base = tiny_vit("CLIPVisionModelWithProjection")
    model = move_adapter(adapted(base, texts=False, prompt_space="pixel", num_virtual_tokens=None, **scale))
    use_texts(model, torch.randn(3, base.config.projection_dim), logit_scale=20)
    prompter = make_prompter(model.eval(), PROCESSOR)
    image = Image.fromarray(torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8).numpy())
    served = answer(tiny_vit("CLIPVisionModelWithProjection"), prompter.pixel_values([image]))
    expected = logits_of(model, PROCESSOR(image, return_tensors="pt")["pixel_values"])
    torch.testing.assert_close(prompter.classify(served.detach().clone()), expected, atol=1e-3, rtol=1e-4)


def test_what_a_head_alone_reaches_is_measured_on_them_too(pixel_values):
    batches = [{"pixel_values": pixel_values.repeat(3, 1, 1, 1), "labels": torch.arange(12) % 3}]
    for model in (
        adapted(two_towers()),
        get_peft_model(tiny_vit("ViTModel"), tiny_config(id2label=LABELS)),
    ):
        found = head_alone(model, batches, batches)
        assert 0 <= found.linear <= 1
        assert (found.own is None) == (type(model.get_base_model()).__name__ == "ViTModel")
        assert logits_of(model, pixel_values).shape == (4, 3)


@pytest.mark.parametrize(
    ("embeds", "options", "message"),
    [
        (torch.randn(3, 15), {}, r"`text_embeds` must have the shape \(3, 16\)"),
        (torch.zeros(3, 16), {}, "`text_embeds` must be finite and not zero"),
        (torch.full((3, 16), torch.nan), {}, "`text_embeds` must be finite"),
        (torch.randn(3, 16), {"logit_scale": -1}, "`logit_scale` must be a finite number"),
        (torch.randn(3, 16), {"adapter_name": "none"}, "`adapter_name` must be one of the model's adapters"),
    ],
)
def test_wrong_texts_are_refused(embeds, options, message):
    with pytest.raises(ValueError, match=message):
        use_texts(adapted(two_towers(), texts=False), embeds, **options)


def test_what_cannot_have_texts_is_refused(pixel_values):
    with pytest.raises(ValueError, match=r"`head` must be 'trained' or 'frozen' for a ViTForImage.*CLIPModel"):
        get_peft_model(tiny_vit(), tiny_config(head="text", id2label=LABELS))
    with pytest.raises(ValueError, match="`id2label` must name the classes with head='text'"):
        get_peft_model(two_towers(), tiny_config(head="text"))
    with pytest.raises(ValueError, match="`text_correction` must be False with head='trained'"):
        tiny_config(text_correction=True)
    with pytest.raises(ValueError, match="`text_embeds` must be unit vectors, given before"):
        logits_of(adapted(two_towers(), texts=False), pixel_values)
    with pytest.raises(ValueError, match="`adapter_name` must name an adapter with head='text'"):
        use_texts(get_peft_model(tiny_vit(), tiny_config()), torch.randn(3, 16))
    with pytest.raises(TypeError, match="`model` must have a text tower, but got ViTForImageClassification"):
        embed_texts(tiny_vit(), tokenizer(), NAMES)
    with pytest.raises(ValueError, match=r"`templates` must hold '\{\}' each"):
        embed_texts(two_towers(), tokenizer(), NAMES, ["a photo"])
    with pytest.raises(ValueError, match="`classes` must have a text for each class"):
        embed_texts(two_towers(), tokenizer(), {"cat": []})
    model = get_peft_model(tiny_vit("ViTModel"), tiny_config(id2label=LABELS))
    with (
        model.disable_adapter(),
        pytest.raises(ValueError, match="`labels` must be left out where no adapter with a head is active"),
    ):
        model(pixel_values, labels=torch.tensor([0, 1, 2, 0]))


def test_texts_stay_nan_until_they_are_given():
    head = TextHead(4, 3)
    assert not head.eval().is_set
    head.set_texts(torch.randn(3, 4), 10)
    assert head.train().is_set
    torch.testing.assert_close(head.text_embeds.norm(dim=-1), torch.ones(3))
    head.half().eval()
    assert head.is_set


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
    assert_nearly_equal(logits_of(model, pixel_values), expected)


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


def test_the_script_trains_a_head_on_a_model_without_one(tmp_path):
    command = smoke_arguments(tmp_path)
    command[command.index("--model_name_or_path") + 1] = str(tmp_path / "dino")
    tiny_vit("DINOv3ViTModel").save_pretrained(tmp_path / "dino")
    PROCESSOR.save_pretrained(tmp_path / "dino")
    train_image_classifier.main([*command, "--num_train_epochs", "1"])
    classifier = load_classifier(command[command.index("--output_dir") + 1])
    assert classifier.pipeline()(Image.new("RGB", (40, 32), "red"))[0]["score"] <= 1


def test_the_script_refuses_texts_for_other_models(tmp_path):
    with pytest.raises(SystemExit, match="`model_name_or_path` must be a model for images and texts with --head text"):
        train_image_classifier.main([*smoke_arguments(tmp_path), "--head", "text"])
