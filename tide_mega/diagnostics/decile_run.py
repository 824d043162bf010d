"""The held-out losses of one run by frequency decile, read from its metrics.jsonl."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tide_mega.data.frequency import NUM_BINS

DECILES = tuple(str(decile) for decile in range(NUM_BINS))
"""From the rarest tenth of the token types to the commonest."""
OUTSIDE = ("dropped", "unseen")
"""Tokens of no decile: special, blank or punctuation; types that training text does not have."""


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


def load_run(run_dir: Path, label: str | None = None) -> DecileRun:
    """The last evaluation of a run folder, under `label` or the folder's name.

    Raises:
        ValueError: if there is no evaluation in it.
    """
    path = run_dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number in range(len(lines), 0, -1):
        try:
            record = json.loads(lines[number - 1])
        except ValueError as error:
            if number == len(lines):
                continue  # torn by a kill
            raise ValueError(f"{path}:{number} is not JSON ({error}); repair or remove that line") from error
        if record.get("kind") == "eval":
            return DecileRun.from_record(label or run_dir.name, record)
    raise ValueError(f"{path} holds no evaluation: let the run reach one, or check the run folder's name")


def _number(value: float | str | None) -> float | None:
    # A diverged loss stands in the file as the string "NaN" or "Infinity".
    return None if value is None else float(value)
