"""Reads what a run logged, by W&B name: the metrics.jsonl of its folder.

W&B's own files are not read: they hold the same records, and `wandb sync` uploads an offline run's.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from tide_mega.errors import DashboardError
from tide_mega.lab.dashboard.history import Row, RunHistory
from tide_mega.metrics.jsonl import read_metrics
from tide_mega.metrics.names import metrics_of
from tide_mega.metrics.records import KINDS, TextResult

METRICS_FILE = "metrics.jsonl"


def read_run(given: str) -> RunHistory:
    """Read a run.

    Args:
        given: a run folder, or `label=` and one.

    Raises:
        DashboardError: there is nothing to read, or it cannot be read.
    """
    label, path = _split(given)
    if not path.is_dir():
        raise DashboardError(f"{path} is no folder: give a run folder, which has {METRICS_FILE}.")
    metrics = path / METRICS_FILE
    if not metrics.is_file():
        raise DashboardError(
            f"{path} has no {METRICS_FILE}: give the folder of a run that has logged something."
        )
    return _from_jsonl(label or path.resolve().name, metrics)


def _split(given: str) -> tuple[str, Path]:
    label, sign, path = given.partition("=")
    if not sign or Path(given).exists():
        return "", Path(given)
    return label, Path(path)


def _from_jsonl(label: str, path: Path) -> RunHistory:
    try:
        lines = read_metrics(path)
    except (OSError, ValueError) as error:
        raise DashboardError(str(error)) from error
    notes: list[str] = []
    rows = [row for line in lines if (row := _named(line, path, notes))]
    return RunHistory(label, str(path), rows, notes)


def _named(line: dict[str, Any], path: Path, notes: list[str]) -> Row | None:
    """Return a line by its W&B names; None if it is of an unknown kind."""
    kind = line.get("kind")
    if kind not in KINDS:
        _note(notes, f"lines of the unknown kind {kind!r} were left out")
        return None
    record = KINDS[kind]
    try:
        known = _known(record, line, notes)
        if texts := known.get("texts"):
            known["texts"] = {
                name: TextResult(**_known(TextResult, text, notes)) for name, text in texts.items()
            }
        return metrics_of(record(**known))
    except (TypeError, AttributeError) as error:
        raise DashboardError(
            f"{path}: the {kind} line of step {line['step']} is none that training writes ({error}); repair or "
            "remove that line."
        ) from error


def _known(record: type, line: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    names = {item.name for item in fields(record)}
    for other in line.keys() - names - {"kind"}:
        _note(notes, f"{record.__name__} has no field {other!r}, which was left out")
    return {name: value for name, value in line.items() if name in names}


def _note(notes: list[str], note: str) -> None:
    if note not in notes:
        notes.append(note)
