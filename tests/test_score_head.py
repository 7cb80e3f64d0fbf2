"""A head on a closed server: from its scores exactly, or fitted to its answers; what it must return is found out."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import answer, assert_same, move_adapter, tiny_config, tiny_vit
from peft import get_peft_model
from PIL import Image
from transformers import ViTImageProcessor, pipeline

from pgn_peft import ImagePrompter, make_prompter
from pgn_peft.nn.heads import fit_ridge
from pgn_peft.prompter.answers import find_scale, log_scores
from pgn_peft.prompter.score_head import check_classes, exact_score_head, fit_label_mapping, fit_to_answers

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
PROCESSOR = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=MEAN, image_std=STD)
CLASSES = 60  # of the tiny server; its features have 32 dimensions


def entries(scores, names=None):
    pairs = enumerate(scores.tolist())
    return [{"label": str(index) if names is None else names[index], "score": score} for index, score in pairs]


@pytest.fixture
def layers():
    """A server's head W, b on 16 features, another head V, c, and features of 50 images."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(40, 16), (40,), (3, 16), (3,), (50, 16)]
    return [torch.randn(*shape, generator=generator) for shape in shapes]


# The exact head.


def test_scores_give_the_logits_of_another_head_on_the_same_features(layers):
    weight, bias, own_weight, own_bias, features = layers
    head = exact_score_head(weight, bias, own_weight, own_bias, [str(n) for n in range(40)])
    logits = features.double() @ weight.double().mT + bias
    expected = features @ own_weight.mT + own_bias
    for scores in (logits.softmax(1), logits.sigmoid(), logits):
        assert (head.read(map(entries, scores)) - expected).abs().max() < 1e-4
    assert head.report.rank == 16
    singular = torch.linalg.svdvals((weight - weight.mean(0)).double())
    assert head.report.condition_number == pytest.approx((singular[0] / singular[-1]).item(), rel=1e-4)


def test_classes_that_share_a_name_are_not_needed(layers):
    weight, bias, own_weight, own_bias, features = layers
    names = ["crane", "crane", *map(str, range(2, 40))]
    head = exact_score_head(weight, bias, own_weight, own_bias, names)
    answers = [entries(row, names) for row in (features @ weight.mT + bias).softmax(1)]
    assert "crane" not in head.labels
    assert (head.read(answers) - (features @ own_weight.mT + own_bias)).abs().max() < 1e-4


def test_a_server_with_too_few_classes_does_not_show_its_features(layers):
    weight, bias, own_weight, own_bias, _ = layers
    names = [str(n) for n in range(40)]
    with pytest.raises(ValueError, match="16 features of the server .* scores of 16 classes, .* have rank 15. Fit"):
        exact_score_head(weight[:16], bias[:16], own_weight, own_bias, names[:16])
    collapsed = weight.clone()
    collapsed[:, 3] = collapsed[:, 4]
    with pytest.raises(ValueError, match="have rank 15. Fit a head to the server's answers: prompter.fit_answers"):
        exact_score_head(collapsed, bias, own_weight, own_bias, names)


# The answers.


def test_missing_classes_are_refused_and_zeros_are_half_the_smallest(layers):
    weight, bias, own_weight, own_bias, features = layers
    head = exact_score_head(weight, bias, own_weight, own_bias, [str(n) for n in range(40)])
    reply = entries((features @ weight.mT + bias).softmax(1)[0])
    with pytest.raises(
        ValueError, match=r"has 5 labels, .* lacks 35 of the 40 that are read, such as '5'. .*top_k=40"
    ):
        head.read([reply[:5]])
    with pytest.raises(ValueError, match=r"such as \['cat'\], and lacks 40 of the 40"):
        head.read([[{"label": "cat", "score": 1.0}]])
    found = log_scores(torch.tensor([[0.9, 0.1, 0.0, math.nan]]), "softmax")[0]
    assert found[:3].tolist() == pytest.approx([math.log(0.9), math.log(0.1), math.log(0.05)])
    assert found[3].isnan()


def test_the_scale_of_scores_is_found():
    for scores, complete, scale in [
        ([0.7, 0.2, 0.1], True, "softmax"),
        ([0.7, 0.2], False, "softmax"),
        ([0.7, 0.0, 0.0], True, "softmax"),  # zeros: rounded
        ([0.7, 0.9, 0.1], True, "sigmoid"),
        ([0.1, 0.2, 0.1], True, "sigmoid"),
        ([0.7, -0.2, 0.1], True, "logits"),
        ([101.0, 0.2], False, "logits"),
        ([70.1, 20.2, 9.6], True, "percent"),
        ([70.0, 21.0, 3.0, 0.0], True, "percent"),  # rounded to whole numbers
    ]:
        assert find_scale([scores], complete) == scale, scores


def test_scores_in_percent_are_read_as_probabilities(layers):
    weight, bias, own_weight, own_bias, features = layers
    scores, expected = (features @ weight.mT + bias).softmax(1), features @ own_weight.mT + own_bias
    head = exact_score_head(weight, bias, own_weight, own_bias, [str(n) for n in range(40)])
    assert (head.read(map(entries, 100 * scores)) - expected).abs().max() < 1e-3
    labels = expected.argmax(1)
    fitted, in_percent = (fit_to_answers(map(entries, part), labels, 3) for part in (scores, 100 * scores))
    assert in_percent.scale == "percent"
    assert in_percent.report.kind == fitted.report.kind
    assert in_percent.report.accuracy == fitted.report.accuracy
    assert (in_percent.read(map(entries, 100 * scores)) - fitted.read(map(entries, scores))).abs().max() < 1e-3
    few = [entries(100 * row)[:5] for row in scores]  # of the same classes
    with pytest.raises(ValueError, match="can be percentages or logits. Divide percentages by 100"):
        fit_to_answers(few, labels, 3)


def test_the_probe_is_also_compared_in_percent():
    prompter = make_prompter(make(), PROCESSOR)
    reply = entries(100 * prompter.probe_scores, list(prompter.server_labels.values()))
    assert prompter.check_server(reply) < 1e-3
    assert prompter.check_server(reply[:5]) < 1e-3


# Heads fitted to answers.


def test_ridge_recovers_a_linear_rule(layers):
    weight, bias, own_weight, _, _ = layers
    features = torch.randn(600, 16, generator=torch.Generator().manual_seed(1))
    labels = (features @ own_weight[:2].mT).argmax(1)
    answers = list(map(entries, (features @ weight.mT + bias).softmax(1)))
    head = fit_to_answers(answers[:400], labels[:400], 2)
    assert (head.report.kind, head.report.top_k) == ("ridge", None)
    accuracy = (head.read(answers[400:]).argmax(1) == labels[400:]).double().mean()
    assert accuracy > 0.9
    assert head.report.accuracy == pytest.approx(accuracy.item(), abs=0.04)
    read = weight[[int(label) for label in head.labels]]
    found = (head.weight @ (read - read.mean(0))).diff(dim=0)[0]  # on the features
    assert torch.cosine_similarity(found, own_weight[1] - own_weight[0], dim=0) > 0.97
    with pytest.raises(ValueError, match="Ask the server for all of its labels"):
        head.read([answers[0][:5]])


def test_ridge_probabilities_are_those_of_held_out_images():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(600, 2, generator=generator)
    labels = (torch.rand(600, generator=generator) < (3 * features[:, 0]).sigmoid()).long()
    weight, bias, _ = fit_ridge(features, labels, 2)
    probability = (features.double() @ weight.mT + bias).softmax(1)[:, 1]
    assert (probability - (3 * features[:, 0]).sigmoid()).abs().mean() < 0.05


def test_a_label_mapping_by_hand():
    probabilities = torch.tensor([[0.8, 0.2, 0.0], [0.6, 0.0, 0.4], [0.0, 0.5, 0.5]])
    # Sums by class: (1.4, 0.2, 0.4) and (0, 0.5, 0.5); over the server's classes, plus 1: 2.4, 1.7, 1.9.
    rows = [[1.4 / 2.4, 0.2 / 1.7, 0.4 / 1.9], [0.0, 0.5 / 1.7, 0.5 / 1.9]]
    expected = torch.tensor([[value / sum(row) for value in row] for row in rows])
    weight, _ = fit_label_mapping(probabilities, torch.tensor([0, 0, 1]), 2)
    torch.testing.assert_close(weight, expected)


def test_answers_of_the_best_labels_only_can_be_fitted():
    # Class 0 looks like "0" or "1" to the server, class 1 like "2" or "3"; others come at random.
    random = np.random.default_rng(0)
    labels = [n % 2 for n in range(80)]
    answers = [
        [
            {"label": str(2 * label + random.integers(2)), "score": 0.6},
            {"label": str(random.integers(4, 30)), "score": 0.2},
        ]
        for label in labels
    ]
    head = fit_to_answers(answers, labels, 2)
    assert head.report.top_k == 2
    assert head.report.accuracy == 1
    assert head.read([[{"label": "1", "score": 0.5}], [{"label": "2", "score": 0.5}]]).argmax(1).tolist() == [0, 1]
    assert head.read([[{"label": "never seen", "score": 0.5}]]).isfinite().all()
    more = [{"label": str(label), "score": 0.01} for label in (2, 3)]
    assert_same(head.read([answers[0] + more]), head.read([answers[0]]))


def test_raw_logits_can_be_fitted_and_labels_must_suit_answers():
    features = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
    labels = (features[:, 0] > features[:, 1]).long()
    head = fit_to_answers(map(entries, features), labels, 2)
    assert (head.scale, head.report.kind) == ("logits", "ridge")
    assert head.report.accuracy > 0.8
    for wrong, number in (([0, 1, 0], 60), ([0, 0, 1], 3), ([0, 0, 1, 2], 4), ([0, 0, 1, 1, -1], 5)):
        with pytest.raises(ValueError, match=f"`labels` must give each of the {number} images a class from 0 to 1"):
            check_classes(wrong, number, 2)


def test_an_image_for_which_a_server_finds_nothing_can_be_fitted_and_read():
    labels = [n % 2 for n in range(20)]
    answers = [[{"label": "ab"[label], "score": 0.6}] if n > 3 else [] for n, label in enumerate(labels)]
    head = fit_to_answers(answers, labels, 2)
    assert head.read([answers[5], answers[6], []]).argmax(1).tolist()[:2] == [1, 0]


# The client.


def make(head="trained", **overrides):
    config = {"prompt_space": "pixel", "image_mean": MEAN, "image_std": STD, "num_virtual_tokens": None, "head": head}
    config |= {"id2label": {0: "river", 1: "forest", 2: "sea"}}
    return move_adapter(get_peft_model(tiny_vit(num_labels=CLASSES), tiny_config(**(config | overrides)))).eval()


def photos(number=4):
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)) for _ in range(number)]


@pytest.mark.parametrize("function", [None, "none"])
def test_a_trained_head_works_through_a_stock_pipeline(function):
    model = make()
    prompter = make_prompter(model, PROCESSOR)
    assert (prompter.score_head.report.kind, prompter.score_head.report.rank) == ("exact", 32)
    images = photos()
    expected = answer(model, PROCESSOR(images=images, return_tensors="pt")["pixel_values"]).softmax(-1)
    server = pipeline("image-classification", model=tiny_vit(num_labels=CLASSES), image_processor=PROCESSOR)
    options = {"top_k": CLASSES} | ({} if function is None else {"function_to_apply": function})
    for scores, reply in zip(expected, server(prompter(images), **options), strict=True):
        found = {entry["label"]: entry["score"] for entry in prompter.read_answer(reply)}
        assert list(found.values()) == sorted(found.values(), reverse=True)
        for index, label in model.config.id2label.items():
            assert found[label] == pytest.approx(scores[index].item(), abs=0.02)
    assert prompter.check_server(server(prompter.probe(), **options)) < 1e-3
    with pytest.raises(ValueError, match="lacks 55 of the 60 that are read"):
        prompter.read_answer(server(prompter.probe()))


def test_only_heads_that_scores_determine_are_attached():
    assert make_prompter(make("frozen", id2label=None), PROCESSOR).score_head is None
    assert make_prompter(make(problem_type="multi_label_classification"), PROCESSOR).score_head is None
    small = get_peft_model(tiny_vit(num_labels=20), make().peft_config["default"])
    prompter = make_prompter(small, PROCESSOR)
    assert prompter.score_head is None
    with pytest.raises(
        ValueError, match=r"cannot be computed from this server's scores. Fit .* \(prompter.fit_answers"
    ):
        prompter.read_answer([{"label": "LABEL_7", "score": 1.0}])


def test_a_head_fitted_to_answers_is_used_and_saved(tmp_path):
    prompter = make_prompter(make("frozen", label_mapping=[7, 3, 11]), PROCESSOR)
    answers = [[{"label": str(n % 3 + 10), "score": 0.5 + 0.01 * n}, {"label": "20", "score": 0.1}] for n in range(30)]
    assert prompter.fit_answers(answers, [n % 3 for n in range(30)]) == 1
    assert prompter.read_answer(answers[2])[0]["label"] == "sea"
    prompter.save_pretrained(tmp_path)
    loaded = ImagePrompter.from_pretrained(tmp_path)
    assert_same(loaded.read_answer(answers[2]), prompter.read_answer(answers[2]))
    assert_same(loaded.score_head.report, prompter.score_head.report)
    card = loaded.make_card("someone/prompter").text
    assert "fitted to the server's answers" in card
    assert "top_k=2)" in card


def test_an_exact_head_is_saved_and_the_card_says_so(tmp_path):
    prompter = make_prompter(make(), PROCESSOR)
    prompter.save_pretrained(tmp_path)
    loaded = ImagePrompter.from_pretrained(tmp_path)
    assert_same(loaded.score_head.report, prompter.score_head.report)
    reply = entries(prompter.probe_scores, list(prompter.server_labels.values()))
    assert_same(loaded.read_answer(reply), prompter.read_answer(reply))
    card = prompter.make_card("someone/prompter").text
    assert "own head, computed from all scores of the server's head |" in card
    assert "top_k=60" in card
    mapped = make_prompter(make("frozen", label_mapping=[7, 3, 11]), PROCESSOR)
    assert "one of the server's classes for each of the task's" in mapped.make_card("someone/prompter").text


def test_a_damaged_score_head_is_refused(tmp_path):
    make_prompter(make(), PROCESSOR).save_pretrained(tmp_path)
    file = tmp_path / "prompter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for change, message in [
        ({"labels": 3}, "cannot be read .*TypeError"),
        ({"labels": ["a"]}, r"score_head.weight has the shape \(3, 60\) instead of \(3, 1\)"),
    ]:
        score_head = config["score_head"] | change
        file.write_text(json.dumps(config | {"score_head": score_head}), encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            ImagePrompter.from_pretrained(tmp_path)
