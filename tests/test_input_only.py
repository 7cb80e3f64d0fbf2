"""The benchmark of input-only methods: its peers in pixel space, its heads, and a run of everything."""

import bench
import heads
import input_only
import pytest
import torch
from pixel_methods import PEERS, Masked
from torch.nn import functional as F

SCALE = ((0.5, 0.4, 0.3), (0.2, 0.25, 0.3))
SIDE = 32
# At 32 px: a border of 4 pixels; SMM's convolutions have 224, 1,168, 4,640, 18,496 and 1,731 numbers, its norms 240.
PARAMETERS = {
    "border": 3 * (32 * 32 - 24 * 24),
    "smm": 3 * 32 * 32 + 224 + 1168 + 4640 + 18496 + 1731 + 240,
    "lor-vp": 3 * (32 * 4 + 4 * 32),
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
    assert all(parameter.grad is not None and bool(parameter.grad.any()) for parameter in prompt.parameters())


@pytest.mark.parametrize("level", [0.0, 1.0])
@pytest.mark.parametrize("name", PEERS)
def test_peers_learn_from_their_start_on_black_and_white_images(name, level):
    """The gradient of torch's own clamp at the bounds is zero in some versions."""
    torch.manual_seed(0)
    prompt = PEERS[name][0](SIDE, SCALE)
    learned = prompt.border if name == "border" else prompt.left if name == "lor-vp" else prompt.pattern
    prompt.prompted(torch.full((4, 3, SIDE, SIDE), level)).sum().backward()
    assert bool(learned.grad.ne(0).all())


@pytest.mark.parametrize("name", PEERS)
def test_what_is_added_starts_at_zero(name):
    pixels = torch.randint(256, (2, 3, SIDE, SIDE)) / 255
    torch.testing.assert_close(PEERS[name][0](SIDE, SCALE).prompted(pixels), pixels)


def test_masks_are_constant_in_cells_of_8_pixels_and_differ_between_images():
    torch.manual_seed(0)
    mask = Masked(SIDE, SCALE).mask(torch.rand(2, 3, SIDE, SIDE))
    cells = F.avg_pool2d(mask, 8)  # (2, 3, 4, 4)
    torch.testing.assert_close(mask, F.interpolate(cells, scale_factor=8))
    assert len(cells.unique()) == 2 * 3 * 16


def test_a_trained_head_is_computed_exactly_from_the_scores():
    torch.manual_seed(1)
    head, features = heads.Trained(server(), 3), torch.randn(20, 16)
    answers = server().scores(features).log_softmax(-1)
    torch.testing.assert_close(head.read(answers), head(features), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="The scores of 16 classes do not determine the server's 16 features"):
        heads.Trained(server(16), 3).read(answers[:, :16])


def test_a_ridge_head_reads_logits_and_probabilities_alike():
    torch.manual_seed(0)
    labels, features = torch.randint(3, (60,)), torch.randn(60, 16)
    features[:, :3] += 6 * F.one_hot(labels, 3)
    head = heads.Ridge(server(), features, labels, 3)
    scores = server().scores(features)
    answers = head.read(scores)
    assert torch.equal(answers.argmax(1), labels)
    torch.testing.assert_close(head.read(scores.log_softmax(-1)), answers, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def rows():
    """The results of the smoke mode."""
    return input_only.main(["--smoke"])


@pytest.mark.slow
def test_every_method_and_head_is_run_and_its_images_are_answered_as_in_training(rows):
    found = {(row["settings"]["method"], head): row for row in rows for head in row["heads"]}
    methods = {method for method, _ in found}
    assert methods == set(input_only.METHODS)
    assert {head for _, head in found} == {"trained", "ridge"}
    for (method, head), row in found.items():
        figures = row["heads"][head]
        assert 0 <= figures["accuracy"] <= 1
        if not method.startswith("latent-"):
            assert figures["png_agreement"] == 1, (method, head)
            assert figures["png_accuracy"] == figures["accuracy"]
            assert {"jpeg90_accuracy", "jpeg95_accuracy"} <= figures.keys()
        if method in PEERS:  # a head has 2 x (32 + 1) parameters
            assert row["trainable_parameters"] == PARAMETERS[method] + 66
    assert found["none", "trained"]["trainable_parameters"] == 66


@pytest.mark.slow
def test_prompted_images_of_every_method_are_8_bit_images_of_the_servers_size(tmp_path):
    options = input_only.argparse.Namespace()
    input_only.make_smoke(tmp_path, options)
    material = bench.load_material(options.all_data[0], options.model, SIDE, 1000, 1000)
    images = material.splits["test"].pixels
    for method in input_only.METHODS:
        if not method.startswith("latent-"):
            model = input_only.build(method, heads.load_server(options.model, SIDE), material, options)
            prompted = input_only.prompted_images(model, images, material.processor)
            assert prompted.dtype == torch.uint8
            assert prompted.shape == images.shape
            assert torch.equal(prompted, images)  # all start at zero
