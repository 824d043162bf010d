"""The second door to wandb: its records, read from the files an offline run leaves."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from wandb.proto import wandb_internal_pb2 as pb

from tide_mega.config.stored import parse_json
from tide_mega.dashboard.blocks import read_frames
from tide_mega.dashboard.errors import DashboardError
from tide_mega.dashboard.history import Row
from tide_mega.dashboard.panel import AXES


@dataclass
class OfflineRun:
    """The records of one .wandb file."""

    path: Path
    run_id: str = ""
    name: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    """As given to `wandb.init`, nested."""
    rows: list[Row] = field(default_factory=list)
    """What was logged, in order, without W&B's own keys."""
    is_finished: bool = False
    """Whether the run was closed; else it was killed, or goes on."""
    notes: list[str] = field(default_factory=list)
    """What could not be read, and what was left out."""


def read_offline(path: Path) -> OfflineRun:
    """Read a .wandb file, whole or cut off by a kill.

    Raises:
        DashboardError: it cannot be opened, or is no .wandb file.
    """
    try:
        frames = read_frames(path.read_bytes())
    except OSError as error:
        raise DashboardError(f"{path} cannot be read: {error}.") from error
    except DashboardError as error:
        raise DashboardError(f"{path}: {error}") from error
    run = OfflineRun(path, notes=list(frames.problems))
    without_axes = 0
    for number, payload in enumerate(frames.records, start=1):
        try:
            record = pb.Record.FromString(payload)
        except DecodeError as error:
            run.notes.append(f"record {number} of {len(frames.records)} is no W&B record ({error})")
            continue
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run.run_id, run.name = record.run.run_id, record.run.display_name
            run.config |= {update.key: parse_json(update.value_json) for update in record.run.config.update}
        elif kind == "exit":
            run.is_finished = True
        elif kind == "history":
            row = _row(record.history.item, run.notes)
            if all(isinstance(row.get(axis), int | float) for axis in AXES):
                run.rows.append(row)
            else:
                without_axes += 1
    if without_axes:
        run.notes.append(f"{without_axes} rows without step and tokens, which training did not log")
    return run


def _row(items: Iterable[pb.HistoryItem], notes: list[str]) -> Row:
    row: Row = {}
    for item in items:
        key = item.key or ".".join(item.nested_key)
        if key.startswith("_"):
            continue
        value = _number(item.value_json)
        if value is None:
            note = f"{key} is not a number and was left out"
            if note not in notes:
                notes.append(note)
        else:
            row[key] = value
    return row


def _number(value_json: str) -> float | int | None:
    try:
        value = parse_json(value_json)
        # What JSON lacks may stand there as a string.
        return float(value) if value in ("NaN", "Infinity", "-Infinity") else _plain(value)
    except (ValueError, TypeError):
        return None


def _plain(value: Any) -> float | int | None:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None
