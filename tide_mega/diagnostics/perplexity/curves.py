"""Perplexity on a text at a run's checkpoints: joined with what was logged, and compared between runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np

from tide_mega.metrics.records import TextResult

T = TypeVar("T")


@dataclass(frozen=True)
class Point:
    """A text scored by a run's model at some time of its training."""

    tokens: int
    """Training tokens."""
    step: int
    result: TextResult
    is_logged: bool
    """Evaluated in training, not measured from a checkpoint."""


@dataclass(frozen=True)
class TextCurve:
    """A run's points on one text, by training tokens."""

    text: str
    label: str
    num_blocks: int
    points: tuple[Point, ...]

    @property
    def last(self) -> Point:
        """The latest."""
        return self.points[-1]

    @property
    def scored(self) -> dict[str, int]:
        """Tokens that were scored, by slot."""
        return self.last.result.count_by_bin


def baseline(curves: Sequence[TextCurve]) -> TextCurve | None:
    """Return the first curve without memory, if there is one."""
    return next((curve for curve in curves if curve.num_blocks == 0), None)


@dataclass(frozen=True)
class Joined:
    """Measured points, and logged ones between them."""

    points: tuple[Point, ...]
    shared: int
    """Steps both measured and logged."""
    largest_difference: float
    """Of the loss at these, in nats."""
    left_out: int
    """Logged points of another part of the text."""


def spread(items: Sequence[T], most: int) -> list[T]:
    """Take `most` at most (2 or more), evenly, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def join(measured: Sequence[Point], logged: Sequence[Point]) -> Joined:
    """Put logged points between measured ones (at least one) where they scored the same tokens."""
    counts = measured[-1].result.count_by_bin
    same = [point for point in logged if point.result.count_by_bin == counts]
    at_step = {point.step: point for point in measured}
    twice = [point for point in same if point.step in at_step]
    differences = [abs(point.result.loss - at_step[point.step].result.loss) for point in twice]
    between = [point for point in same if point.step not in at_step]
    points = sorted([*measured, *between], key=lambda point: point.tokens)
    return Joined(tuple(points), len(twice), max(differences, default=0.0), len(logged) - len(same))


def relative_to(curve: TextCurve, base: TextCurve) -> list[tuple[int, float]]:
    """Return (training tokens, % that the perplexity is above the baseline's) where the baseline's points span.

    Between its points the baseline's loss is interpolated.
    """
    tokens = [point.tokens for point in base.points]
    losses = [point.result.loss for point in base.points]
    return [
        (point.tokens, 100 * float(np.expm1(point.result.loss - np.interp(point.tokens, tokens, losses))))
        for point in curve.points
        if tokens[0] <= point.tokens <= tokens[-1]
    ]


def reaches(points: Sequence[Point], perplexity: float) -> float | None:
    """Return after how many training tokens the perplexity first is `perplexity` or less; None if never.

    Between points the loss, its logarithm, is interpolated; the first point cannot be looked behind.
    """
    if points and points[0].result.perplexity <= perplexity:
        return float(points[0].tokens)
    for before, after in pairwise(points):
        if after.result.perplexity <= perplexity:
            high, low = before.result.loss, after.result.loss
            part = (high - np.log(perplexity)) / (high - low)
            return float(before.tokens + part * (after.tokens - before.tokens))
    return None
