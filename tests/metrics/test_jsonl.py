import errno
import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tide_mega.files import json_values
from tide_mega.metrics.jsonl import JsonlLogger, _decode, read_metrics, truncate_after
from tide_mega.metrics.records import EvalRecord, EventRecord, TrainRecord

TRAIN = TrainRecord(
    step=10,
    tokens=20_480,
    loss=0.1 + 0.2,
    z_loss=1e-7 / 3,
    grad_norm=1.5,
    grad_norm_tables=None,
    lr=1e-4,
    tokens_per_second=12_345.6,
    mfu=0.41,
    step_seconds=0.2,
    eta_seconds=60.0,
    null_weight_by_layer=[0.2, 0.25],
)
EVAL = EvalRecord(
    step=20,
    tokens=40_960,
    loss=4.5,
    rare=None,
    mid=5.0,
    common=4.0,
    loss_by_bin={"0": None, "9": 4.0},
    count_by_bin={"0": 0, "9": 7},
    null_weight_by_layer=[0.2],
    null_weight_by_bin={"mean": {"9": 0.2}, "last": {"9": 0.2}},
)


def log_steps(path: Path, steps: list[int], resume_step: int | None = None) -> None:
    logger = JsonlLogger(path, resume_step)
    for step in steps:
        logger.log(replace(TRAIN, step=step, loss=step / 3))
    logger.close()


def test_records_come_back_to_the_last_bit(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path, None)
    logger.log(TRAIN)
    logger.log(EVAL)
    assert read_metrics(path) == [
        {"kind": "train", **asdict(TRAIN)},
        {"kind": "eval", **asdict(EVAL)},
    ], "each line must be on disk before the next"
    logger.close()
    assert path.read_text().startswith('{"step": 10, "kind": "train", ')


@given(st.recursive(st.floats() | st.none() | st.integers(), lambda inner: st.lists(inner, max_size=3)))
def test_any_float_survives_strict_json(value: object) -> None:
    back = _decode(json.loads(json.dumps(json_values({"x": value}), allow_nan=False)))
    assert repr(back) == repr({"x": value})


def test_a_diverged_loss_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path, None)
    logger.log(replace(TRAIN, loss=math.nan, grad_norm=math.inf))
    logger.close()
    (record,) = read_metrics(path)
    assert math.isnan(record["loss"])
    assert record["grad_norm"] == math.inf


def test_a_resumed_run_writes_the_file_of_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    log_steps(whole, [1, 2, 3, 4, 5, 6])
    log_steps(resumed, [1, 2, 3, 4, 5])
    with resumed.open("a") as file:
        file.write('{"step": 6, "kind": "tra')
    log_steps(resumed, [4, 5, 6], resume_step=3)
    assert resumed.read_bytes() == whole.read_bytes()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["resumed.jsonl", "whole.jsonl"]


def test_truncation_keeps_the_resumed_step_itself_and_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log_steps(path, [1, 2, 2, 3, 4])
    before = path.read_bytes().splitlines(keepends=True)
    assert truncate_after(path, 2) == 2
    assert path.read_bytes() == b"".join(before[:3])
    assert truncate_after(path, 9) == 0


def test_an_evaluation_that_comes_again_is_dropped_and_the_steps_losses_stay(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    kinds = [("train", 2), ("eval", 2), ("train", 3), ("live", 3), ("eval", 3), ("weights", 3)]
    path.write_text("".join(f'{{"step": {step}, "kind": "{kind}"}}\n' for kind, step in kinds))
    assert truncate_after(path, 3) == 0
    assert truncate_after(path, 3, evaluates_again=True) == 2
    assert [(r["kind"], r["step"]) for r in read_metrics(path)] == kinds[:4]


def test_a_new_run_drops_all_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("not a record\n\n")
    with caplog.at_level("INFO"):
        log_steps(path, [1], resume_step=None)
    assert [record["step"] for record in read_metrics(path)] == [1]
    assert "dropped 2 lines of an earlier run" in caplog.text


@pytest.mark.parametrize("torn", ['{"step": 2, "ki', '{"step": 2, "kind": "train"}', '{"st\n'])
def test_a_torn_last_line_is_left_out(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    log_steps(path, [1])
    whole = path.read_bytes()
    with path.open("a") as file:
        file.write(torn)
    assert [record["step"] for record in read_metrics(path)] == [1]
    assert truncate_after(path, 5) == 1
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{oops", "is not JSON"),
        ("[1]", "is not a record"),
        ('{"a": 1}', "is not a record"),
        ("\0" * 40, "is not JSON"),
        ('{"step": 1, "kind": "event"}', "is an event without tokens"),
    ],
)
def test_a_damaged_line_before_the_last_is_named_and_costs_itself_alone(
    tmp_path: Path, line: str, what: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n{{"step": 3}}\n')
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    assert f"metrics.jsonl is damaged: line 2 {what}" in caplog.text
    log_steps(path, [3], resume_step=2)
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    assert (tmp_path / "metrics.jsonl.damaged").read_text() == f"{line}\n"
    caplog.clear()
    read_metrics(path)
    assert not caplog.records


def test_a_full_disk_delays_the_log_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, room, write = tmp_path / "metrics.jsonl", 100, os.write

    def until_full(descriptor: int, content: bytes) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = write(descriptor, bytes(content[:room]))
        room -= written
        return written

    monkeypatch.setattr(os, "write", until_full)
    logger = JsonlLogger(path, None)
    for step in (1, 2):
        logger.log(replace(TRAIN, step=step))
    assert caplog.text.count("training goes on") == 1
    room = 10_000
    logger.log(replace(TRAIN, step=3))
    logger.close()
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]


def test_a_file_that_is_not_there_has_nothing_to_drop(tmp_path: Path) -> None:
    assert truncate_after(tmp_path / "metrics.jsonl", 3) == 0
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "metrics.jsonl")


def test_going_back_drops_the_lines_that_come_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    logger = JsonlLogger(path, None)
    for step in (10, 20, 30):
        logger.log(replace(TRAIN, step=step))
    event = EventRecord(
        step=20, tokens=33_000, event="rollback", reason="spike", at_step=33, loss=9.5, z_score=11.0
    )
    logger.log(replace(event, step=28, tokens=28_000, event="skipped"))
    logger.rewind(20)
    logger.log(event)
    logger.log(replace(TRAIN, step=30, loss=1.0))
    logger.close()
    records = read_metrics(path)
    assert [(record["kind"], record["step"]) for record in records] == [
        ("train", 10),
        ("train", 20),
        ("event", 28),
        ("event", 20),
        ("train", 30),
    ]
    assert records[3] == {"kind": "event", **asdict(event)}
    assert records[4]["loss"] == 1.0
    # Resumed from the checkpoint of step 20 before the rollback: everything since comes again.
    JsonlLogger(path, 20, 20_000).close()
    assert [record["step"] for record in read_metrics(path)] == [10, 20]
