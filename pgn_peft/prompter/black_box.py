"""Adapts a hosted model by calls alone: chooses how images are sent to it, and fits a head to its answers.

No weights and no gradients are needed. A model that sees images of an unusual size or kind often answers more usefully
when their colours are changed, and differently to each change, so that several answers tell more than one.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from pgn_peft.nn.images import to_images, to_pixels
from pgn_peft.nn.layout import make_layout
from pgn_peft.nn.preprocessing import Adjustment, Preprocessing
from pgn_peft.prompter.calls import Calls
from pgn_peft.prompter.files import ADDITIVE
from pgn_peft.prompter.image_prompter import ImagePrompter
from pgn_peft.prompter.score_head import check_classes, read_table
from pgn_peft.prompter.views import Table, Views, predict_held_out

logger = logging.getLogger(__name__)

NOTHING = "nothing"
BUDGET = 20  # calls for each training image
# Levels of 255 that are added to red, green and blue.
HUES = {
    "red": (60, -30, -30),
    "green": (-30, 60, -30),
    "blue": (-30, -30, 60),
    "cyan": (-60, 30, 30),
    "magenta": (30, -60, 30),
    "yellow": (30, 30, -60),
}
ADJUSTMENTS = {
    "contrast 0.6": Adjustment(contrast=0.6),
    "contrast 1.6": Adjustment(contrast=1.6),
    "stretched": Adjustment(stretched=True),
}
TILES = 6
TILE_STD = 0.15  # of an image's pixels in [0, 1]
LARGEST_TILE = 16


def make_candidates(image_size: int, seed: int = 0) -> dict[str, ImagePrompter]:
    """Make the ways of sending an image among which `adapt_black_box` chooses, by name.

    They are: nothing, twelve colours that are added to all pixels, two contrasts, stretching, and six random tiles.

    Args:
        image_size: side of the square images that are sent.
        seed: of the tiles.
    """
    side = next(side for side in range(LARGEST_TILE, 0, -1) if image_size % side == 0)
    layout = make_layout(ADDITIVE, (image_size, image_size), side)
    # The server normalises by itself, so mean and standard deviation are not used.
    steps = Preprocessing((0.5,) * 3, (0.5,) * 3, size=(image_size, image_size), resample="bilinear")
    generator = torch.Generator().manual_seed(seed)

    def make(tile: Tensor, adjustment: Adjustment | None = None) -> ImagePrompter:
        library = tile.expand(1, 3, side, side).clone()
        return ImagePrompter(layout, steps, library, adjustment=adjustment)

    zero = torch.zeros(3, 1, 1)
    candidates = {NOTHING: make(zero)}
    for name, levels in HUES.items():
        colour = torch.tensor(levels)[:, None, None] / 255
        candidates |= {name: make(colour), f"strong {name}": make(2 * colour)}
    candidates |= {name: make(zero, adjustment) for name, adjustment in ADJUSTMENTS.items()}
    for index in range(TILES):
        candidates[f"tile {index}"] = make(TILE_STD * torch.randn(3, side, side, generator=generator))
    return candidates


class Plan(NamedTuple):
    """How many candidates are tried, the number of images of each rung, and the number of calls."""

    candidates: int
    sizes: list[int]
    calls: int


def plan_rungs(candidates: int, images: int, num_labels: int, budget: float = BUDGET) -> Plan:
    """Plan successive halving: in each rung the better half of the candidates is tried on twice as many images.

    Args:
        candidates: their number. Where the budget is too small for all, the last ones are left out.
        images: number of training images, all of which are in the last rung.
        num_labels: number of classes. A rung has two images of each, if there are so many.
        budget: most calls for each training image.

    Returns:
        The plan. Its calls include those for mirrored images in the end. Files that are the same or in the cache need
        no call.

    Raises:
        ValueError: no plan keeps to the budget.
    """
    fewest = min(images, 2 * num_labels)
    for number in range(candidates, 0, -1):
        for halvings in range(number.bit_length()):
            sizes = [max(math.ceil(images / 2**left), fewest) for left in range(halvings, -1, -1)]
            new = [size - before for size, before in zip(sizes, [0, *sizes], strict=False)]
            calls = images + sum(math.ceil(number / 2**rung) * more for rung, more in enumerate(new))
            if calls <= budget * images:
                return Plan(number, sizes, calls)
    raise ValueError(f"`budget` is {budget:g} calls for each training image. Allow 2 at least.")


@dataclasses.dataclass(frozen=True)
class Trial:
    """What was measured of a candidate, or of several together.

    Args:
        names: the candidates.
        images: number of training images.
        accuracy: cross-validated.
        standard_error: of the accuracy.
    """

    names: tuple[str, ...]
    images: int
    accuracy: float
    standard_error: float


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """What `adapt_black_box` returns.

    Args:
        views: what is sent, and how answers are read.
        names: the chosen candidates, one for each view.
        trials: all that were tried, in order; each of those that could be chosen is on all training images.
        calls: calls that were made, without those that the cache answered.
    """

    views: Views
    names: tuple[str, ...]
    trials: list[Trial]
    calls: int


def adapt_black_box(
    images: Sequence[Any],
    labels: Sequence[int],
    call: Callable[[bytes], Any] | Calls,
    label_names: Sequence[str],
    image_size: int = 224,
    candidates: Mapping[str, ImagePrompter] | None = None,
    max_views: int = 4,
    budget: float = BUDGET,
    on_trial: Callable[[Trial], object] | None = None,
) -> Adaptation:
    """Adapt a server by its answers to training images.

    Candidates are compared by cross-validated accuracy of a head on the server's answers, in successive halving over
    the images. The best one replaces `NOTHING` if it is ahead by more than one standard error of the difference. Then
    the view that adds most is added, under the same condition, until there are `max_views` or none does.

    Args:
        images: of any size, as `ImagePrompter` takes them.
        labels: their classes, 0..M-1, two images of each at least.
        call: answers an encoded image, a PNG file, with entries of `label` and `score` or with an embedding; or
            `Calls`, to keep answers on disk, send JPEG, or set the number of calls at the same time.
        label_names: of the M classes.
        image_size: images are resized (bilinear) to a square of this side before they are sent. Take the size that the
            server's model sees, so that the server changes no pixel; if it is not known, 224 is most common.
        candidates: ways of sending an image by name, `NOTHING` first; None: those of `make_candidates`.
        max_views: most views of an image; each costs one call for every image that is classified later.
        budget: most calls for each training image. Where it is too small for all candidates, the last ones
            are left out, with a warning.
        on_trial: is called with each trial as soon as it was measured, for example to show it.

    Raises:
        ValueError: a class has fewer than two images, or the budget is less than 2.
    """
    calls = call if isinstance(call, Calls) else Calls(call)
    classes = check_classes(labels, len(images), len(label_names))
    pool = dict(make_candidates(image_size) if candidates is None else candidates)
    plan = plan_rungs(len(pool), len(images), len(label_names), budget)
    if plan.candidates < len(pool):
        logger.warning("the budget is too small for %s", ", ".join(list(pool)[plan.candidates :]))
        pool = dict(list(pool.items())[: plan.candidates])
    search = _Search(images, classes, calls, pool, len(label_names), on_trial)
    kept = list(pool)
    for rung, size in enumerate(plan.sizes):
        accuracies = {name: search.correct((name,), size).mean() for name in kept}
        if rung + 1 < len(plan.sizes):
            ranked = sorted(kept, key=lambda name: (name != NOTHING, -float(accuracies[name])))
            kept = ranked[: math.ceil(len(pool) / 2 ** (rung + 1))]
    chosen = search.better((NOTHING,), [(name,) for name in kept])
    mirrored = f"{chosen[0]}, mirrored"
    pool[mirrored] = copy.deepcopy(pool[chosen[0]])
    adjustment = pool[mirrored].adjustment
    pool[mirrored].adjustment = dataclasses.replace(adjustment, mirrored=not adjustment.mirrored)
    kept.append(mirrored)
    while len(chosen) < max_views:
        longer = search.better(chosen, [(*chosen, name) for name in kept if name not in chosen])
        if longer == chosen:
            break
        chosen = longer
    views = Views([copy.deepcopy(pool[name]) for name in chosen])
    for prompter in views.prompters:
        prompter.id2label = dict(enumerate(label_names))
    views.fit_answers([search.answers(name, len(images)) for name in chosen], classes[search.order])
    return Adaptation(views, chosen, search.trials, calls.made)


class _Search:
    """Measures candidates on training images. The first n in `order` have the same share of each class, for any n."""

    def __init__(
        self,
        images: Sequence[Any],
        classes: Tensor,
        calls: Calls,
        pool: Mapping[str, ImagePrompter],
        num_labels: int,
        on_trial: Callable[[Trial], object] | None,
    ) -> None:
        self.images, self.classes, self.calls, self.pool, self.num_labels = images, classes, calls, pool, num_labels
        self.on_trial = on_trial
        self.order = _spread(classes)
        self.trials: list[Trial] = []
        self._tables: dict[tuple[str, int], Table] = {}
        self._correct: dict[tuple[tuple[str, ...], int], Tensor] = {}

    def answers(self, name: str, number: int) -> list[Any]:
        """Return the server's answers to the first images, sent as a candidate says."""
        rows = self.order[:number].tolist()
        return self.calls.answers((_sent(self.pool[name], self.images[row]) for row in rows), name)

    def correct(self, names: tuple[str, ...], number: int) -> Tensor:
        """Return for each of the first images whether a head that was fitted to others is right: (N,) of 0 and 1."""
        if (names, number) not in self._correct:
            for name in names:
                if (name, number) not in self._tables:
                    self._tables[name, number] = read_table(self.answers(name, number))
            classes = self.classes[self.order[:number]]
            _, predicted = predict_held_out([self._tables[name, number] for name in names], classes, self.num_labels)
            correct = (predicted.argmax(1) == classes).double()
            error = math.sqrt(float(correct.var(correction=0)) / number)
            self.trials.append(Trial(names, number, float(correct.mean()), error))
            self._correct[names, number] = correct
            if self.on_trial is not None:
                self.on_trial(self.trials[-1])
        return self._correct[names, number]

    def better(self, current: tuple[str, ...], others: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
        """Return the best of `others` if it is ahead of `current` by more than the difference's standard error."""
        number = len(self.images)
        correct = {names: self.correct(names, number) for names in [current, *others]}
        best = max(correct, key=lambda names: float(correct[names].sum()))
        gain = correct[best] - correct[current]
        return best if float(gain.mean()) > float(gain.std()) / math.sqrt(number) else current


def _sent(prompter: ImagePrompter, image: Any) -> Image.Image:
    prompted = prompter(to_pixels(image, prompter.num_channels))
    return to_images(prompted[None], Image.Image)[0]


def _spread(classes: Tensor) -> Tensor:
    """Return all rows in a random order whose first n have the same share of each class, for any n."""
    order = torch.randperm(len(classes), generator=torch.Generator().manual_seed(0))
    share = torch.empty(len(classes))
    for label in classes.unique():
        rows = order[classes[order] == label]
        share[rows] = torch.arange(len(rows)) / len(rows)
    return order[share[order].argsort(stable=True)]
