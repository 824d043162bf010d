"""metrics.jsonl of a run folder: one JSON object a line, `{"step": …, "kind": …, …}`.

Kinds are train, eval and event (`tide_mega.metrics.records`), live and weights (`tide_mega.metrics.live_records`).

Floats keep full precision. A number that JSON does not have (a diverged loss) is written as the string
"NaN", "Infinity" or "-Infinity", and read back as the float.
"""

import json
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tide_mega.data.atomic import write_bytes
from tide_mega.metrics.live_records import LiveRecord, WeightsRecord
from tide_mega.metrics.records import EvalRecord, EventRecord, TrainRecord

log = logging.getLogger(__name__)

_OF_EVALUATIONS = ("eval", "weights")
_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class JsonlLogger:
    """Appends records, each on disk as soon as it is logged."""

    def __init__(
        self,
        path: Path,
        resume_step: int | None,
        resume_tokens: float = math.inf,
        *,
        evaluates_again: bool = False,
    ) -> None:
        """Continue the file of a run resumed at `resume_step` steps done, or (None) start it anew.

        `resume_tokens` are the training tokens consumed then: events after them come again. (By its steps alone a
        rollback would stand before the checkpoint it went back to.) `evaluates_again`: the evaluation of that step
        was due when the checkpoint was made, so what an earlier start logged of it comes again too.
        """
        step = -1 if resume_step is None else resume_step
        dropped = truncate_after(path, step, resume_tokens, evaluates_again=evaluates_again)
        if dropped:
            since = "of an earlier run" if resume_step is None else f"after step {resume_step}"
            log.info("%s: dropped %d lines %s, which this run writes again", path, dropped, since)
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def log_train(self, record: TrainRecord) -> None:
        """Append a line of kind "train"."""
        self._write("train", record)

    def log_eval(self, record: EvalRecord) -> None:
        """Append a line of kind "eval"."""
        self._write("eval", record)

    def log_live(self, record: LiveRecord) -> None:
        """Append a line of kind "live"."""
        self._write("live", record)

    def log_weights(self, record: WeightsRecord) -> None:
        """Append a line of kind "weights"."""
        self._write("weights", record)

    def log_event(self, record: EventRecord) -> None:
        """Append a line of kind "event"."""
        self._write("event", record)

    def rewind(self, step: int) -> None:
        """Drop the lines of steps after `step`, which come again; events stay, the data goes on."""
        self._file.close()
        truncate_after(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(
        self, kind: str, record: TrainRecord | EvalRecord | EventRecord | LiveRecord | WeightsRecord
    ) -> None:
        fields = asdict(record)
        line = {"step": fields.pop("step"), "kind": kind, **fields}
        self._file.write(json.dumps(_encode(line), allow_nan=False) + "\n")
        self._file.flush()


def truncate_after(path: Path, step: int, tokens: float = math.inf, *, evaluates_again: bool = False) -> int:
    """Drop the lines of steps after `step`, events after `tokens`, and a last line torn by a kill; -1 drops all.

    `evaluates_again` drops what evaluations at `step` itself logged. What stays, stays byte for byte; the file is
    replaced atomically, so a kill here loses nothing.

    Returns:
        The number of lines dropped.

    Raises:
        ValueError: if a line before the last is not a record.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [
        raw
        for raw, record in ([] if step < 0 else _parsed(path, lines))
        if _is_before(record, step, tokens)
        and not (evaluates_again and record["step"] == step and record.get("kind") in _OF_EVALUATIONS)
    ]
    if len(kept) < len(lines):
        write_bytes(path, b"".join(kept))
    return len(lines) - len(kept)


def _is_before(record: dict[str, Any], step: int, tokens: float) -> bool:
    return record["tokens"] <= tokens if record.get("kind") == "event" else record["step"] <= step


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every record in order, as `{"step", "kind", …}`; a last line torn by a kill is left out.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if a line before the last is not a record.
    """
    return [_decode(record) for _, record in _parsed(path, path.read_bytes().splitlines(keepends=True))]


def _parsed(path: Path, lines: list[bytes]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for number, raw in enumerate(lines, start=1):
        last = number == len(lines)
        if last and not raw.endswith(b"\n"):
            return
        try:
            record = json.loads(raw)
        except ValueError as error:
            if last:
                return
            raise ValueError(f"{path}:{number} is not JSON ({error}); repair or remove that line") from error
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise ValueError(f"{path}:{number} is not a record with a step; repair or remove that line")
        yield raw, record


def _encode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _decode(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value
