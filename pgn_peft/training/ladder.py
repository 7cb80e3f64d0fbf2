"""`Ladder`: tries methods in the order of their cost on a user's own images, and shows where more does not pay."""

from __future__ import annotations

import dataclasses
import json
import math
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from pgn_peft.nn.heads import deal_folds, fit_ridge
from pgn_peft.training.collator import ImageCollator
from pgn_peft.training.rungs import (
    FULL,
    LORA,
    RUNGS,
    UNTRAINED,
    Rung,
    Start,
    Task,
    Trained,
    find_heads,
    replace_head,
    right,
    set_linear,
)
from pgn_peft.tuner.backbones import find_backbone

FOLDS = 3  # of the cross-validation that replaces a validation split
DRAWS = 3  # of untrained prompts, for the first layer and for every layer
EPOCHS, FEWEST_STEPS = 12, 100  # of a whole training: so many epochs, and at least so many steps
COMPARED = 100  # images that tell whether results are of the same images
SEARCHED = 300  # most images that candidates are compared on
SHORTEST = 20  # steps; a rung that gets fewer is skipped
STEP_PER_PREDICTION = 3.0  # time of a training step as a multiple of a prediction's, until one was timed
RESULTS = "ladder.json"
BUDGET = "budget in minutes"  # may differ from an earlier run's
DEPTHS = {1: "the first layer", "all": "every layer"}


@dataclass(frozen=True)
class RungResult:
    """What a rung reached.

    Args:
        name: of the rung.
        accuracy: on images that were not trained on, in [0, 1]; None if the rung was skipped.
        standard_error: of the accuracy.
        parameters: number of trained parameters.
        seconds: of computing.
        inference: time of a prediction, as a multiple of the frozen model's.
        base_untouched: whether the frozen model's weights are as they were.
        choice: what was chosen on this rung, or why it was skipped.
        settings: of what was chosen, for the rungs above.
    """

    name: str
    accuracy: float | None = None
    standard_error: float = 0.0
    parameters: int = 0
    seconds: float = 0.0
    inference: float = 1.0
    base_untouched: bool = True
    choice: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)


class Ladder:
    """Tries one method after the other on a user's images: from a linear head to all of the model's weights.

    Trained prompts start from the untrained ones that cross-validation chose. Learning rate and start are chosen by
    successive halving, on the images that the rungs are compared on, so that all accuracies are slightly optimistic.
    After training, a head that is fitted to the final features in closed form replaces the trained one if it is right
    more often.

    Args:
        make_model: returns the frozen model, a new one in each call.
        train: rows of `pixel_values` (C, H, W) and `labels`, with augmentation if there is any.
        id2label: names of the classes by index.
        output_dir: for the results and the trained models. An interrupted ladder goes on from them; with another
            budget it trains again.
        plain: the rows of `train` without augmentation; None: `train`.
        validation: rows to compare the rungs on; None: three-fold cross-validation on the training images.
        data_collator: makes batches of rows; None: `ImageCollator`.
        arguments: batch size, precision, device and loader workers of the training.
        budget_minutes: for all rungs together. Trainings are shortened to fit, and left out where they would be too
            short to be compared.
        allow_weights: also try LoRA and full fine-tuning.
        seed: of initial values and the order of images.

    Raises:
        ValueError: `output_dir` has the results of another model, other images or other settings.
    """

    def __init__(
        self,
        make_model: Callable[[], nn.Module],
        train: Dataset[Any],
        id2label: Mapping[int, str],
        output_dir: str | Path,
        *,
        plain: Dataset[Any] | None = None,
        validation: Dataset[Any] | None = None,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        arguments: TrainingArguments | None = None,
        budget_minutes: float = 15.0,
        allow_weights: bool = False,
        seed: int = 0,
    ) -> None:
        self.folder = Path(output_dir)
        self.task = Task(
            make_model,
            dict(id2label),
            train,
            train if plain is None else plain,
            validation,
            data_collator or ImageCollator(len(id2label)),
            arguments or TrainingArguments(str(self.folder), per_device_train_batch_size=25),
            seed,
        )
        self.budget = 60 * budget_minutes
        self.rungs = tuple(rung for rung in RUNGS if allow_weights or not rung.changes_weights)
        self._labels = torch.empty(0, dtype=torch.long)  # (N,) of the training images
        self._step_seconds = self._prediction_seconds = math.nan  # for an image
        model = make_model()
        self._settings = {
            "model": f"{type(model).__name__}, checksum {_checksum(model.state_dict().values())}",
            "classes": list(id2label.values()),
            "training images": self._describe(self.task.plain, plain is not None),
            "validation images": None if validation is None else self._describe(validation),
            BUDGET: budget_minutes,
            "seed": seed,
        }
        self.results = self._read()

    def climb(self, callbacks: Sequence[TrainerCallback] = ()) -> Iterator[RungResult]:
        """Try all rungs.

        Args:
            callbacks: of `Trainer`, for every training.

        Yields:
            The result of each rung as soon as it is there; first those that an interrupted ladder left.
        """
        yield from list(self.results)
        for rung in self.rungs[len(self.results) :]:
            begin = time.perf_counter()
            result = self._train(rung, callbacks) if rung.rates else self._fit(rung)
            self.results.append(dataclasses.replace(result, seconds=round(time.perf_counter() - begin, 1)))
            self._write()
            yield self.results[-1]

    @property
    def chosen(self) -> RungResult:
        """The cheapest rung within one standard error of the best."""
        measured = [result for result in self.results if result.accuracy is not None]
        best = max(measured, key=_accuracy)
        return next(result for result in measured if _accuracy(result) >= _accuracy(best) - best.standard_error)

    def load(self, result: RungResult | None = None) -> nn.Module:
        """Load the trained model of a rung, by default of the chosen one, in evaluation mode."""
        result = result or self.chosen
        folder, model = self._folder_of(result.name), self.task.make_model()
        if result.name == FULL.name:
            return cast(type[PreTrainedModel], type(model)).from_pretrained(folder).eval()
        if result.name == LORA.name:
            replace_head(model, self.task.id2label)
        return PeftModel.from_pretrained(cast(PreTrainedModel, model), str(folder)).eval()

    def accuracy(self, model: nn.Module, rows: Dataset[Any]) -> float:
        """Measure the accuracy of a model that `load` returned, for example on test images, once."""
        features, labels = self.task.features(model, rows)
        head = find_heads(model)[1]
        with torch.no_grad():
            logits = head(features.to(head.weight)).cpu()
        return float(right(logits, labels).double().mean())

    def rows(self) -> list[dict[str, str]]:
        """Return the results as rows of a table: text by column. The chosen rung is bold, in Markdown."""
        rows = []
        for result in self.results:
            skipped = result.accuracy is None
            rows.append(
                {
                    "method": f"**{result.name}**" if result == self.chosen else result.name,
                    "accuracy": "-" if skipped else f"{result.accuracy:.3f} ± {result.standard_error:.3f}",
                    "trained parameters": "-" if skipped else f"{result.parameters:,}",
                    "seconds": f"{result.seconds:.0f}",
                    "time of a prediction": "-" if skipped else f"x {result.inference:.2f}",
                    "base untouched": "-" if skipped else "yes" if result.base_untouched else "no",
                    "how": result.choice,
                }
            )
        return rows

    # Rungs.

    def _fit(self, rung: Rung) -> RungResult:
        """Fit a head by ridge regression, with the untrained prompts that cross-validation chooses."""
        number = len(self.task.id2label)
        starts: list[Start | None] = [None]
        if rung is UNTRAINED:
            starts = [Start(depth, seed) for depth in (1, "all") for seed in range(DRAWS)]
        tried: list[tuple[float, Start | None, Tensor]] = []
        for start in starts:
            features = self._training_features(rung, start)
            tried.append((fit_ridge(features, self._labels, number)[2], start, features))
        _, start, features = max(tried, key=lambda each: each[0])
        model = self.task.build(rung, start)
        weight, bias, _ = fit_ridge(features, self._labels, number)
        set_linear(find_heads(model)[1], weight, bias)
        if self.task.validation is not None:
            others, expected = self.task.features(model, self.task.validation)
            correct = right(others.double() @ weight.mT + bias, expected)
        else:
            parts = []
            for rows, rest in deal_folds(self._labels, FOLDS):
                weight, bias, _ = fit_ridge(features[rows], self._labels[rows], number)
                parts.append(right(features[rest].double() @ weight.mT + bias, self._labels[rest]))
            correct = torch.cat(parts)
        if start is None:
            return self._finish(rung, model, correct, "ridge regression")
        first = max((each for each in tried if each[1] and each[1].depth == 1), key=lambda each: each[0])[1]
        settings = {"best": dataclasses.asdict(start), "first": dataclasses.asdict(cast(Start, first))}
        choice = f"best of {len(starts)} draws, for {DEPTHS[start.depth]}"
        return self._finish(rung, model, correct, choice, settings)

    def _train(self, rung: Rung, callbacks: Sequence[TrainerCallback]) -> RungResult:
        """Choose learning rate and start by successive halving, then train for as long as the budget allows."""
        best = max((result for result in self.results if result.accuracy is not None), key=_accuracy)
        if _accuracy(best) + best.standard_error >= 1:
            return RungResult(rung.name, choice=f"skipped: nothing can be clearly better than the {best.name}")
        if rung.changes_weights and find_backbone(self.task.make_model()).head is None:
            return RungResult(rung.name, choice="skipped: the model has no classification head")
        if not len(self._labels):  # rungs below were measured before an interruption
            self._training_features(RUNGS[0], None)
        everything, validation = torch.arange(len(self._labels)), self.task.validation
        # Rows to train on, and images to predict.
        parts: list[tuple[Tensor, Any]] = [(everything, validation)]
        if validation is None:
            folds = deal_folds(self._labels, FOLDS)
            parts = [(rows, Subset(self.task.plain, rest.tolist())) for rows, rest in folds]
        batch_size = min(self.task.arguments.train_batch_size, len(parts[0][0]))
        whole = max(FEWEST_STEPS, EPOCHS * len(parts[0][0]) // batch_size)
        candidates = [(start, rate) for rate in rung.rates for start in self._starts(rung)]
        left = max(0.0, self.budget - sum(result.seconds for result in self.results))
        share = left / (len(self.rungs) - self.rungs.index(rung))
        steps = self._affordable_steps(share, len(candidates), parts, batch_size)
        if steps < SHORTEST:  # no search where time is short; cheaper rungs go first
            candidates = [candidates[len(candidates) // 2]]
            steps = self._affordable_steps(share, 1, parts, batch_size)
            steps = max(steps, min(SHORTEST, self._affordable_steps(left, 1, parts, batch_size)))
        if steps < SHORTEST:
            return RungResult(rung.name, choice=f"skipped: {steps} steps fit into the budget")
        steps = min(steps, whole)

        def train(
            candidate: tuple[Start | None, float], rows: Tensor, others: Any, steps: int, refit: bool = True
        ) -> Trained:
            return self.task.train_candidate(rung, *candidate, rows.tolist(), others, steps, refit, callbacks)

        rows, others = parts[0]
        some = Subset(others, _spread(len(others), SEARCHED))
        ranked = candidates
        for length, number in _rounds(len(candidates)):
            short = max(1, round(length * steps))
            trained = [train(candidate, rows, some, short, refit=False) for candidate in ranked[:number]]
            ranked = [ranked[place] for place in sorted(range(number), key=lambda place: trained[place].rank)]
        start, rate = ranked[0]
        results = [train(ranked[0], *part, steps) for part in parts]
        final = results[0] if validation is not None else train(ranked[0], everything, None, steps)
        self._step_seconds = final.step_seconds
        kept = torch.cat([right(result.logits, result.labels) for result in results])
        refitted = torch.cat([right(result.refitted, result.labels) for result in results])
        choice = f"{steps} of {whole} steps, rate {rate:g}, best of {len(candidates)}"
        choice += f", from a draw for {DEPTHS[start.depth]}" if start else ""
        if refitted.sum() > kept.sum():
            set_linear(find_heads(final.model)[1], *final.head)
            return self._finish(rung, final.model, refitted, f"{choice}, head fitted again")
        return self._finish(rung, final.model, kept, choice)

    def _affordable_steps(
        self, seconds: float, candidates: int, parts: list[tuple[Tensor, Any]], batch_size: int
    ) -> int:
        """Return the steps of a whole training for which so many seconds suffice, with the search before it."""
        rounds = _rounds(candidates)
        last = len(parts) + (self.task.validation is None)  # trainings after the search
        fitted, predicted = len(parts[0][0]), len(parts[0][1])
        # After each training held-out images are predicted; after the last ones a head is also fitted again.
        predictions = sum(number for _, number in rounds) * min(predicted, SEARCHED) + last * (fitted + predicted)
        lengths = sum(share * number for share, number in rounds) + last  # in whole trainings
        seconds -= predictions * self._prediction_seconds
        return max(0, int(seconds / (lengths * batch_size * self._step_seconds)))

    def _starts(self, rung: Rung) -> list[Start | None]:
        """Return what a rung can start from: the best untrained prompts of the first layer, or also of every layer."""
        if rung.changes_weights:
            return [None]
        below = next(result for result in self.results if result.name == UNTRAINED.name).settings
        first, best = Start(**below["first"]), Start(**below["best"])
        return [first, best] if rung.fields["prompt_depth"] == best.depth == "all" else [first]

    def _training_features(self, rung: Rung, start: Start | None) -> Tensor:
        """Compute features (N, F) of the training images, and note their labels and the time."""
        model, begin = self.task.build(rung, start), time.perf_counter()
        features, self._labels = self.task.features(model, self.task.plain)
        self._prediction_seconds = (time.perf_counter() - begin) / len(features)
        self._step_seconds = STEP_PER_PREDICTION * self._prediction_seconds
        return features

    def _finish(
        self,
        rung: Rung,
        model: nn.Module,
        correct: Tensor,
        choice: str,
        settings: Mapping[str, Any] | None = None,
    ) -> RungResult:
        """Save the trained model of a rung, and describe it."""
        accuracy = float(correct.double().mean())
        # Of a few images all may be right by chance: one right and one wrong image are added (Agresti and Coull).
        likely = (accuracy * len(correct) + 1) / (len(correct) + 2)
        inference = self.task.time_of_prediction(model)
        trained = model.parameters() if rung.rates else find_heads(model)[1].parameters()
        cast(PreTrainedModel, model).save_pretrained(self._folder_of(rung.name))
        return RungResult(
            name=rung.name,
            accuracy=accuracy,
            standard_error=math.sqrt(likely * (1 - likely) / len(correct)),
            parameters=sum(part.numel() for part in trained if part.requires_grad),
            inference=round(inference, 3),
            base_untouched=not rung.changes_weights,
            choice=choice,
            settings=settings or {},
        )

    # Files.

    def _describe(self, rows: Dataset[Any], exactly: bool = True) -> str:
        """Return the number of rows, and a checksum of some: of labels and size only, if pixels may be augmented."""
        number = len(cast(Any, rows))
        batch = self.task.collator([rows[index] for index in _spread(number, COMPARED)])
        pixels = batch["pixel_values"]
        described = [batch["labels"], torch.tensor(pixels.shape)] + [pixels] * exactly
        return f"{number}, checksum {_checksum(described)}"

    def _folder_of(self, name: str) -> Path:
        return self.folder / name.replace(",", "").replace(" ", "-")

    def _read(self) -> list[RungResult]:
        file = self.folder / RESULTS
        if not file.exists():
            return []
        found = json.loads(file.read_text(encoding="utf-8"))
        different = {name for name, value in self._settings.items() if found["settings"].get(name) != value}
        results = [RungResult(**result) for result in found["results"]]
        if BUDGET in different:  # trainings would be longer or shorter
            different.remove(BUDGET)
            results = [result for result, rung in zip(results, RUNGS, strict=False) if not rung.rates]
        if different:
            raise ValueError(
                f"{file} has results of a ladder with other {' and '.join(sorted(different))}. Choose another folder, "
                "or delete it."
            )
        return results[: len(self.rungs)]

    def _write(self) -> None:
        results = [dataclasses.asdict(result) for result in self.results]
        text = json.dumps({"settings": self._settings, "results": results, "chosen": self.chosen.name}, indent=2)
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = self.folder / f"{RESULTS}.partial"
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(self.folder / RESULTS)


def _checksum(tensors: Iterable[Tensor]) -> str:
    checksum = 0
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        checksum = zlib.crc32(plain.numpy().tobytes(), checksum)
    return f"{checksum:08x}"


def _accuracy(result: RungResult) -> float:
    return cast(float, result.accuracy)


def _rounds(candidates: int) -> list[tuple[float, int]]:
    """Plan successive halving: for each round the share of a whole training, and the number of candidates."""
    number = math.ceil(math.log2(candidates))
    return [(2.0 ** (index - number), math.ceil(candidates / 2**index)) for index in range(number)]


def _spread(number: int, most: int) -> list[int]:
    """Choose at most `most` of so many images, evenly: splits are often sorted by class."""
    return list(range(number)) if number <= most else [index * number // most for index in range(most)]
