"""The benchmark of input-only methods: its peers in pixel space, its heads, and a run of everything."""

import json

import heads
import input_only
import pytest
import torch
from image_data import smoke_arguments
from pixel_methods import PEERS, Masked, NormalizedGradient, Ring
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

SCALE = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
SIDE = 32
# At 32 px: a border of 4 pixels; SMM's convolutions have 224, 1,168, 4,640, 18,496 and 1,731 numbers, its norms 240.
PARAMETERS = {
    "border": 3 * (32 * 32 - 24 * 24),
    "ring": 3 * (32 * 32 - 24 * 24),
    "smm": 3 * 32 * 32 + 224 + 1168 + 4640 + 18496 + 1731 + 240,
    "lor-vp": 3 * (32 * 4 + 4 * 32),
    "full": 3 * 32 * 32,
}


def server(num_classes=48, hidden_size=16):
    """A server of random scores that answers with the mean colours of its images as features."""
    torch.manual_seed(0)
    classifier = torch.randn(num_classes, hidden_size), torch.randn(num_classes)
    return heads.Server(torch.nn.Identity(), classifier, {index: str(index) for index in range(num_classes)})


@pytest.mark.parametrize("name", PEERS)
def test_peers_make_images_of_8_bits_and_learn_all_their_parameters(name):
    torch.manual_seed(0)
    prompt = PEERS[name][0](SIDE, SCALE)
    assert sum(parameter.numel() for parameter in prompt.parameters()) == PARAMETERS[name]
    for parameter in prompt.parameters():
        torch.nn.init.normal_(parameter)
    levels = 255 * prompt.prompted(torch.rand(4, 3, SIDE, SIDE))
    assert levels.min() >= 0
    assert levels.max() <= 255
    torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
    assert len(levels.unique()) > 2  # not all clipped
    levels.square().sum().backward()
    trained = [parameter for group in prompt.groups(1.0) for parameter in group["params"]]
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in trained)
    assert len(trained) == len(list(prompt.parameters()))


@pytest.mark.parametrize("level", [0.0, 1.0])
@pytest.mark.parametrize("name", PEERS)
def test_peers_learn_from_their_start_on_black_and_white_images(name, level):
    """The gradient of torch's own clamp at the bounds is zero in some versions: a ring that starts black stayed so."""
    torch.manual_seed(0)
    prompt = PEERS[name][0](SIDE, SCALE)
    learned = prompt.border if name in ("border", "ring") else prompt.left if name == "lor-vp" else prompt.pattern
    prompt.prompted(torch.full((4, 3, SIDE, SIDE), level)).sum().backward()
    assert bool(learned.grad.ne(0).all())


@pytest.mark.parametrize("name", sorted(set(PEERS) - {"ring"}))
def test_what_is_added_starts_at_zero(name):
    pixels = torch.randint(256, (2, 3, SIDE, SIDE)) / 255
    torch.testing.assert_close(PEERS[name][0](SIDE, SCALE).prompted(pixels), pixels)


def test_a_ring_surrounds_the_shrunk_image():
    ring = Ring(SIDE, SCALE)
    pixels = torch.full((1, 3, SIDE, SIDE), 0.6)
    prompted = ring.prompted(pixels)
    torch.testing.assert_close(prompted[..., 4:-4, 4:-4], pixels[..., 4:-4, 4:-4])
    assert not F.pad(prompted[..., 4:-4, 4:-4], (4,) * 4).ne(prompted).any()  # black around it
    torch.nn.init.ones_(ring.border)
    torch.testing.assert_close(ring.prompted(pixels)[..., 4:-4, 4:-4], pixels[..., 4:-4, 4:-4])
    assert ring.prompted(pixels)[0, 0, 3, 16] == 1


def test_masks_are_constant_in_cells_of_8_pixels_and_differ_between_images():
    torch.manual_seed(0)
    mask = Masked(SIDE, SCALE).mask(torch.rand(2, 3, SIDE, SIDE))
    cells = F.avg_pool2d(mask, 8)  # (2, 3, 4, 4)
    torch.testing.assert_close(mask, F.interpolate(cells, scale_factor=8))
    assert len(cells.unique()) == 2 * 3 * 16


def test_normalized_gradients_take_steps_of_fixed_length_in_the_range_of_images():
    ring, other = torch.nn.Parameter(torch.full((3, 5), 0.5)), torch.nn.Parameter(torch.zeros(2))
    gradient = torch.randn(3, 5)
    optimizer = NormalizedGradient(
        [{"params": [ring], "lr": 0.1, "normalized": True}, {"params": [other], "lr": 0.01}], weight_decay=0.0
    )
    for scale in (1e-6, 1e3):
        before = ring.detach().clone()
        ring.grad, other.grad = scale * gradient, torch.tensor([scale, -scale])
        optimizer.step()
        torch.testing.assert_close(before - ring, 0.1 * gradient / gradient.norm(), atol=1e-4, rtol=0)
    assert other[0] < 0 < other[1]  # by AdamW
    ring.grad = -gradient
    optimizer.param_groups[0]["lr"] = 100.0
    optimizer.step()
    assert ring.min() == 0
    assert ring.max() == 1


def test_a_trained_head_is_computed_exactly_from_the_scores():
    torch.manual_seed(1)
    head, features = heads.Trained(server(), 3), torch.randn(20, 16)
    answers = head.scores(features).log_softmax(-1)
    torch.testing.assert_close(head.read(answers), head(features), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"`scores` must determine the server's 16 features, but got those of 16"):
        heads.Trained(server(16), 3).read(answers[:, :16])


def test_bayesian_weights_are_those_of_a_count_by_hand():
    head = heads.Bayesian(server(3), num_labels=2, k=1)
    # Two images of class 0 with 0.8 and 0.6 for the server's classes 0 and 1; one of class 1 with 0.5 for class 1.
    probabilities = torch.tensor([[0.8, 0.1, 0.1], [0.3, 0.6, 0.1], [0.3, 0.5, 0.2]])
    head.observe(probabilities.log(), torch.tensor([0, 0, 1]))
    head.end_epoch()
    shares = torch.tensor([[0.8 / 1.8, 0], [0.6 / 2.1, 0.5 / 2.1], [0, 0]])
    torch.testing.assert_close(head.weights, shares / shares.sum(0))
    assert head.counts.sum() == 0


@pytest.mark.parametrize("name", ["blm", "ridge"])
def test_fitted_heads_read_logits_and_probabilities_alike(name):
    torch.manual_seed(0)
    labels = torch.randint(3, (60,))
    scores = F.one_hot(labels, 48) * 6.0 + torch.randn(60, 48)
    splits = ("train", "validation")
    head = heads.fit(name, server(), dict.fromkeys(splits, scores), dict.fromkeys(splits, labels), 3)
    answers = head.read(scores)
    assert torch.equal(answers.argmax(1), labels)
    shift = head.read(scores.log_softmax(-1)) - answers
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def rows():
    """The results of the smoke mode."""
    return input_only.main(["--smoke"])


@pytest.mark.slow
def test_every_method_and_head_is_run_and_its_images_are_answered_as_in_training(rows):
    found = {(row["settings"]["method"], head): row for row in rows for head in row["heads"]}
    methods = {method for method, _ in found}
    assert {"none", *PEERS, "pgn-ring", "latent-static", "latent-pgn"} <= methods
    spatial = {method for method in methods if not method.startswith("latent-")}
    assert {key for key in found if key[0] in spatial} == {
        (method, head) for method in spatial for head in ("1:1", "blm", "ridge", "trained")
    }
    for (method, head), row in found.items():
        figures = row["heads"][head]
        assert 0 <= figures["accuracy"] <= 1
        if method in spatial:
            assert figures["png_agreement"] == 1, (method, head)
            assert figures["png_accuracy"] == figures["accuracy"]
            assert {"jpeg90_accuracy", "jpeg95_accuracy"} <= figures.keys()
        # A head has 2 x (32 + 1) parameters.
        if method in PEERS:
            assert row["trainable_parameters"] == PARAMETERS[method] + (66 if head == "trained" else 0)
    assert found["none", "ridge"]["trainable_parameters"] == 0
    assert found["none", "trained"]["trainable_parameters"] == 66


@pytest.mark.slow
def test_prompted_images_of_every_method_are_8_bit_images_of_the_servers_size(tmp_path):
    options = input_only.argparse.Namespace(head=None)
    input_only.make_smoke(tmp_path, options)
    material = input_only.load_material(options.all_data[0], options.model, SIDE, 1000, 1000)
    images = material.splits["test"].pixels
    for method in input_only.METHODS:
        if not method.startswith("latent-"):
            model = input_only.build(method, heads.load_server(options.model, SIDE), material, 0, options)
            prompted = input_only.prompted_images(model, images, material.processor)
            assert prompted.dtype == torch.uint8
            assert prompted.shape == images.shape
            assert torch.equal(prompted, images) == (method not in ("ring", "pgn-ring")), (
                method
            )  # others start at zero


def tables():
    settings = {"method": "border", "head": "blm", "data": "one", "model": "vit"}
    settings |= dict.fromkeys(input_only.PROTOCOL, 1)
    runs = [(0.1, 0, "validation", 0.5, 0.6), (0.3, 0, "validation", 0.4, 0.7), (0.1, 1, "test", 0.5, 0.6)]
    runs += [(0.3, 1, "test", 0.2, 0.75), (0.3, 2, "test", 0.2, 0.77)]
    rows = []
    for rate, seed, split, blm, ridge in runs:
        figures = {
            head: {"accuracy": 0.0, "png_accuracy": value, "png_agreement": 0.99, "jpeg90_accuracy": 0.25}
            | ({"accuracy": value} if split == "validation" else {})
            for head, value in (("blm", blm), ("ridge", ridge))
        }
        own = {"learning_rate": rate, "seed": seed, "split": split}
        rows.append({"settings": settings | own, "trainable_parameters": 7, "heads": figures})
    return input_only.report(rows)


def test_the_report_has_each_heads_own_learning_rate_and_the_spread_over_seeds():
    blm, ridge = (table for table in tables().split("Head: ") if table)
    assert "| border (VP) | 7 | 0.1 | 0.990 | 0.500 | 0.250 |" in blm
    assert "| border (VP) | 7 | 0.3 | 0.990 | 0.760±0.014 | 0.250 |" in ridge


@pytest.fixture
def clip(tmp_path):
    """A folder with a tiny CLIP image tower and the text embeddings of 40 classes, and one with images of two."""
    smoke_arguments(tmp_path)
    tiny = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(image_size=64, patch_size=8, projection_dim=16, **tiny))
    folder = tmp_path / "clip"
    model.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}).save_pretrained(folder)
    texts = F.normalize(torch.randn(40, 16), dim=-1)
    save_file({"a_photo_of_a": texts}, folder / "imagenet1k_text_embeds.safetensors")
    names = {"names": [f"class {index}" for index in range(40)]}
    folder.joinpath("imagenet1k_classes.json").write_text(json.dumps(names), encoding="utf-8")
    tmp_path.joinpath("images", "classes.json").write_text('{"imagenet_index": [7, 3]}', encoding="utf-8")
    return folder, tmp_path / "images", model, texts


def test_a_clip_server_answers_with_scaled_cosines_also_at_another_size(clip):
    folder, _, model, texts = clip
    images = torch.randn(2, 3, 64, 64)
    expected = 100 * F.normalize(model(images).image_embeds, dim=-1) @ texts.T
    torch.testing.assert_close(heads.load_server(str(folder), 64)(images), expected, atol=1e-3, rtol=0)
    small = torch.randn(2, 3, 32, 32)
    expected = 100 * F.normalize(model(small, interpolate_pos_encoding=True).image_embeds, dim=-1) @ texts.T
    torch.testing.assert_close(heads.load_server(str(folder), 32)(small), expected, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_text_heads_are_run_on_clip(clip, tmp_path):
    folder, images, _, _ = clip
    protocol = "--head text --side 32 --epochs 1 --batch 8 --grid 1 --seeds 1 --precision float32"
    command = ["--model", str(folder), "--data", str(images), *protocol.split()]
    command += ["--methods", "none", "border", "pgn-ring"]
    rows = input_only.main([*command, "--results", str(tmp_path / "results.jsonl")])
    assert [row["settings"]["method"] for row in rows] == ["none", "border", "pgn-ring"]
    assert all(row["heads"]["text"]["png_agreement"] == 1 for row in rows)
    assert input_only.main([*command, "--results", str(tmp_path / "results.jsonl")]) == rows  # nothing is repeated
