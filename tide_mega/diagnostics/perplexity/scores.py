"""Scoring texts with checkpoints, and reading what training logged of them."""

import hashlib
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tide_mega.data.batch import IGNORE_LABEL, TokenBatch
from tide_mega.data.tokenizer import Tokenizer
from tide_mega.diagnostics.perplexity.curves import Point
from tide_mega.metrics.deciles import DecileLoss
from tide_mega.metrics.jsonl import read_metrics
from tide_mega.metrics.records import TextResult, perplexity_of
from tide_mega.trained.model import TrainedModel

_PASS = 4
"""Microbatches scored at a time."""


def score(model: TrainedModel, batches: Iterable[TokenBatch], num_bytes: int) -> TextResult:
    """Score every label of the batches, which stand for `num_bytes` bytes."""
    device = model.device.torch_device
    deciles = DecileLoss(torch.from_numpy(model.run.bins).to(device))
    remaining = iter(batches)
    while some := list(islice(remaining, _PASS)):
        for scored in model.score(some):
            assert scored.cross_entropy_BT is not None
            deciles.update(scored.cross_entropy_BT, scored.labels_BT)
    return TextResult.of(deciles.reduce(lambda tensor: tensor), num_bytes)


def label_bytes(batches: Iterable[TokenBatch], tokenizer: Tokenizer) -> int:
    """Return how many bytes the labels spell; special tokens, which stand for no text, none."""
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
    """Identify batches by what is in them."""
    found = hashlib.sha256()
    for batch in batches:
        for x in batch:
            found.update(f"{tuple(x.shape)}".encode() + np.ascontiguousarray(x.numpy()).tobytes())
    return found.hexdigest()


def logged_points(metrics: Path, until: int) -> tuple[dict[str, list[Point]], list[Point]]:
    """Read a run's evaluations up to step `until`: by text, and of the held-out split.

    Nothing where there is no such file. Of a step evaluated again after a restart the last counts.
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
