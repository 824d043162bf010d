"""metrics.jsonl of a run folder: one JSON object per line, `{"step": …, "kind": …, …}`.

Kinds are train, eval, event, live and weights (`tide_mega.metrics.records`). Floats keep full precision. A
number that JSON cannot represent (a diverged loss) is written as the string "NaN", "Infinity" or "-Infinity",
and read back as the float. A line that is not a valid record affects nothing else: readers leave it out and name
it, and a run that continues the file moves it to metrics.jsonl.damaged.
"""

import json
import logging
import math
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tide_mega.files import json_values, parse_json, write_bytes
from tide_mega.metrics.records import KINDS, Record

log = logging.getLogger(__name__)

_KIND_OF = {record: kind for kind, record in KINDS.items()}
_OF_EVALUATIONS = ("eval", "weights")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JsonlLogger:
    """Appends records, each on disk as soon as it is logged, or once a failing disk accepts writes again."""

    def __init__(
        self,
        path: Path,
        resume_step: int | None,
        resume_tokens: float = math.inf,
        *,
        evaluates_again: bool = False,
    ) -> None:
        """Continue the file of a run resumed after `resume_step` steps, or (None) start it anew.

        `resume_tokens` are the training tokens consumed at that point: later events will be logged again.
        (Judged by steps alone, a rollback would precede the checkpoint that it went back to.) `evaluates_again`:
        the evaluation of that step was still due when the checkpoint was made, so records of it from an earlier
        start are repeated too.
        """
        step = -1 if resume_step is None else resume_step
        dropped = truncate_after(path, step, resume_tokens, evaluates_again=evaluates_again)
        if dropped:
            since = "of an earlier run" if resume_step is None else f"after step {resume_step}"
            log.info("%s: dropped %d lines %s, which this run writes again", path, dropped, since)
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._pending = bytearray()
        self._complained = False

    def log(self, record: Record) -> None:
        """Append a record as a line of its kind."""
        fields = asdict(record)
        line = {"step": fields.pop("step"), "kind": _KIND_OF[type(record)], **fields}
        self._pending += json.dumps(json_values(line), allow_nan=False).encode() + b"\n"
        self._flush()

    def rewind(self, step: int) -> None:
        """Drop the lines of steps after `step`, which will be logged again; events stay, as the data goes on."""
        try:
            truncate_after(self._path, step)  # replaces the file if it drops anything
            self._file.close()
            self._file = self._path.open("ab", buffering=0)
        except OSError as error:
            log.warning("%s keeps the lines after step %d, which come again: %s", self._path, step, error)

    def close(self) -> None:
        """Close the file."""
        self._flush()
        self._file.close()
        if self._pending:
            log.error(
                "%s lacks its last %d bytes, which could not be written", self._path, len(self._pending)
            )

    def _flush(self) -> None:
        """Write what is pending; a failure to write never stops training."""
        try:
            while self._pending:
                del self._pending[: os.write(self._file.fileno(), self._pending)]
        except OSError as error:
            if not self._complained:
                log.warning(
                    "%s could not be written: %s; training goes on, and lines are kept until they can be",
                    self._path,
                    error,
                )
            self._complained = True
        else:
            self._complained = False


def truncate_after(path: Path, step: int, tokens: float = math.inf, *, evaluates_again: bool = False) -> int:
    """Drop the lines of steps after `step`, events after `tokens`, and a last line torn by a kill; -1 drops all.

    `evaluates_again` also drops what evaluations at `step` itself logged. Other lines stay byte for byte; the
    file is replaced atomically, so a kill here loses nothing. Damaged lines before the last are moved to
    `path`.damaged.

    Returns:
        The number of lines dropped.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    records, damaged = _parsed([] if step < 0 else lines)
    kept = [
        raw
        for raw, record in records
        if _is_before(record, step, tokens)
        and not (evaluates_again and record["step"] == step and record.get("kind") in _OF_EVALUATIONS)
    ]
    if damaged:
        aside = path.with_name(path.name + ".damaged")
        with aside.open("ab") as file:
            file.writelines(lines[number - 1] for number in damaged)
        log.warning("%s; they are now in %s", _describe(path, damaged), aside)
    if len(kept) < len(lines):
        write_bytes(path, b"".join(kept))
    return len(lines) - len(kept) - len(damaged)


def _is_before(record: dict[str, Any], step: int, tokens: float) -> bool:
    return record["tokens"] <= tokens if record.get("kind") == "event" else record["step"] <= step


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return every record in order, as `{"step", "kind", …}`.

    A last line torn by a kill is left out; so are damaged lines before it, which the log names.

    Raises:
        FileNotFoundError: there is no such file.
    """
    records, damaged = _parsed(path.read_bytes().splitlines(keepends=True))
    if damaged:
        log.warning("%s and left out", _describe(path, damaged))
    return [_decode(record) for _, record in records]


def _parsed(lines: list[bytes]) -> tuple[list[tuple[bytes, dict[str, Any]]], dict[int, str]]:
    """Return the valid lines with their records, and what is wrong with the others, by line number from 1."""
    records: list[tuple[bytes, dict[str, Any]]] = []
    damaged: dict[int, str] = {}
    for number, raw in enumerate(lines, start=1):
        try:
            record = parse_json(raw)
        except ValueError as error:
            damaged[number] = f"is not JSON ({error})"
            continue
        if not isinstance(record, dict) or not _is_count(record.get("step")):
            damaged[number] = "is not a record with a step"
        elif record.get("kind") == "event" and not _is_count(record.get("tokens")):
            damaged[number] = "is an event without tokens"
        else:
            records.append((raw, record))
    if lines and not lines[-1].endswith(b"\n"):  # torn, even if what is there happens to be valid
        damaged.pop(len(lines), None)
        records = [(raw, record) for raw, record in records if raw is not lines[-1]]
    elif damaged.get(len(lines), "").startswith("is not JSON"):
        damaged.pop(len(lines))
    return records, damaged


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _describe(path: Path, damaged: dict[int, str]) -> str:
    said = "; ".join(f"line {number} {what}" for number, what in damaged.items())
    return f"{path} is damaged: {said}"


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
