"""Finds and reads what a run logged: metrics.jsonl of a run folder, or W&B's files."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from tide_mega.errors import DashboardError
from tide_mega.lab.dashboard.history import Row, RunHistory, standing
from tide_mega.lab.dashboard.offline import OfflineRun, read_offline
from tide_mega.metrics.jsonl import read_metrics
from tide_mega.metrics.names import eval_metrics, event_metrics, live_metrics, train_metrics, weights_metrics
from tide_mega.metrics.records import (
    EvalRecord,
    EventRecord,
    LiveRecord,
    TextResult,
    TrainRecord,
    WeightsRecord,
)

METRICS_FILE = "metrics.jsonl"
SOURCES = ("auto", "jsonl", "wandb")
"""auto takes metrics.jsonl if there is one."""
_KINDS: dict[str, tuple[Any, Callable[[Any], Row]]] = {
    "train": (TrainRecord, train_metrics),
    "eval": (EvalRecord, eval_metrics),
    "live": (LiveRecord, live_metrics),
    "weights": (WeightsRecord, weights_metrics),
    "event": (EventRecord, event_metrics),
}


def read_run(given: str, source: str = "auto") -> RunHistory:
    """Read a run.

    Args:
        given: a run folder, an offline run's folder or its .wandb file; or `label=` and one of these.
        source: one of `SOURCES`; applies to run folders.

    Raises:
        DashboardError: there is nothing to read, or it cannot be read.
    """
    label, path = _split(given)
    if path.suffix == ".wandb":
        return _from_wandb(label or path.stem, [path])
    if not path.is_dir():
        raise DashboardError(f"{path} is no folder: give a run folder, or a .wandb file.")
    if source != "wandb" and (path / METRICS_FILE).is_file():
        return _from_jsonl(label or path.resolve().name, path / METRICS_FILE)
    # W&B's own folder contains its file; a run folder contains one such folder per start.
    # Their names contain the date, which orders online (run-*) and offline (offline-run-*) runs alike.
    files = sorted(path.glob("run-*.wandb")) or sorted(
        path.glob("wandb/*run-*/run-*.wandb"), key=lambda file: file.parent.name.removeprefix("offline-")
    )
    if source == "jsonl" or not files:
        wanted = {"jsonl": METRICS_FILE, "wandb": "wandb/offline-run-*/run-*.wandb"}.get(
            source, f"{METRICS_FILE} nor wandb/offline-run-*/run-*.wandb"
        )
        raise DashboardError(f"{path} has no {wanted}: give the folder of a run that has logged something.")
    return _from_wandb(label or path.resolve().name, files)


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
    if kind not in _KINDS:
        _note(notes, f"lines of the unknown kind {kind!r} were left out")
        return None
    record, metrics = _KINDS[kind]
    try:
        known = _known(record, line, notes)
        if texts := known.get("texts"):
            known["texts"] = {
                name: TextResult(**_known(TextResult, text, notes)) for name, text in texts.items()
            }
        return metrics(record(**known))
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


def _from_wandb(label: str, files: list[Path]) -> RunHistory:
    runs = [read_offline(path) for path in files]
    last = next((run.run_id for run in reversed(runs) if run.run_id), "")
    chosen = [run for run in runs if run.run_id in (last, "")]
    others = sorted({run.run_id for run in runs} - {last, ""})
    rows, dropped = standing(row for run in chosen for row in run.rows)
    notes = [f"{run.path.name}: {note}" for run in chosen for note in _notes(run)]
    if others:
        notes.append(f"W&B runs {', '.join(others)} lie there too; give their .wandb files to see them")
    if dropped:
        notes.append(f"{dropped} rows were logged again after a resume or rollback, and left out")
    source = str(files[0] if len(files) == 1 else files[0].parent.parent)
    return RunHistory(label, source, rows, notes)


def _notes(run: OfflineRun) -> list[str]:
    ended = [] if run.is_finished else ["the run was not closed: it was killed, or goes on"]
    return ended + run.notes
