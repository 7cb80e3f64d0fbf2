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
from pgn_peft.prompter.answers import by_label, map_scores, read_entries

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


def test_scores_are_mapped_by_index_and_made_to_sum_to_one():
    server_labels = {0: "crane", 1: "dog", 2: "crane", 3: "owl"}
    scores = {"crane": 0.5, "dog": 0.3, "owl": 0.1}
    mapped = map_scores(scores, {0: "river", 1: "forest"}, [3, 1], server_labels)
    assert mapped == pytest.approx({"river": 0.25, "forest": 0.75})
    # Cut short: the best is still the best, and nothing is said of how sure the model is.
    assert map_scores({"crane": 0.5, "dog": 0.3}, {0: "river", 1: "forest"}, [3, 1], server_labels) == {"forest": 0.3}
    with pytest.raises(ValueError, match="like 'owl', but got 'crane'. Ask the server for all its labels: top_k=4"):
        map_scores({"crane": 0.5}, {0: "river", 1: "forest"}, [3, 1], server_labels)


def test_answers_come_as_dictionaries_and_as_objects():
    entries = [{"label": "a", "score": 0.7}, SimpleNamespace(label="b", score=0.3)]
    assert read_entries(entries) == [("a", 0.7), ("b", 0.3)]
    assert by_label([("a", 0.7), ("b", 0.3), ("a", 0.1), ("b", 0.4)]) == {"a": 0.7, "b": 0.4}
    for wrong in ("error", [1, 2], [{"label": "a"}], 7):
        with pytest.raises(TypeError, match="`answer` must be a list of entries with `label` and `score`, but got"):
            read_entries(wrong)


@pytest.mark.parametrize("score", ["12.3%", float("nan"), "none"])
def test_scores_that_are_no_numbers_are_named(score):
    with pytest.raises(ValueError, match=f"The score of 'cat' is {score!r}. Pass finite numbers"):
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


def test_without_a_mapping_the_answer_is_passed_on():
    prompter = make_prompter(make(), PROCESSOR)
    assert prompter.read_answer([{"label": "b", "score": 0.3}, {"label": "a", "score": 0.7}])[0]["label"] == "a"


def test_a_head_of_the_adapters_own_classifies_features_at_the_client():
    model = make(head="trained", id2label={0: "river", 1: "forest"})
    images = photos()
    expected = answer(model, PROCESSOR(images=images, return_tensors="pt")["pixel_values"])
    prompter = make_prompter(model, PROCESSOR)
    with torch.no_grad():
        features = tiny_vit(num_labels=20).vit(prompter.pixel_values(images)).last_hidden_state[:, 0]
    assert (prompter.classify(features) - expected).abs().max() < 0.01 * expected.std()
    with pytest.raises(ValueError, match="`answer` must be about the adapter's own classes, but got 'LABEL_7'"):
        prompter.read_answer([{"label": "LABEL_7", "score": 1.0}])
    assert prompter.read_answer([{"label": "river", "score": 1.0}])[0]["label"] == "river"
    with pytest.raises(
        ValueError, match="`features` must be for an adapter with a head of its own, but got head='frozen'"
    ):
        make_prompter(make(), PROCESSOR).classify(features)


# A server that sees what is sent, and servers that do not.


def test_a_server_that_sees_what_is_sent_passes():
    prompter = make_prompter(make(), PROCESSOR)
    assert prompter.check_server(server()(prompter.probe())) < 1e-3  # five labels are enough
    assert prompter.check_server(server()(prompter.probe(), top_k=20)) < 1e-3


@pytest.mark.parametrize("fault", ["resize", "crop", "jpeg", "other weights", "normalisation"])
def test_a_server_that_sees_something_else_is_found_out(fault):
    prompter = make_prompter(make(), PROCESSOR)
    image, endpoint = prompter.probe(), server()
    if fault == "resize":
        image = image.resize((48, 48)).resize((32, 32))
    elif fault == "crop":
        image = image.crop((2, 2, 30, 30))
    elif fault == "jpeg":
        file = io.BytesIO()
        image.save(file, "JPEG", quality=75)
        image = Image.open(file)
    elif fault == "other weights":
        endpoint = server(seed=1)
    else:
        endpoint = server(ViTImageProcessor(size={"height": 32, "width": 32}))
    with pytest.raises(
        ValueError, match="`answer` must be the model's answer to the probe, but got scores that differ by"
    ):
        prompter.check_server(endpoint(image))


def test_classes_that_share_a_name_do_not_disturb_the_probe():
    names = dict.fromkeys(range(20), "crane") | {2: "dog"}
    config = tiny_config(prompt_space="pixel", image_mean=MEAN, image_std=STD, num_virtual_tokens=None, head="frozen")
    prompter = make_prompter(get_peft_model(tiny_vit(num_labels=20, id2label=names), config), PROCESSOR)
    assert prompter.check_server(server(id2label=names)(prompter.probe(), top_k=20)) < 1e-3


def test_a_server_with_other_labels_is_found_out():
    prompter = make_prompter(make(), PROCESSOR)
    with pytest.raises(ValueError, match="`answer` must hold the model's labels, but got 'cat'"):
        prompter.check_server([{"label": "cat", "score": 1.0}])
    with pytest.raises(ValueError, match="`answer` must hold the model's labels, but got none"):
        prompter.check_server([])


def test_a_model_without_a_head_has_no_probe_scores():
    config = tiny_config(prompt_space="pixel", image_mean=MEAN, image_std=STD, num_virtual_tokens=None)
    prompter = make_prompter(get_peft_model(tiny_vit("ViTModel"), config), PROCESSOR)
    with pytest.raises(ValueError, match="`probe_scores` must be known to check a server, but got None"):
        prompter.check_server([{"label": "cat", "score": 1.0}])


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
    with pytest.raises(ValueError, match="`num_labels` must be at most 1, .* but got 2"):
        frequency_mapping(logits, labels, 2, names)
    assert 0 not in frequency_mapping(torch.randn(20, 6), torch.arange(20) % 2, 2, {**names, 3: "a", 4: "b", 5: "c"})


@pytest.mark.parametrize("labels", [[0, 0, 2], [0, 1, 3], [0, 1, -1]])
def test_labels_must_hold_every_class(labels):
    with pytest.raises(ValueError, match=r"`labels` must hold each of the classes 0..2, but got"):
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
    model.add_adapter("second", tiny_config(num_labels=3))
    model.delete_adapter("default")
    assert not model.base_model.model.classifier.label_mapping


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"label_mapping": [1, 1]}, ValueError, r"`label_mapping` must give .* but got \[1\] more than once"),
        ({"label_mapping": [-1, 2]}, ValueError, r"`label_mapping` must give .* but got \[-1, 2\]"),
        ({"label_mapping": []}, ValueError, r"`label_mapping` must give .* but got \[\]"),
        ({"label_mapping": "dog"}, TypeError, "`label_mapping` must be a list of class indices, but got 'dog'"),
        ({"label_mapping": [0, 1], "num_labels": 3}, ValueError, "an index for each of the 3 classes, but got 2"),
        ({"label_mapping": [0, 1], "head": "trained"}, ValueError, "`label_mapping` must be None with head='trained'"),
    ],
)
def test_impossible_mappings_are_refused(fields, error, message):
    with pytest.raises(error, match=message):
        PGNConfig(**({"head": "frozen"} | fields))


def test_a_mapping_to_classes_the_model_has_not_is_refused():
    with pytest.raises(ValueError, match="`label_mapping` must hold class indices of the model, 0..4, but got 7"):
        get_peft_model(tiny_vit(), tiny_config(head="frozen", label_mapping=[0, 7]))
