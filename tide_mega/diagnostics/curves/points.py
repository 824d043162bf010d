"""What a run logged of its loss, smoothed and compared. Shapes: N log lines."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tide_mega.metrics.jsonl import read_metrics

Losses = NDArray[np.float64]

LINES_A_WINDOW = 40
"""A curve of so many log lines is smoothed over one more."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Losses of one run by training tokens, ascending; nats per token."""

    label: str
    num_blocks: int
    tokens: NDArray[np.int64]
    """[N]."""
    loss: Losses
    """[N]: of the steps since the line before."""
    smooth: Losses
    """[N]: `running_mean` over `window` lines."""
    window: int
    held_out: dict[int, float]
    """Loss on held-out text, by training tokens."""
    left_out: int
    """Lines whose loss is not finite."""

    def at(self, tokens: float) -> float | None:
        """Return the smoothed loss between log lines; None outside."""
        if not self.tokens[0] <= tokens <= self.tokens[-1]:
            return None
        return float(np.interp(tokens, self.tokens, self.smooth))


def read_curve(metrics: Path, label: str, num_blocks: int, until: int) -> Curve:
    """Read the lines of metrics.jsonl up to step `until`."""
    records = [record for record in read_metrics(metrics) if record["step"] <= until]
    trained, held_out = _by_tokens(records, "train"), _by_tokens(records, "eval")
    finite = {tokens: loss for tokens, loss in trained.items() if math.isfinite(loss)}
    return make_curve(
        label,
        num_blocks,
        finite,
        {tokens: loss for tokens, loss in held_out.items() if math.isfinite(loss)},
        left_out=len(trained) - len(finite),
    )


def make_curve(
    label: str, num_blocks: int, trained: dict[int, float], held_out: dict[int, float], left_out: int = 0
) -> Curve:
    """Smooth losses given by training tokens."""
    tokens = np.array(sorted(trained), dtype=np.int64)
    loss = np.array([trained[count] for count in sorted(trained)], dtype=np.float64)
    window = 1 + 2 * (len(loss) // (2 * LINES_A_WINDOW))
    smooth = running_mean(loss, window)
    return Curve(label, num_blocks, tokens, loss, smooth, window, dict(sorted(held_out.items())), left_out)


def running_mean(values: Losses, window: int) -> Losses:
    """Average over `window` (odd) neighbours.

    Near the start, where losses fall steeply, over as many on both sides as there are; near the end over the
    half window before and what there is after, so that a last value is not one line's alone.
    """
    if window % 2 == 0 or window < 1:
        raise ValueError(f"a centred window has an odd number of values, not {window}")
    if window == 1:
        return values
    sums = np.concatenate([[0.0], np.cumsum(values)])
    i = np.arange(len(values))
    half = np.minimum(i, window // 2)
    last = np.minimum(i + half, len(values) - 1)
    return (sums[last + 1] - sums[i - half]) / (last + 1 - i + half)


def difference(curve: Curve, base: Curve) -> tuple[Losses, Losses]:
    """Return tokens, and the smoothed loss minus the baseline's, at the curve's lines that the baseline spans.

    Between its lines the baseline is interpolated.
    """
    inside = (curve.tokens >= base.tokens[0]) & (curve.tokens <= base.tokens[-1])
    tokens = curve.tokens[inside].astype(np.float64)
    return tokens, curve.smooth[inside] - np.interp(tokens, base.tokens, base.smooth)


def held_out_difference(curve: Curve, base: Curve) -> dict[int, float]:
    """Return the held-out loss minus the baseline's, by tokens, where both were evaluated."""
    return {
        tokens: loss - base.held_out[tokens]
        for tokens, loss in curve.held_out.items()
        if tokens in base.held_out
    }


def reaches(curve: Curve, loss: float) -> float | None:
    """Return after how many tokens the smoothed loss first is at most `loss`, interpolated; None if never."""
    low = np.flatnonzero(curve.smooth <= loss)
    if not len(low):
        return None
    i = int(low[0])
    if i == 0:
        return float(curve.tokens[0])
    before, after = curve.smooth[i - 1], curve.smooth[i]
    part = (before - loss) / (before - after)
    return float(curve.tokens[i - 1] + part * (curve.tokens[i] - curve.tokens[i - 1]))


def _by_tokens(records: list[dict[str, Any]], kind: str) -> dict[int, float]:
    # Of lines repeated after a restart the last counts.
    return {
        record["tokens"]: float(record["loss"])
        for record in records
        if record.get("kind") == kind and record.get("loss") is not None
    }
