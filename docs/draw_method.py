"""Draw images/method.svg, the figure of the method, and images/client.svg: what stays on the client of a server.

    python docs/draw_method.py

Light blue is frozen, orange is trained (colours of Okabe and Ito, which differ in brightness too).
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Patch, Polygon, Rectangle

FOLDER = Path(__file__).parent / "images"
FROZEN, TRAINED, TOKEN, INK = "#cfe6f5", "#f2b23e", "#0072b2", "#202020"
SHADES = ["#7a3b00", "#d55e00", "#f0a070", "#ffe0c8"]  # of the library's tokens
MIXTURES = np.array([[0.7, 0.2, 0.1, 0.0], [0.1, 0.0, 0.2, 0.7], [0.0, 0.6, 0.4, 0.0]])  # coefficients (P, L)


def box(ax: Axes, x: float, y: float, width: float, height: float, text: str, color: str) -> None:
    """Draw a part of the network with its name."""
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", fc=color, ec=INK, lw=1.2)
    ax.add_patch(shape)
    ax.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=11)


def square(ax: Axes, x: float, y: float, color, side: float = 0.34) -> None:
    """Draw one vector."""
    ax.add_patch(Rectangle((x, y), side, side, fc=color, ec=INK, lw=0.9))


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """Draw an arrow."""
    ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.4, "shrinkA": 0, "shrinkB": 0})


def label(ax: Axes, x: float, y: float, text: str) -> None:
    """Write below or above what is drawn."""
    ax.text(x, y, text, ha="center", va="center", fontsize=10.5)


def draw_image(ax: Axes, x: float, y: float, sky: str = "#9ecae1", hill: str = "#5a7d4a") -> None:
    """Draw a picture of sky, sun and a hill, 1.8 wide and high."""
    ax.add_patch(Rectangle((x, y), 1.8, 1.8, fc=sky, ec="none"))
    ridge = [(0, 0), (0, 0.5), (0.7, 1.1), (1.3, 0.6), (1.8, 0.8), (1.8, 0)]
    ax.add_patch(Polygon([(x + right, y + up) for right, up in ridge], fc=hill))
    ax.add_patch(plt.Circle((x + 1.35, y + 1.4), 0.22, fc="#f0e442", ec=INK, lw=0.6))


def mixture(weights: np.ndarray) -> np.ndarray:
    """Return the colour that the library's colours mix to: that of a prompt."""
    return weights @ np.array([mpl.colors.to_rgb(shade) for shade in SHADES])


def draw() -> plt.Figure:
    """Draw the whole figure."""
    figure, ax = plt.subplots(figsize=(9.6, 4.1))
    figure.subplots_adjust(0, 0, 1, 1)
    ax.set(xlim=(0, 14.4), ylim=(-0.2, 5.95), aspect="equal")
    ax.set_axis_off()

    draw_image(ax, 0.3, 2.2)
    for step in range(4):  # 3 x 3 patches
        ax.plot([0.3 + 0.6 * step] * 2, [2.2, 4.0], color="white", lw=1.2)
        ax.plot([0.3, 2.1], [2.2 + 0.6 * step] * 2, color="white", lw=1.2)
    label(ax, 1.2, 1.9, "image")

    # The frozen way: patches to tokens.
    arrow(ax, (1.2, 4.1), (1.2, 4.95)), arrow(ax, (1.2, 4.95), (2.3, 4.95))
    box(ax, 2.35, 4.45, 1.9, 1.0, "patch\nembedding", FROZEN)
    arrow(ax, (4.3, 4.95), (5.0, 4.95))
    for index in range(5):
        square(ax, 5.05 + 0.4 * index, 4.78, TOKEN)
    label(ax, 6.03, 5.45, "N image tokens")
    for index, weights in enumerate(MIXTURES):
        square(ax, 7.25 + 0.4 * index, 4.78, mixture(weights))
    label(ax, 8.0, 5.45, "P prompts")
    arrow(ax, (8.55, 4.95), (9.3, 4.95))
    box(ax, 9.35, 4.25, 1.9, 1.4, "transformer\nencoder", FROZEN)
    arrow(ax, (11.3, 4.95), (11.8, 4.95))
    box(ax, 11.85, 4.45, 1.1, 1.0, "head", TRAINED)
    arrow(ax, (13.0, 4.95), (13.4, 4.95))
    ax.text(13.45, 4.95, "class", ha="left", va="center", fontsize=11)

    # The trained way: image to coefficients, coefficients and library to prompts.
    arrow(ax, (1.2, 1.65), (1.2, 0.95)), arrow(ax, (1.2, 0.95), (2.3, 0.95))
    ax.add_patch(Polygon([(2.35, 0.2), (2.35, 1.7), (4.25, 1.4), (4.25, 0.5)], fc=TRAINED, ec=INK, lw=1.2))
    ax.text(3.25, 0.95, "generator\n(small CNN)", ha="center", va="center", fontsize=11)
    arrow(ax, (4.3, 0.95), (4.95, 0.95))
    for row, weights in enumerate(MIXTURES):
        for column, weight in enumerate(weights):
            square(ax, 5.0 + 0.36 * column, 1.14 - 0.36 * row, str(1 - 0.85 * weight))
    label(ax, 5.72, 1.85, "coefficients")
    label(ax, 5.72, 0.12, "P x L, for this image")
    ax.text(6.85, 0.95, "×", ha="center", va="center", fontsize=17)  # noqa: RUF001
    ax.add_patch(FancyBboxPatch((7.13, 0.05), 0.84, 1.8, boxstyle="round,pad=0,rounding_size=0.1", fc=TRAINED, ec=INK))
    for index, shade in enumerate(SHADES):
        square(ax, 7.38, 1.37 - 0.41 * index, shade)
    ax.text(8.12, 0.95, "library of\nL learned\ntokens", ha="left", va="center", fontsize=11)
    arrow(ax, (7.55, 1.9), (7.55, 4.7))
    ax.text(7.75, 3.2, "mixed for each image,\nthen appended", ha="left", va="center", fontsize=10.5)

    key(ax, "trained: the adapter")
    return figure


def key(ax: Axes, trained: str) -> None:
    """Say what the colours mean."""
    parts = [Patch(fc=FROZEN, ec=INK, label="frozen: never changes"), Patch(fc=TRAINED, ec=INK, label=trained)]
    ax.legend(handles=parts, loc="lower right", bbox_to_anchor=(0.995, 0.03), fontsize=11, frameon=False)


def draw_client() -> plt.Figure:
    """Draw what the client does, and what it sends to the server and gets from it."""
    figure, ax = plt.subplots(figsize=(9.6, 4.15))
    figure.subplots_adjust(0, 0, 1, 1)
    ax.set(xlim=(0, 14.4), ylim=(-0.4, 5.82), aspect="equal")
    ax.set_axis_off()
    for x, width, name in ((0.15, 9.35, "client: yours"), (11.1, 3.15, "server: as it is")):
        frame = FancyBboxPatch(
            (x, 1.0), width, 4.65, boxstyle="round,pad=0,rounding_size=0.2", fc="none", ec=INK, ls="--"
        )
        ax.add_patch(frame)
        ax.text(x + 0.25, 5.3, name, ha="left", va="center", fontsize=11.5, weight="bold")

    draw_image(ax, 0.4, 3.1)
    label(ax, 1.3, 2.8, "image")
    arrow(ax, (2.3, 4.0), (2.95, 4.0))
    box(ax, 3.0, 3.1, 3.1, 1.8, "prompts as pixels:\na colour, a tile,\nor for each patch", TRAINED)
    arrow(ax, (6.15, 4.0), (6.8, 4.0))
    draw_image(ax, 6.85, 3.1, sky="#d9a8c8", hill="#8f6a58")
    label(ax, 7.75, 2.8, "what is sent")
    arrow(ax, (8.75, 4.0), (11.35, 4.0))
    ax.text(10.3, 4.3, "PNG", ha="center", va="center", fontsize=10.5)
    box(ax, 11.4, 3.1, 2.55, 1.8, "Vision\nTransformer", FROZEN)
    ax.plot([12.68, 12.68], [3.1, 1.8], color=INK, lw=1.4)
    arrow(ax, (12.68, 1.8), (9.05, 1.8))
    ax.text(10.3, 2.1, "scores", ha="center", va="center", fontsize=10.5)
    box(ax, 6.5, 1.3, 2.5, 1.0, "head on scores", TRAINED)
    arrow(ax, (6.45, 1.8), (5.6, 1.8))
    ax.text(5.5, 1.8, "your class", ha="right", va="center", fontsize=11)
    key(ax, "chosen or trained for your images")
    return figure


if __name__ == "__main__":
    mpl.rcParams["svg.hashsalt"] = "pgn"  # the same file each time
    for name, picture in {"method": draw(), "client": draw_client()}.items():
        picture.savefig(FOLDER / f"{name}.svg", facecolor="white", metadata={"Date": None})
        print(FOLDER / f"{name}.svg")
