"""A server's answers: as answers about the task, and as evidence of what it saw; and how labels are mapped."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import answer, assert_nearly_equal, assert_same, tiny_config, tiny_vit
from peft import PeftModel, get_peft_model
from PIL import Image
from transformers import ViTImageProcessor, pipeline

from pgn_peft import PGNConfig, frequency_mapping, make_prompter
from pgn_peft.prompter.answers import by_label, read_entries
from pgn_peft.prompter.score_head import one_to_one_head

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD)


def make(head="frozen", **overrides):
    config = {"prompt_space": "pixel", "image_mean": MEAN, "image_std": STD, "num_virtual_tokens": None, "head": head}
    return get_peft_model(tiny_vit(num_labels=20), tiny_config(**(config | overrides))).eval()


def server(processor=PROCESSOR, **overrides):
    return pipeline("image-classification", model=tiny_vit(num_labels=20, **overrides), image_processor=processor)


def photos(number=4):
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(number)]


def test_scores_of_mapped_classes_are_normalised():
    head = one_to_one_head([3, 1], ["crane", "dog", "crane", "owl"])

    def read(**scores):
        return head.read([[{"label": label, "score": score} for label, score in scores.items()]])[0].softmax(-1)

    torch.testing.assert_close(read(crane=0.5, dog=0.3, owl=0.1).float(), torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(read(crane=-1.0, dog=3.0, owl=1.0).float(), torch.tensor([1.0, 3.0]).softmax(-1))
    # Cut short: the best is still the best.
    assert read(crane=0.5, dog=0.3).argmax() == 1
    with pytest.raises(ValueError, match=r"lacks 2 of the 2 that are read, such as 'dog'. .*top_k=4 or more"):
        read(crane=0.5)


def test_answers_come_as_dictionaries_and_as_objects():
    entries = [{"label": "a", "score": 0.7}, SimpleNamespace(label="b", score=0.3)]
    assert read_entries(entries) == [("a", 0.7), ("b", 0.3)]
    assert by_label([("a", 0.7), ("b", 0.3), ("a", 0.1), ("b", 0.4)]) == {"a": 0.7, "b": 0.4}
    for wrong in ("error", {"error": "busy"}, [1, 2], [{"label": "a"}]):
        with pytest.raises(TypeError, match="An answer is a list of entries with `label` and `score`, not .*"):
            read_entries(wrong)


def test_scores_that_are_no_numbers_are_named():
    for score, message in (("12.3%", "could not convert string to float: '12.3%'"), (float("nan"), "of 'cat' is nan")):
        with pytest.raises(ValueError, match=message):
            read_entries([{"label": "dog", "score": 0.3}, {"label": "cat", "score": score}])


def test_a_stock_pipeline_and_the_adapted_model_give_the_same_scores():
    mapping = [7, 3, 11]
    model = make(label_mapping=mapping, id2label={0: "river", 1: "forest", 2: "sea"})
    prompter = make_prompter(model, PROCESSOR)
    images = photos()
    pixel_values = PROCESSOR(images=images, return_tensors="pt")["pixel_values"]
    expected = answer(model, pixel_values).softmax(-1)
    for scores, reply in zip(expected, server()(prompter(images), top_k=20), strict=True):
        found = prompter.read_answer(reply)
        assert sum(entry["score"] for entry in found) == pytest.approx(1)
        assert found[0]["label"] == model.config.id2label[scores.argmax().item()]
        for entry in found:
            assert entry["score"] == pytest.approx(scores[model.config.label2id[entry["label"]]].item(), abs=0.02)


def test_a_head_of_the_adapters_own_classifies_features_at_the_client():
    model = make(head="trained", id2label={0: "river", 1: "forest"})
    images = photos()
    expected = answer(model, PROCESSOR(images=images, return_tensors="pt")["pixel_values"])
    prompter = make_prompter(model, PROCESSOR)
    with torch.no_grad():
        features = tiny_vit(num_labels=20).vit(prompter.pixel_values(images)).last_hidden_state[:, 0]
    assert (prompter.classify(features) - expected).abs().max() < 0.01 * expected.std()
    with pytest.raises(
        ValueError, match=r"has the labels \['LABEL_7'\], not the adapter's, whose head cannot be comp"
    ):
        prompter.read_answer([{"label": "LABEL_7", "score": 1.0}])
    assert prompter.read_answer([{"label": "river", "score": 1.0}])[0]["label"] == "river"
    with pytest.raises(ValueError, match="No head for features: use `read_answer`"):
        make_prompter(make(), PROCESSOR).classify(features)


# A server that sees what is sent, and servers that do not.


def test_a_server_that_sees_what_is_sent_passes_and_its_own_labels_are_passed_on():
    prompter = make_prompter(make(), PROCESSOR)
    assert prompter.read_answer([{"label": "b", "score": 0.3}, {"label": "a", "score": 0.7}])[0]["label"] == "a"
    assert prompter.check_server(server()(prompter.probe())) < 1e-3  # five labels are enough
    assert prompter.check_server(server()(prompter.probe(), top_k=20)) < 1e-3


@pytest.mark.parametrize("fault", ["resize", "jpeg", "other weights", "normalisation"])
def test_a_server_that_sees_something_else_is_found_out(fault):
    prompter = make_prompter(make(), PROCESSOR)
    image, endpoint = prompter.probe(), server()
    if fault == "resize":
        image = image.resize((48, 48)).resize((32, 32))
    elif fault == "jpeg":
        file = io.BytesIO()
        image.save(file, "JPEG", quality=75)
        image = Image.open(file)
    elif fault == "other weights":
        endpoint = server(seed=1)
    else:
        endpoint = server(ViTImageProcessor(size={"height": 32, "width": 32}))
    with pytest.raises(ValueError, match="The answer to the probe differs from the model's by .*% of the largest"):
        prompter.check_server(endpoint(image))


def test_classes_that_share_a_name_do_not_disturb_the_probe():
    names = dict.fromkeys(range(20), "crane") | {2: "dog"}
    config = tiny_config(prompt_space="pixel", image_mean=MEAN, image_std=STD, num_virtual_tokens=None, head="frozen")
    prompter = make_prompter(get_peft_model(tiny_vit(num_labels=20, id2label=names), config), PROCESSOR)
    assert prompter.check_server(server(id2label=names)(prompter.probe(), top_k=20)) < 1e-3


def test_a_server_with_other_labels_is_found_out():
    prompter = make_prompter(make(), PROCESSOR)
    for reply, labels in (([{"label": "cat", "score": 1.0}], r"\['cat'\]"), ([], r"\[\]")):
        with pytest.raises(ValueError, match=f"by inf% of the largest score, with the labels {labels}"):
            prompter.check_server(reply)
    config = tiny_config(prompt_space="pixel", image_mean=MEAN, image_std=STD, num_virtual_tokens=None)
    headless = make_prompter(get_peft_model(tiny_vit("ViTModel"), config), PROCESSOR)
    with pytest.raises(ValueError, match="a model without a classification head: nothing to compare"):
        headless.check_server([{"label": "cat", "score": 1.0}])


# The label mapping.


def test_the_most_frequent_pair_is_fixed_first_and_no_class_is_used_twice():
    # Class 0: five votes for 3; class 1: four for 3, one for 2; class 2: none of its own, mean probability decides.
    votes = [3] * 5 + [3] * 4 + [2] + [3] * 5
    labels = torch.tensor([0] * 5 + [1] * 5 + [2] * 5)
    logits = torch.nn.functional.one_hot(torch.tensor(votes), 5).float() * 5
    logits[10:, 4] = 4.0
    logits[:5] += torch.tensor([0, 0, 0, 3.0, 0])  # class 0 is surer than class 2, which has as many votes
    assert frequency_mapping(logits, labels, 3) == [3, 2, 4]


def test_classes_that_share_a_name_are_left_out():
    logits = torch.eye(3).repeat(4, 1) * 5
    labels = torch.tensor([0, 1, 1] * 4)
    assert frequency_mapping(logits, labels, 2)[0] == 0
    names = {0: "crane", 1: "dog", 2: "crane"}
    with pytest.raises(ValueError, match="2 classes cannot be mapped one to one to a model's 1 classes"):
        frequency_mapping(logits, labels, 2, names)
    assert 0 not in frequency_mapping(torch.randn(20, 6), torch.arange(20) % 2, 2, {**names, 3: "a", 4: "b", 5: "c"})


def test_labels_must_hold_every_class():
    for labels in ([0, 0, 2], [0, 1, 3], [0, 1, -1]):
        with pytest.raises(ValueError, match="a class from 0 to 2, and each class at least 1, but there are 3 labels"):
            frequency_mapping(torch.randn(3, 5), torch.tensor(labels), 3)


def test_a_mapped_head_answers_with_the_models_logits_and_shows_the_tasks_labels(pixel_values, tmp_path):
    base = tiny_vit()
    before, features = answer(base, pixel_values), torch.randn(3, 32)
    mapped = base.classifier(features)[:, [4, 0]]
    model = get_peft_model(
        base, PGNConfig(head="frozen", label_mapping=[4, 0], id2label={0: "a", 1: "b"}, generator_width=4)
    ).eval()
    assert model.config.id2label == {0: "a", 1: "b"}
    assert answer(model, pixel_values).shape == (4, 2)
    assert_same(model.base_model.model.classifier(features), mapped)
    loss = model(pixel_values, labels=torch.tensor([0, 1, 0, 1])).loss
    loss.backward()
    with model.disable_adapter():
        assert torch.equal(answer(model, pixel_values), before)
        assert len(model.config.id2label) == 5
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_vit(), tmp_path, adapter_name="other").eval()
    assert_nearly_equal(answer(loaded, pixel_values), answer(model, pixel_values))
    assert loaded.peft_config["other"].label_mapping == [4, 0]


def test_impossible_mappings_are_refused():
    for mapping in ([1, 1], [-1, 2], [0, 7]):
        with pytest.raises(ValueError, match="`label_mapping` is"):
            get_peft_model(tiny_vit(), tiny_config(head="frozen", label_mapping=mapping))
