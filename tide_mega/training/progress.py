"""The console: one plain line a log step, so that a terminal and a SLURM log read alike."""

import sys
from typing import TextIO

from tide_mega.metrics.live_records import LiveRecord, WeightsRecord
from tide_mega.metrics.records import EvalRecord, EventRecord, TrainRecord


class Progress:
    """Prints records; build it on rank 0 only."""

    def __init__(self, total_steps: int, stream: TextIO | None = None) -> None:
        """Take the steps of the whole run, and where to print (standard output if None)."""
        self._total_steps = total_steps
        self._stream = stream

    def log_train(self, record: TrainRecord) -> None:
        """Print step, loss, learning rate, gradient norm, speed and the time left."""
        self._print(format_train(record, self._total_steps))

    def log_eval(self, record: EvalRecord) -> None:
        """Print the held-out loss, whole and by rarity, and the perplexity on texts."""
        self._print(format_eval(record, self._total_steps))

    def log_live(self, record: LiveRecord) -> None:
        """Nothing: too much for a line."""

    def log_weights(self, record: WeightsRecord) -> None:
        """Nothing: too much for a line."""

    def log_event(self, record: EventRecord) -> None:
        """Nothing: the log has a warning of it."""

    def rewind(self, step: int) -> None:
        """Nothing: what was printed stays."""

    def close(self) -> None:
        """Nothing to release."""

    def _print(self, line: str) -> None:
        print(line, file=self._stream or sys.stdout, flush=True)


def format_train(record: TrainRecord, total_steps: int) -> str:
    """The line of a training record."""
    norm = f"grad norm {record.grad_norm:.3g}"
    if record.grad_norm_tables is not None:
        norm += f" (tables {record.grad_norm_tables:.3g})"
    parts = [
        _step(record.step, total_steps),
        f"loss {record.loss:.4f}",
        f"lr {record.lr:.2e}",
        norm,
        f"{format_count(record.tokens_per_second)} tokens/s",
    ]
    if record.mfu is not None:
        parts.append(f"MFU {record.mfu:.1%}")
    null = [weight for weight in record.null_weight_by_layer if weight is not None]
    if null:
        parts.append(f"null {sum(null) / len(null):.3f}")
    if record.goodput is not None:
        parts.append(f"goodput {record.goodput:.1%}")
    for name, count in (("skipped", record.skipped_steps), ("rollbacks", record.rollbacks)):
        if count:
            parts.append(f"{name} {count}")
    if record.skipped_windows:
        parts.append(f"windows left out {record.skipped_windows}")
    if record.slow_ranks:
        parts.append(f"slow ranks {', '.join(map(str, record.slow_ranks))} ({record.slowest_ratio:.2f} x)")
    parts.append(f"ETA {format_duration(record.eta_seconds)}")
    return " | ".join(parts)


def format_eval(record: EvalRecord, total_steps: int) -> str:
    """The line of an evaluation."""
    losses = (("loss", record.loss), ("rare", record.rare), ("mid", record.mid), ("common", record.common))
    parts = [f"{name} {'-' if loss is None else f'{loss:.4f}'}" for name, loss in losses]
    held_out = sum(record.count_by_bin.values())
    parts = ["held-out " + parts[0], *parts[1:], f"{held_out:,} tokens"]
    if record.texts:
        texts = (f"{name} {text.perplexity:.2f}" for name, text in record.texts.items())
        parts.append("perplexity " + ", ".join(texts))
    return " | ".join([_step(record.step, total_steps), *parts])


def format_count(value: float) -> str:
    """Three digits and a unit: 950, 12.3k, 1.25M."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.0f}"


def format_duration(seconds: float) -> str:
    """Two units at most: 42s, 3m07s, 5h02m, 2d04h."""
    total = round(seconds)
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    if total < 86400:
        return f"{total // 3600}h{total % 3600 // 60:02d}m"
    return f"{total // 86400}d{total % 86400 // 3600:02d}h"


def _step(step: int, total_steps: int) -> str:
    return f"step {step:>{len(str(total_steps))}}/{total_steps}"
