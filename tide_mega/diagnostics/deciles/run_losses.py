"""The held-out losses of one run by frequency decile, read from its metrics.jsonl."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tide_mega.config.errors import StatedError
from tide_mega.data.frequency import NUM_BINS
from tide_mega.metrics.jsonl import read_metrics

DECILES = tuple(str(decile) for decile in range(NUM_BINS))
"""From the rarest tenth of the token types to the commonest."""
OUTSIDE = ("dropped", "unseen")
"""Tokens of no decile: special, blank or punctuation; types that training text does not have."""


class NoEvaluationError(StatedError, ValueError):
    """A run was never evaluated."""


@dataclass(frozen=True)
class DecileRun:
    """One evaluation. Losses in nats per token, null weights 0 to 1; None where there is no token."""

    label: str
    step: int
    tokens: int
    """Training tokens consumed."""
    loss: float | None
    rare: float | None
    mid: float | None
    common: float | None
    loss_by_slot: dict[str, float | None]
    """Keyed by `DECILES` and `OUTSIDE`."""
    count_by_slot: dict[str, int]
    """Held-out target tokens."""
    null_by_layer: list[float | None]
    """[L]; empty without memory."""
    null_mean_by_slot: dict[str, float | None]
    """Mean over the layers, by the input token's slot; empty without memory."""
    null_last_by_slot: dict[str, float | None]
    """The last layer; empty without memory."""

    @property
    def has_memory(self) -> bool:
        """Whether the model has routers, so null weights."""
        return bool(self.null_by_layer)

    @property
    def null_mean(self) -> float | None:
        """Null weight over all tokens, mean over the layers."""
        known = [weight for weight in self.null_by_layer if weight is not None]
        return sum(known) / len(known) if known else None

    @property
    def null_last(self) -> float | None:
        """Null weight over all tokens in the last layer."""
        return self.null_by_layer[-1] if self.null_by_layer else None

    @classmethod
    def from_record(cls, label: str, record: Mapping[str, Any]) -> "DecileRun":
        """Take an evaluation's line of metrics.jsonl.

        Raises:
            ValueError: if the line lacks a field.
        """
        try:
            null = record["null_weight_by_bin"]
            return cls(
                label=label,
                step=record["step"],
                tokens=record["tokens"],
                loss=_number(record["loss"]),
                rare=_number(record["rare"]),
                mid=_number(record["mid"]),
                common=_number(record["common"]),
                loss_by_slot={slot: _number(record["loss_by_bin"][slot]) for slot in DECILES + OUTSIDE},
                count_by_slot={slot: int(record["count_by_bin"][slot]) for slot in DECILES + OUTSIDE},
                null_by_layer=[_number(weight) for weight in record["null_weight_by_layer"]],
                null_mean_by_slot={slot: _number(weight) for slot, weight in null.get("mean", {}).items()},
                null_last_by_slot={slot: _number(weight) for slot, weight in null.get("last", {}).items()},
            )
        except KeyError as error:
            raise ValueError(
                f"the evaluation of {label!r} has no {error}: was it written by tide_mega?"
            ) from error


def read_evaluations(run_dir: Path, label: str | None = None, until: int | None = None) -> list[DecileRun]:
    """Every evaluation of a run folder, by training tokens; of those repeated after a restart the last.

    Args:
        run_dir: the run folder.
        label: None means the folder's name.
        until: leave out evaluations after so many steps.

    Raises:
        NoEvaluationError: if there is none.
        ValueError: an evaluation's line lacks something.
    """
    path = run_dir / "metrics.jsonl"
    records = read_metrics(path) if path.exists() else []
    found = {
        record["step"]: DecileRun.from_record(label or run_dir.name, record)
        for record in records
        if record.get("kind") == "eval" and (until is None or record["step"] <= until)
    }
    if not found:
        so_far = "" if until is None else f" up to step {until}"
        raise NoEvaluationError(
            f"{path} holds no evaluation{so_far}: let the run reach one, or check the run folder's name"
        )
    return [found[step] for step in sorted(found)]


def load_run(run_dir: Path, label: str | None = None, until: int | None = None) -> DecileRun:
    """The last of `read_evaluations`."""
    return read_evaluations(run_dir, label, until)[-1]


def _number(value: float | None) -> float | None:
    return None if value is None else float(value)
