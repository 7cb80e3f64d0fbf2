"""Plots of an adapter's mixing coefficients, library and attention, and the style of all figures. Needs matplotlib.

The functions take tensors from `pgn_peft.inspection`, and draw into the given axes or a new figure, which the caller
shows or saves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from pgn_peft.training import RungResult

COLOURS = "magma"
# For all figures of the project. From the palette of Okabe and Ito, which colour-blind people can tell apart.
OURS, THEIRS = "#d55e00", "#0072b2"
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": "medium",
    "font.size": 9,
    "lines.markersize": 4,
    "savefig.dpi": 110,
}


def plot_coefficients(coefficients: Tensor, ax: Axes | None = None) -> Axes:
    """Draw the mixing coefficients of one image.

    Args:
        coefficients: (P, L), of one image.
        ax: axes to draw into; None: a new figure's.

    Returns:
        The axes, with a row for each prompt and a column for each library entry.
    """
    ax = ax if ax is not None else _new_axes(width=0.1 * coefficients.shape[1], height=0.2 * coefficients.shape[0])
    picture = ax.imshow(coefficients.numpy(), aspect="auto", cmap=COLOURS, vmin=0)
    ax.set(xlabel="library entry", ylabel="prompt")
    ax.figure.colorbar(picture, ax=ax, label="coefficient")
    return ax


def plot_usage(usage: Tensor, names: Sequence[str], ax: Axes | None = None) -> Axes:
    """Draw the mean use of each library entry by the images of each class.

    Args:
        usage: (number of classes, L); see `pgn_peft.inspection.usage_by_class`.
        names: the classes' names, one for each row.
        ax: axes to draw into; None: a new figure's.

    Returns:
        The axes, with a row for each class; entries are sorted by the class that uses them most.
    """
    ax = ax if ax is not None else _new_axes(width=0.1 * usage.shape[1] + 1, height=0.25 * len(names))
    # By class first, and within a class by use.
    strongest = usage.argmax(dim=0).double() - usage.amax(dim=0).double() / (usage.amax().double() + 1e-12) / 2
    picture = ax.imshow(usage[:, strongest.argsort()].numpy(), aspect="auto", cmap=COLOURS, vmin=0)
    ax.set(xlabel="library entry, sorted by the class that uses it most")
    ax.set_yticks(range(len(names)), names)
    ax.figure.colorbar(picture, ax=ax, label="mean coefficient")
    return ax


def plot_images_by_entry(
    pixels: Tensor, coefficients: Tensor, entries: int = 6, images: int = 8, figure: Figure | None = None
) -> Figure:
    """Draw the images that use selected library entries most.

    Args:
        pixels: (B, 3, H, W) in [0, 1].
        coefficients: (B, P, L), of the same images.
        entries: number of rows: the entries whose use differs most from image to image.
        images: number of columns: the images that use the entry most, in descending order.
        figure: figure to draw into; None: a new one.

    Returns:
        The figure.
    """
    use = coefficients.mean(dim=1)  # (B, L)
    entries, images = min(entries, use.shape[1]), min(images, len(pixels))
    chosen = use.std(dim=0, correction=0).argsort(descending=True)[:entries].tolist()
    figure = figure or plt.figure(figsize=(images, 1.1 * entries), layout="constrained")
    grid = figure.subplots(entries, images, squeeze=False)
    for row, entry in zip(grid, chosen, strict=True):
        for ax, index in zip(row, use[:, entry].argsort(descending=True)[:images].tolist(), strict=True):
            ax.imshow(pixels[index].permute(1, 2, 0).numpy())
            ax.set_title(f"{use[index, entry]:.2f}", fontsize=7, pad=2)
            ax.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"entry {entry}", fontsize=8)
    return figure


def plot_library(tokens: Tensor, usage: Tensor | None = None, method: str = "pca", ax: Axes | None = None) -> Axes:
    """Draw a map of the library with a point for each entry. Needs scikit-learn.

    Args:
        tokens: (L, D), or patches (L, C, p, p), which are flattened.
        usage: (number of classes, L): the size of a point shows an entry's use, and its colour the class that uses it
            most; None: all points are equal.
        method: "pca", or "tsne" with a fixed seed.
        ax: axes to draw into; None: a new figure's.

    Returns:
        The axes.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    flat = tokens.flatten(1).numpy()
    if method == "pca":
        mapping = PCA(n_components=2)
        places = mapping.fit_transform(flat)
        shares = [f" ({share:.0%} of the variance)" for share in mapping.explained_variance_ratio_]
    else:
        places = TSNE(perplexity=min(30, (len(flat) - 1) / 3), random_state=0).fit_transform(flat)
        shares = ["", ""]
    ax = ax if ax is not None else _new_axes(width=5, height=4.5)
    x, y = places.T
    if usage is None:
        ax.scatter(x, y)
    else:
        total = usage.sum(dim=0)
        sizes = 10 + 290 * total / total.max().clamp(min=1e-12)
        ax.scatter(x, y, s=sizes.numpy(), c=usage.argmax(dim=0).numpy(), cmap="tab20", alpha=0.8)
    ax.set(xlabel=f"first axis{shares[0]}", ylabel=f"second axis{shares[1]}")
    return ax


def plot_attention(attention: Tensor, ax: Axes | None = None) -> Axes:
    """Draw the share of the CLS token's attention that goes to the prompts, layer by layer.

    Args:
        attention: (B, layers, P) or (layers, P); see `pgn_peft.inspection.attention_to_prompts`. Images are averaged.
        ax: axes to draw into; None: a new figure's.

    Returns:
        The axes, with a bar for each layer, stacked prompt by prompt.
    """
    if attention.ndim == 3:
        attention = attention.mean(dim=0)
    ax = ax if ax is not None else _new_axes(width=5, height=3)
    layers, number = attention.shape
    shades = plt.get_cmap(COLOURS)(torch.linspace(0.15, 0.9, number).numpy())
    below = torch.zeros(layers)
    for prompt, shade in enumerate(shades):
        ax.bar(range(1, layers + 1), attention[:, prompt].numpy(), bottom=below.numpy(), color=shade, width=0.8)
        below = below + attention[:, prompt]
    ax.set(xlabel="layer of the backbone", ylabel="share of CLS's attention", ylim=(0, 1.05 * float(below.max())))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    return ax


def plot_ladder(results: Sequence[RungResult], chosen: str, ax: Axes | None = None) -> Figure:
    """Draw the accuracy of each method of a ladder against its number of trained parameters.

    Args:
        results: of the methods; those that were skipped are left out.
        chosen: name of the method that is kept.
        ax: axes to draw into; None: a new figure's.

    Returns:
        The figure; a bar is one standard error to each side.
    """
    ax = ax if ax is not None else _new_axes(width=7, height=0.45 * len(results) + 1)
    measured = [result for result in results if result.accuracy is not None][::-1]
    for place, result in enumerate(measured):
        colour = OURS if result.name == chosen else THEIRS
        ax.errorbar(result.accuracy, place, xerr=result.standard_error, fmt="o", color=colour, capsize=3)
    names = [f"{result.name}\n{result.parameters:,} parameters" for result in measured]
    ax.set_yticks(range(len(measured)), names)
    ax.set(xlabel="accuracy on held-out images, ± one standard error", ylim=(-0.5, len(measured) - 0.5))
    ax.set_title(f"chosen: {chosen}", color=OURS)
    ax.grid(axis="x", alpha=0.3)
    return ax.figure


def _new_axes(width: float, height: float) -> Axes:
    _, ax = plt.subplots(figsize=(max(width, 3.0), max(height, 2.0)), layout="constrained")
    return ax
