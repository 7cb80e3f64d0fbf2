"""Pictures show the numbers that they are given."""

import matplotlib as mpl
import numpy as np
import plotting
import pytest
import torch

mpl.use("Agg")
from matplotlib import pyplot as plt


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def shown(ax):
    return np.asarray(ax.images[0].get_array())


def test_coefficients_are_drawn_a_row_a_prompt():
    coefficients = torch.rand(3, 6)
    np.testing.assert_array_equal(shown(plotting.plot_coefficients(coefficients)), coefficients.numpy())


def test_usage_is_sorted_by_the_class_that_uses_an_entry_most():
    usage = torch.tensor([[0.1, 0.9, 0.2, 0.6], [0.8, 0.1, 0.3, 0.4]])
    ax = plotting.plot_usage(usage, ["cat", "dog"])
    # Entries 1 and 3 are the cat's, the stronger first; then 0 and 2, the dog's.
    np.testing.assert_array_equal(shown(ax), usage[:, [1, 3, 0, 2]].numpy())
    assert [label.get_text() for label in ax.get_yticklabels()] == ["cat", "dog"]


def test_images_are_sorted_by_their_use_of_the_most_decisive_entry():
    pixels = torch.rand(4, 3, 5, 5)
    coefficients = torch.full((4, 2, 3), 0.3)
    coefficients[:, :, 1] = torch.tensor([0.1, 0.9, 0.5, 0.2])[:, None]
    figure = plotting.plot_images_by_entry(pixels, coefficients, entries=1, images=3)
    assert len(figure.axes) == 3
    for ax, image in zip(figure.axes, (1, 2, 3), strict=True):
        np.testing.assert_array_equal(shown(ax), pixels[image].permute(1, 2, 0).numpy())


@pytest.mark.parametrize(("method", "shape"), [("pca", (12, 3, 4, 4)), ("tsne", (12, 8))])
def test_the_map_has_a_point_for_each_entry_as_large_as_its_use(method, shape):
    tokens = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    usage = torch.rand(3, 12)
    points = plotting.plot_library(tokens, usage, method=method).collections[0]
    assert points.get_offsets().shape == (12, 2)
    assert points.get_sizes().argmax() == usage.sum(dim=0).argmax()
    assert len(plotting.plot_library(tokens, method=method).collections[0].get_offsets()) == 12


def test_attention_bars_add_up_layer_by_layer():
    attention = torch.rand(5, 2, 3) / 3
    ax = plotting.plot_attention(attention)
    for layer in range(2):
        bars = [bar for bar in ax.patches if round(bar.get_x() + bar.get_width() / 2) == layer + 1]
        assert sum(bar.get_height() for bar in bars) == pytest.approx(attention.mean(0)[layer].sum().item(), rel=1e-5)


def test_pictures_go_into_the_axes_that_are_given():
    _, ax = plt.subplots()
    assert plotting.plot_attention(torch.rand(2, 3), ax=ax) is ax
    assert plotting.plot_coefficients(torch.rand(2, 3), ax=ax) is ax
