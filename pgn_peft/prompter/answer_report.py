"""What a server's answer to the probe says about the server: which scores it gives, and how exact they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pgn_peft.prompter.score_head import LOGIT_TOLERANCE, ScoreHead, as_row
from pgn_peft.prompter.score_scale import Precision, find_scale


@dataclass(frozen=True)
class AnswerReport:
    """A description of one answer; `print` it.

    Args:
        num_scores: number of labels in the answer.
        num_classes: number of the server's labels, where it is known.
        scale: "softmax", "sigmoid" or "logits".
        digits: significant decimal digits of the scores.
        decimals: decimals after the point, where all scores are rounded to the same number of them.
        num_zeros: scores that are 0, from rounding.
        rounding_error: expected error of the prompter's logits from the rounding, root mean square, of the least exact
            logit; None without an exact head, or where scores are missing.
        readable: whether the prompter's head can read such answers; None without one.
    """

    num_scores: int
    num_classes: int | None
    scale: str
    digits: int
    decimals: int | None
    num_zeros: int
    rounding_error: float | None
    readable: bool | None

    @property
    def all_scores(self) -> bool | None:
        """Whether the answer holds all classes; None where their number is not known."""
        return None if self.num_classes is None else self.num_scores >= self.num_classes

    def __str__(self) -> str:
        whole = {True: "all", False: f"the best of {self.num_classes}", None: "perhaps not all"}[self.all_scores]
        digits = f"{self.digits} significant digits" if self.decimals is None else f"{self.decimals} decimals"
        zeros = f", {self.num_zeros} of them 0" if self.num_zeros else ""
        text = f"The server gives {self.num_scores} scores ({whole}), {self.scale}, with {digits}{zeros}."
        if self.rounding_error is not None:
            text += f" Rounding changes the prompter's logits by about {self.rounding_error:.1g}."
        if self.readable is False:
            text += " Its head cannot read them: "
            if self.rounding_error is None:
                text += f"ask the server for all its labels (top_k={self.num_classes or 'their number'}), or "
            else:
                text += f"the error must be at most {LOGIT_TOLERANCE}. Ask the server for more digits, or "
            text += "fit a head to such answers: prompter.fit_answers(answers, labels)."
        return text


def describe(entries: Sequence[tuple[str, float]], head: ScoreHead | None, num_classes: int | None) -> AnswerReport:
    """Describe one answer's scores.

    Args:
        entries: labels and scores, at least one.
        head: what is to read them.
        num_classes: number of the server's classes, where it is known.
    """
    values = [score for _, score in entries]
    scale = find_scale([values], num_classes is not None and len(entries) >= num_classes)
    precision = Precision.of(values)
    error: float | None = None
    readable: bool | None = None
    if head is not None:
        row = as_row(entries, head.labels)
        present = not bool(row.isnan().any())
        if head.report.kind == "exact" and present:  # a fitted head has seen the rounding of its answers
            # Roundings are independent, and spread evenly between their bounds.
            variance = precision.log_errors(row, scale).square() / 3
            error = float((head.weight.double().cpu().square() @ variance).sqrt().max())
        enough = present or (head.report.top_k is not None and len(entries) >= head.report.top_k)
        readable = enough and (error is None or error <= LOGIT_TOLERANCE)
    zeros = sum(score == 0 for score in values)
    return AnswerReport(len(entries), num_classes, scale, precision.digits, precision.decimals, zeros, error, readable)
