"""What the numbers in a server's answer are: probabilities or logits, and with how many digits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

import torch
from torch import Tensor

SCALES = ("softmax", "sigmoid", "logits", "percent")


def find_scale(answers: Sequence[Sequence[float]], complete: bool) -> str:
    """Find out what a server's scores are.

    Args:
        answers: the scores of one answer or of several, of one server.
        complete: whether each answer holds the scores of all classes.

    Returns:
        "logits" if a score is negative or above 100; "percent" if one is above 1 and all classes sum to about 100.
        With scores up to 1, "softmax" if they sum to at most 1, and to 1 if they are complete; else "sigmoid".
        Rounding can change the sum by a tenth, and by more where it makes scores 0.

    Raises:
        ValueError: the scores can be percentages as well as logits.
    """
    smallest, largest = min(map(min, answers)), max(map(max, answers))
    if smallest < 0 or largest > 100:
        return "logits"
    if largest > 1:
        if not (complete and all(map(_sums_to_100, answers))):
            raise ValueError(
                f"Scores from {smallest:g} to {largest:g} that do not sum to 100 can be percentages or logits. Divide "
                "percentages by 100, or turn logits into probabilities, before you pass them."
            )
        return "percent"
    too_small = complete and any(min(scores) > 0 and sum(scores) < 0.9 for scores in answers)
    return "sigmoid" if too_small or any(sum(scores) > 1.1 for scores in answers) else "softmax"


def _sums_to_100(scores: Sequence[float]) -> bool:
    # Percentages without decimals can lose much of the sum; logits are never exactly 0.
    return abs(sum(scores) - 100) <= (10 if 0 in scores else 1)


def log_scores(scores: Tensor, scale: str) -> Tensor:
    """Convert scores to logits, up to one number for each answer.

    Args:
        scores: (N, K), NaN where a score is missing.
        scale: one of `SCALES`.

    Returns:
        (N, K) float64, NaN where a score is missing. A score of 0 was rounded or underflowed; it counts as half of the
        smallest positive score of its answer.
    """
    scores = scores.double()
    if scale == "logits":
        return scores
    if scale == "percent":
        scores = scores / 100
    positive = torch.where(scores > 0, scores, torch.inf)
    floor = (positive.amin(dim=1, keepdim=True) / 2).clamp(max=0.5)
    scores = torch.where(scores > 0, scores, scores + floor)  # NaN stays NaN
    if scale == "sigmoid":
        return torch.logit(torch.where(scores >= 1, 1 - 2**-25, scores))  # a float32 rounds this to 1
    return scores.log()


@dataclass(frozen=True)
class Precision:
    """The rounding of an answer's scores.

    Args:
        digits: significant decimal digits, at most; 7 for float32, 2 for bfloat16.
        decimals: decimals after the point, where all scores are rounded to the same number of them; else None.
    """

    digits: int
    decimals: int | None

    @classmethod
    def of(cls, scores: Sequence[float]) -> Precision:
        """Count the digits of one answer's scores, as their shortest decimal form shows them."""
        numbers = [abs(score) for score in scores if score != 0 and math.isfinite(score)]
        if not numbers:
            return cls(0, None)
        written = [Decimal(repr(number)).normalize().as_tuple() for number in numbers]
        significant = max(len(number.digits) for number in written)
        decimals = max(max(0, -int(number.exponent)) for number in written)
        # A float32 that is printed as a double has 17 digits, of which its 24 bits make 7.
        digits = max(1, min(significant, int(max(map(_bits, numbers)) * math.log10(2))))
        zeros = max(0, -math.floor(math.log10(max(numbers))) - 1)  # between the point and the largest score's digits
        fixed = digits == significant and decimals <= significant + zeros
        return cls(digits, decimals if fixed else None)

    def log_errors(self, scores: Tensor, scale: str) -> Tensor:
        """Bound the errors that rounding causes in `log_scores`.

        Args:
            scores: any shape, NaN where a score is missing.
            scale: one of `SCALES`.

        Returns:
            The same shape, float64. The logarithm of a score that was rounded to 0 has no bound; 1 stands for it.
        """
        scores = scores.double()
        if self.decimals is None:
            step = scores.abs() * 10.0 ** (1 - self.digits)
        else:
            step = torch.full_like(scores, 10.0**-self.decimals)
        if scale == "logits":
            return step / 2
        slope = scores if scale in ("softmax", "percent") else scores * (1 - scores).clamp(min=1e-7)
        return (step / 2 / slope).nan_to_num(nan=1.0).clamp(max=1.0)


def _bits(number: float) -> int:
    """Count the bits of a number from its first to its last that is 1."""
    mantissa = int(math.frexp(number)[0] * 2**53)
    return 53 - ((mantissa & -mantissa).bit_length() - 1)
