"""Adapting by calls alone: what is sent, how often, what is chosen, and what is saved."""

import argparse
import importlib
import io
import json
import re
import threading

import datasets
import numpy as np
import pytest
import torch
from conftest import HANG, tiny_vit
from huggingface_hub import ModelCard
from PIL import Image
from torch.nn import functional as F
from transformers import ViTImageProcessor

from pgn_peft.nn.heads import PENALTIES, _solve, fit_ridge
from pgn_peft.nn.preprocessing import Adjustment
from pgn_peft.prompter import Calls, ImagePrompter, Views, adapt_black_box
from pgn_peft.prompter.black_box import NOTHING, make_candidates, plan_rungs

SIDE = 16
NAMES = ["river", "forest"]


def images(number, colour=(100, 100, 100), noise=30):
    random = np.random.default_rng(0)
    pixels = np.array(colour) + random.integers(-noise, noise + 1, size=(number, SIDE, SIDE, 3))
    return [Image.fromarray(each.astype(np.uint8)) for each in pixels]


def decoded(file):
    return torch.from_numpy(np.array(Image.open(io.BytesIO(file)))).float()  # (H, W, C)


def as_scores(logits, top_k=None):
    values, places = torch.as_tensor(logits).double().softmax(0).sort(descending=True)
    pairs = zip(places.tolist()[:top_k], values.tolist(), strict=False)
    return [{"label": f"class {place}", "score": value} for place, value in pairs]


# Calls.


def test_each_file_is_sent_once_also_by_a_later_run(tmp_path):
    sent = []

    def call(file):
        sent.append(file)
        return [decoded(file).mean().item(), 1.0]

    some = images(4)
    calls = Calls(call, tmp_path / "cache")
    first = calls.answers([*some, some[0]])
    assert [answer[0] for answer in first] == [decoded(file).mean().item() for file in map(png, [*some, some[0]])]
    assert calls.made == len(sent) == 4
    again = Calls(call, tmp_path / "cache")
    assert again.answers(some) == first[:4]
    assert again.made == 0
    other = Calls(call, tmp_path / "cache", server="another")
    assert (other.answers(some), other.made) == (first[:4], 4)


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_an_interrupted_run_keeps_its_answers(tmp_path):
    some = images(6)

    def interrupted(file):
        if np.array_equal(decoded(file), np.array(some[4])):
            raise KeyboardInterrupt
        return [1.0]

    with pytest.raises(KeyboardInterrupt):
        Calls(interrupted, tmp_path / "cache", workers=1).answers(some)
    calls = Calls(lambda file: [1.0], tmp_path / "cache")
    calls.answers(some)
    assert calls.made < 6


def test_a_failing_call_is_repeated_and_at_last_raised():
    failures = iter([OSError("503"), ValueError("not JSON")])

    def call(file):
        for failure in failures:
            raise failure
        return [1.0]

    assert Calls(call, attempts=3, workers=1, seconds=0).answers(images(1)) == [[1.0]]

    def broken(file):
        raise OSError("the server is gone")

    with pytest.raises(OSError, match="the server is gone"):
        Calls(broken, attempts=2, seconds=0).answers(images(1))


def test_calls_are_made_at_the_same_time():
    together = threading.Barrier(3, timeout=HANG)
    Calls(lambda file: [float(together.wait())], workers=3, attempts=1).answers(images(3))


def test_answers_of_all_kinds_become_plain_ones():
    class Entry:
        label, score = "river", 0.5

    for answer, expected in [
        ([Entry()], [{"label": "river", "score": 0.5}]),
        ([{"label": "river", "score": 0.5, "box": 1}], [{"label": "river", "score": 0.5}]),
        (torch.tensor([0.5, 2]), [0.5, 2.0]),
        (np.array([1, 2], dtype=np.float32), [1.0, 2.0]),
    ]:
        assert Calls(lambda file, answer=answer: answer).answers(images(1)) == [expected]


def test_files_are_png_or_jpeg():
    formats = []
    for quality in (None, 90):
        Calls(lambda file: formats.append(Image.open(io.BytesIO(file)).format) or [1.0], jpeg_quality=quality).answers(
            images(1)
        )
    assert formats == ["PNG", "JPEG"]


# What is sent.


def test_adjustments_are_what_their_names_say():
    pixels = torch.tensor([0.25, 0.5, 0.75]).view(1, 1, 1, 3)
    for adjustment, expected in [
        (Adjustment(), [0.25, 0.5, 0.75]),
        (Adjustment(mirrored=True), [0.75, 0.5, 0.25]),
        (Adjustment(stretched=True), [0.0, 0.5, 1.0]),
        (Adjustment(contrast=2), [0.0, 0.5, 1.0]),
        (Adjustment(mirrored=True, contrast=0.5), [0.625, 0.5, 0.375]),
    ]:
        torch.testing.assert_close(adjustment.apply(pixels).flatten(), torch.tensor(expected))


def test_a_colour_is_added_to_all_pixels():
    candidates = make_candidates(SIDE)
    grey = Image.new("RGB", (40, 30), (100, 100, 20))
    assert (np.array(candidates["red"](grey)) == (160, 70, 0)).all()
    assert (np.array(candidates[NOTHING](grey)) == (100, 100, 20)).all()
    assert candidates["red"](grey).size == (SIDE, SIDE)


def test_tiles_fill_images_of_any_size():
    assert make_candidates(224)["tile 0"].layout.patch_size == 16
    assert make_candidates(518)["tile 0"].layout.patch_size == 14


def test_an_adjusted_prompter_is_saved_and_earlier_files_load(tmp_path):
    prompter = make_candidates(SIDE)["contrast 1.6"]
    prompter.save_pretrained(tmp_path)
    loaded = ImagePrompter.from_pretrained(tmp_path)
    assert loaded.adjustment == prompter.adjustment
    assert np.array_equal(np.array(loaded(images(1)[0])), np.array(prompter(images(1)[0])))
    file = tmp_path / "prompter_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    del settings["adjustment"]
    file.write_text(json.dumps(settings), encoding="utf-8")
    assert ImagePrompter.from_pretrained(tmp_path).adjustment == Adjustment()


# What is chosen.


def test_ridge_regression_of_more_features_than_images_has_the_same_solution():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(8, 12, generator=generator, dtype=torch.float64)
    targets = torch.randn(8, 2, generator=generator, dtype=torch.float64)
    scaled = (features - features.mean(0)) / features.std(0)
    for penalty, (weight, bias) in zip(PENALTIES, _solve(features, targets), strict=True):
        normal = scaled.mT @ scaled + penalty * 8 * torch.eye(12, dtype=torch.float64)
        expected = torch.linalg.solve(normal, scaled.mT @ (targets - targets.mean(0)))
        torch.testing.assert_close(features @ weight.mT + bias, scaled @ expected + targets.mean(0))


def test_the_plan_keeps_to_the_budget():
    # 22 candidates on a half, 11 on the other half, and mirrored ones: 11 + 5.5 + 1.
    assert plan_rungs(22, 400, 10, budget=20) == (22, [200, 400], 7000)
    assert plan_rungs(22, 400, 10, budget=23) == (22, [400], 9200)
    # A rung has two images of each class.
    assert plan_rungs(22, 400, 100, budget=20).sizes == [200, 400]
    # So few images cannot be halved: each candidate takes all of them, and the last three have to be left out.
    assert plan_rungs(22, 6, 3, budget=20) == (19, [6], 120)
    with pytest.raises(ValueError, match="`budget` is 1 calls for each training image. Allow 2 at least"):
        plan_rungs(22, 400, 10, budget=1)


def bright_red_only(file):
    """A server that sees a pixel's green only where red is bright."""
    pixels = decoded(file)
    return (F.relu(pixels[..., 0] - 140) * pixels[..., 1]).flatten()[:4].tolist()


def test_a_colour_that_helps_is_found_and_calls_are_counted():
    some = images(40)
    labels = [int(np.array(image)[0, 0, 1] > 100) for image in some]
    shown = []
    found = adapt_black_box(some, labels, bright_red_only, NAMES, SIDE, max_views=1, on_trial=shown.append)
    assert shown == found.trials
    assert found.names in {("red",), ("strong red",)}
    whole = {trial.names: trial for trial in found.trials if trial.images == 40}
    assert whole[found.names].accuracy > whole[NOTHING,].accuracy + 0.2
    share = whole[found.names].accuracy
    assert whole[found.names].standard_error == pytest.approx((share * (1 - share) / 40) ** 0.5)
    assert 0 < found.calls <= plan_rungs(22, 40, 2).calls


def test_candidates_beyond_the_budget_are_named(caplog):
    found = adapt_black_box(images(6), [0, 0, 1, 1, 2, 2], lambda file: [1.0, 2.0], ["a", "b", "c"], SIDE)
    assert "the budget is too small for tile 3, tile 4, tile 5" in caplog.text
    assert ("tile 2",) in {trial.names for trial in found.trials}


def test_nothing_is_chosen_where_nothing_helps():
    some = images(40)
    found = adapt_black_box(some, [index % 2 for index in range(40)], lambda file: [1.0, 2.0], NAMES, SIDE)
    assert found.names == (NOTHING,)


def left_half_only(file):
    return [decoded(file)[:, : SIDE // 2].mean().item(), 150.0]


def test_two_views_are_read_together():
    """Neither the left nor the right half of an image tells its class."""
    some, labels = [], []
    for index, image in enumerate(images(60, noise=5)):
        pixels, halves = np.array(image), np.random.default_rng(index).integers(0, 90, 2)
        pixels[:, : SIDE // 2] += halves[0].astype(np.uint8)
        pixels[:, SIDE // 2 :] += halves[1].astype(np.uint8)
        some.append(Image.fromarray(pixels))
        labels.append(int(halves.sum() > 90))
    candidates = {NOTHING: make_candidates(SIDE)[NOTHING]}
    found = adapt_black_box(some, labels, left_half_only, NAMES, SIDE, candidates)
    assert found.names == (NOTHING, "nothing, mirrored")
    alone, both = (trial.accuracy for trial in found.trials[-2:])
    assert alone < 0.85
    assert both > 0.9


def made_views(read, number=24):
    """Two views with a head on answers that `read` makes of logits, the answers, and the labels."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(2, number, 7, generator=random)
    labels = logits.sum(0)[:, :2].argmax(1)
    candidates = make_candidates(SIDE)
    views = Views([candidates["red"], candidates["stretched"]])
    for prompter in views.prompters:
        prompter.id2label = dict(enumerate(NAMES))
    answers = [[read(row) for row in view] for view in logits]
    return views, answers, labels, views.fit_answers(answers, labels)


@pytest.mark.parametrize("read", [as_scores, lambda logits: as_scores(logits, 3), lambda logits: logits.tolist()])
def test_saved_and_loaded_views_read_the_same(read, tmp_path):
    views, answers, labels, accuracy = made_views(read)
    views.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"view_0", "view_1"}
    loaded = Views.from_pretrained(tmp_path)
    pairs = list(zip(*answers, strict=True))
    expected = [views.read_answers(pair) for pair in pairs]
    assert [loaded.read_answers(pair) for pair in pairs] == expected
    right = [entries[0]["label"] == NAMES[label] for entries, label in zip(expected, labels, strict=True)]
    assert np.mean(right) >= accuracy > 0.6
    for one, other in zip(views(images(1)[0]), loaded(images(1)[0]), strict=True):
        assert np.array_equal(np.array(one), np.array(other))


def test_the_head_is_one_ridge_regression_on_all_views():
    views, answers, labels, _ = made_views(lambda logits: F.normalize(logits, dim=0).tolist())
    weight, bias, _ = fit_ridge(torch.tensor(answers).transpose(0, 1).flatten(1), labels, 2)
    expected = (torch.tensor([*answers[0][3], *answers[1][3]]).double() @ weight.mT + bias).softmax(0)
    found = {entry["label"]: entry["score"] for entry in views.read_answers([answers[0][3], answers[1][3]])}
    assert [found[name] for name in NAMES] == pytest.approx(expected.tolist(), abs=1e-4)


def test_one_view_is_an_image_prompter_also_in_a_folder_that_held_several(tmp_path):
    views, answers, labels, _ = made_views(as_scores)
    views.save_pretrained(tmp_path)
    one = Views(views.prompters[:1])
    one.fit_answers(answers[:1], labels)
    one.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"prompter.safetensors", "prompter_config.json"}
    prompter = ImagePrompter.from_pretrained(tmp_path)
    assert prompter.read_answer(answers[0][0])[0]["label"] == one.read_answers([answers[0][0]])[0]["label"]
    assert len(Views.from_pretrained(tmp_path).prompters) == 1


def test_the_card_and_the_hub(hub):
    views, answers, _, _ = made_views(as_scores)
    assert views.push_to_hub("someone/views") == "someone/views"
    card = ModelCard(hub.content("someone/views", "README.md").decode())
    code = re.search(r"```python\n(.*?)```", card.text, flags=re.DOTALL)[1]
    compile(code, "card", "exec")
    assert 'Views.from_pretrained("someone/views")' in code
    assert "| views of an image | 2 |" in card.text
    pair = [answers[0][0], answers[1][0]]
    assert Views.from_pretrained("someone/views").read_answers(pair) == views.read_answers(pair)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx_gives_the_same_views(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    candidates = make_candidates(SIDE)
    candidates["stretched"].adjustment = Adjustment(mirrored=True, stretched=True, contrast=1.2)
    views = Views([candidates["red"], candidates["stretched"]])
    views.export_onnx(tmp_path)
    pixels = torch.randint(0, 256, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    for index, expected in enumerate(views(pixels)):
        session = onnxruntime.InferenceSession(tmp_path / f"view_{index}.onnx")
        (found,) = session.run(None, {"image": pixels.numpy()})
        assert np.abs(found.astype(int) - expected.numpy().astype(int)).max() <= 1


@pytest.mark.parametrize("form", ["tile", "additive"])
def test_prompts_on_an_open_copy_start_from_the_colour_that_was_found(form, tmp_path):
    """Before any training, patches of a prompted image have the tokens of the coloured image."""
    script = importlib.import_module("adapt_black_box")
    rows = datasets.Dataset.from_dict(
        {"image": images(4), "label": [0, 1, 0, 1]},
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}),
    )
    model = tiny_vit(image_size=32)
    model.save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    start = make_candidates(32)["red"]
    options = argparse.Namespace(open_copy=str(tmp_path), image_size=32, epochs=0, batch_size=2, learning_rate=0.001)
    trained = script.train(form, start, rows, options)
    projection = model.vit.embeddings.patch_embeddings.projection
    with torch.no_grad():
        tokens = [projection(prompter.pixel_values(images(4))) for prompter in (trained, start)]
        unchanged = projection(trained.pixel_values(images(1)) * 0)
    assert (tokens[0] - tokens[1]).abs().max() < 0.02 * (tokens[1] - unchanged).abs().max()
