"""Perplexity of texts over a run's checkpoints: scored, joined with logged evaluations, compared between runs."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from tide_mega.data.loader import IGNORE_LABEL, TokenBatch
from tide_mega.data.tokenizer import Tokenizer
from tide_mega.metrics.deciles import DecileLoss
from tide_mega.metrics.jsonl import read_metrics
from tide_mega.metrics.records import TextResult, perplexity_of
from tide_mega.trained.model import TrainedModel

T = TypeVar("T")


@dataclass(frozen=True)
class Point:
    """A text's score at one point of a run's training."""

    tokens: int
    """Training tokens."""
    step: int
    result: TextResult
    is_logged: bool
    """Whether it was evaluated during training, rather than measured from a checkpoint."""


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
    """Of the loss at these steps, in nats."""
    left_out: int
    """Logged points that scored a different part of the text."""


def spread(items: Sequence[T], most: int) -> list[T]:
    """Take at most `most` (2 or more) points, evenly spaced, including the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, most).round().astype(int)]


def join(measured: Sequence[Point], logged: Sequence[Point]) -> Joined:
    """Merge logged points into measured ones (at least one) if they scored the same tokens."""
    counts = measured[-1].result.count_by_bin
    same = [point for point in logged if point.result.count_by_bin == counts]
    at_step = {point.step: point for point in measured}
    twice = [point for point in same if point.step in at_step]
    differences = [abs(point.result.loss - at_step[point.step].result.loss) for point in twice]
    between = [point for point in same if point.step not in at_step]
    points = sorted([*measured, *between], key=lambda point: point.tokens)
    return Joined(tuple(points), len(twice), max(differences, default=0.0), len(logged) - len(same))


def relative_to(curve: TextCurve, base: TextCurve) -> list[tuple[int, float]]:
    """Return (training tokens, % that perplexity is above the baseline's) within the baseline's range.

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

    Between points the loss, its logarithm, is interpolated; before the first point nothing is known.
    """
    if points and points[0].result.perplexity <= perplexity:
        return float(points[0].tokens)
    for before, after in pairwise(points):
        if after.result.perplexity <= perplexity:
            high, low = before.result.loss, after.result.loss
            part = (high - np.log(perplexity)) / (high - low)
            return float(before.tokens + part * (after.tokens - before.tokens))
    return None


_PASS = 4
"""Microbatches scored at a time."""


def score(model: TrainedModel, batches: Iterable[TokenBatch], num_bytes: int) -> TextResult:
    """Score every label of the batches, whose text has `num_bytes` bytes."""
    device = model.device.torch_device
    deciles = DecileLoss(torch.from_numpy(model.run.bins).to(device))
    remaining = iter(batches)
    while some := list(islice(remaining, _PASS)):
        for scored in model.score(some):
            assert scored.cross_entropy_BT is not None
            deciles.update(scored.cross_entropy_BT, scored.labels_BT)
    return TextResult.of(deciles.reduce(lambda tensor: tensor), num_bytes)


def label_bytes(batches: Iterable[TokenBatch], tokenizer: Tokenizer) -> int:
    """Return the bytes of the labels' text; special tokens have none."""
    total = 0
    for batch in batches:
        labels = batch.labels_BT[batch.labels_BT != IGNORE_LABEL]
        types, times = (x.tolist() for x in labels.unique(return_counts=True))
        total += sum(
            n * len(tokenizer.token_bytes(v))
            for v, n in zip(types, times, strict=True)
            if v not in tokenizer.special_ids
        )
    return total


def digest(batches: Iterable[TokenBatch]) -> str:
    """Fingerprint the content of batches."""
    found = hashlib.sha256()
    for batch in batches:
        for x in batch:
            found.update(f"{tuple(x.shape)}".encode() + np.ascontiguousarray(x.numpy()).tobytes())
    return found.hexdigest()


def logged_points(metrics: Path, until: int) -> tuple[dict[str, list[Point]], list[Point]]:
    """Read a run's evaluations up to step `until`: by text, and of the held-out split.

    Empty without such a file. Of a step evaluated again after a restart, the last record counts.
    """
    records = read_metrics(metrics) if metrics.is_file() else []
    texts: dict[str, dict[int, Point]] = {}
    held_out: dict[int, Point] = {}
    for record in records:
        if record.get("kind") != "eval" or record["step"] > until:
            continue
        for name, result in record.get("texts", {}).items():
            texts.setdefault(name, {})[record["step"]] = _point(record, TextResult(**result))
        if record["loss"] is not None:
            held_out[record["step"]] = _point(record, _held_out(record))
    return {name: _in_order(points) for name, points in texts.items()}, _in_order(held_out)


def _held_out(record: dict[str, Any]) -> TextResult:
    return TextResult(
        loss=record["loss"],
        perplexity=perplexity_of(record["loss"]),
        bits_per_byte=None,
        tokens=sum(record["count_by_bin"].values()),
        rare=record["rare"],
        mid=record["mid"],
        common=record["common"],
        loss_by_bin=record["loss_by_bin"],
        count_by_bin=record["count_by_bin"],
    )


def _point(record: dict[str, Any], result: TextResult) -> Point:
    return Point(record["tokens"], record["step"], result, is_logged=True)


def _in_order(points: dict[int, Point]) -> list[Point]:
    return [points[step] for step in sorted(points)]
