import json
import math
import re
import socket
import struct
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2 as pb

from tide_mega.config.schema import LoggingConfig
from tide_mega.metrics.names import eval_metrics, event_metrics, train_metrics
from tide_mega.metrics.records import EvalRecord, EventRecord, TrainRecord
from tide_mega.training import loggers as wandb_logger
from tide_mega.training.loggers import WandbLogger

TRAIN = TrainRecord(
    step=10,
    tokens=20_480,
    loss=5.5,
    z_loss=1e-4,
    grad_norm=1.5,
    grad_norm_tables=0.5,
    lr=1e-4,
    tokens_per_second=12_345.0,
    mfu=None,
    step_seconds=0.25,
    traffic={"row gradients": {"sent": 12, "received": 34}},
    eta_seconds=60.0,
    null_weight_by_layer=[0.2, 0.25],
    goodput=0.875,
    skipped_steps=3,
    spikes=1,
)
EVENT = EventRecord(
    step=3, tokens=100, event="skipped", reason="loss", at_step=3, loss=math.nan, z_score=None
)
EVAL = EvalRecord(
    step=10,
    tokens=20_480,
    loss=4.5,
    rare=7.0,
    mid=5.0,
    common=4.0,
    loss_by_bin={"0": 7.5, "9": 3.5, "unseen": None},
    count_by_bin={"0": 3, "9": 7, "unseen": 0},
    null_weight_by_layer=[0.3],
    null_weight_by_bin={"mean": {"0": 0.25}, "last": {"0": 0.125}},
)


def leveldb_records(path: Path) -> Iterator[bytes]:
    """Payloads of a .wandb file: a 7-byte header, then LevelDB log blocks of 32 KiB.

    A chunk is crc32 (4 bytes), length (2), type (1: full, 2: first, 3: middle, 4: last), payload.
    """
    data, block, position, parts = path.read_bytes(), 32768, 7, b""
    while position + 7 <= len(data):
        left = block - position % block
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += 7
        parts += data[position : position + length]
        position += length
        if kind in (1, 4):
            yield parts
            parts = b""
        elif kind == 0:
            return


def read_offline_run(run_dir: Path) -> tuple[list[dict[str, Any]], list[pb.MetricRecord], list[pb.RunRecord]]:
    """History rows, metric definitions and run records of the offline run in `run_dir`."""
    wandb.teardown()  # a finished offline run may still be on its way to disk; this waits for it
    history, metrics, runs = [], [], []
    for path in sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb")):
        for payload in leveldb_records(path):
            record = pb.Record.FromString(payload)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                items = record.history.item
                history.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
            elif kind == "metric":
                metrics.append(record.metric)
            elif kind == "run":
                runs.append(record.run)
    return history, metrics, runs


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))


def open_logger(run_dir: Path, run_id: str | None, mode: str = "auto") -> WandbLogger:
    config = LoggingConfig(wandb=mode, wandb_project="tide_test")
    return WandbLogger(config, run_dir, name="a_run", run_config={"memory": {"num_blocks": 4}}, run_id=run_id)


def test_an_offline_run_reads_back(tmp_path: Path) -> None:
    logger = open_logger(tmp_path, None)
    logger.log(TRAIN)
    logger.log(EVAL)
    logger.log(replace(TRAIN, step=20, loss=5.0))
    logger.close()
    history, metrics, runs = read_offline_run(tmp_path)
    logged = [{key: row[key] for key in row if not key.startswith("_")} for row in history]
    assert logged == [
        train_metrics(TRAIN),
        eval_metrics(EVAL),
        train_metrics(replace(TRAIN, step=20, loss=5.0)),
    ]
    assert {metric.glob_name or metric.name: metric.step_metric for metric in metrics}["*"] == "step"
    assert (runs[0].run_id, runs[0].project, runs[0].display_name) == (logger.run_id, "tide_test", "a_run")
    config = {update.key: json.loads(update.value_json) for update in runs[0].config.update}
    assert config["memory"] == {"num_blocks": 4}


def test_a_resumed_run_keeps_its_identity(tmp_path: Path) -> None:
    first = open_logger(tmp_path / "a", None)
    first.log(TRAIN)
    first.close()
    second = open_logger(tmp_path / "b", first.run_id)
    second.log(replace(TRAIN, step=20))
    second.close()
    assert first.run_id
    assert second.run_id == first.run_id
    assert {run.run_id for run in read_offline_run(tmp_path / "b")[2]} == {first.run_id}


def test_rows_are_numbered_on_over_all_starts(tmp_path: Path) -> None:
    run_id = None
    for step in (10, 20, 20):
        logger = open_logger(tmp_path, run_id)
        logger.log(replace(TRAIN, step=step))
        logger.log(EVAL)
        logger.close()
        run_id = logger.run_id
    history = read_offline_run(tmp_path)[0]
    assert sorted(row["_step"] for row in history) == list(range(6))
    another = open_logger(tmp_path, None)
    another.log(TRAIN)
    another.close()
    assert sorted(row["_step"] for row in read_offline_run(tmp_path)[0]) == [0, *range(6)]


def test_the_count_of_rows_is_written_through_no_link(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("kept")
    for name in ("wandb_rows", "wandb_rows.tmp"):
        (tmp_path / name).symlink_to(tmp_path / "theirs")
    logger = open_logger(tmp_path, None, mode="disabled")
    assert [logger._rows.next() for _ in range(2)] == [0, 1]
    assert (tmp_path / "theirs").read_text() == "kept"
    assert (tmp_path / "wandb_rows").read_text() == "2\n" and not (tmp_path / "wandb_rows").is_symlink()


def test_two_runs_of_one_process_stay_apart(tmp_path: Path) -> None:
    first, second = open_logger(tmp_path / "a", None), open_logger(tmp_path / "b", None)
    second.log(replace(TRAIN, loss=2.0))
    first.log(replace(TRAIN, loss=1.0))
    first.close()
    second.close()
    assert first.run_id != second.run_id
    losses = [read_offline_run(tmp_path / name)[0][0]["train/loss"] for name in "ab"]
    assert losses == [1.0, 2.0]


def test_names_of_the_charts() -> None:
    assert train_metrics(TRAIN) == {
        "step": 10,
        "tokens": 20_480,
        "train/loss": 5.5,
        "train/z_loss": 1e-4,
        "train/grad_norm": 1.5,
        "train/grad_norm_tables": 0.5,
        "lr": 1e-4,
        "throughput/tokens_per_second": 12_345.0,
        "throughput/step_seconds": 0.25,
        "throughput/goodput": 0.875,
        "faults/skipped_steps": 3,
        "faults/spikes": 1,
        "faults/rollbacks": 0,
        "faults/skipped_windows": 0,
        "faults/skipped_shards": 0,
        "traffic/row_gradients_sent": 12,
        "traffic/row_gradients_received": 34,
        "null_weight/layer_00": 0.2,
        "null_weight/layer_01": 0.25,
    }
    assert eval_metrics(EVAL) == {
        "step": 10,
        "tokens": 20_480,
        "eval/loss": 4.5,
        "loss/rare": 7.0,
        "loss/mid": 5.0,
        "loss/common": 4.0,
        "loss_by_decile/0": 7.5,
        "loss_by_decile/9": 3.5,
        "null_weight_eval/layer_00": 0.3,
        "null_weight_by_decile_mean/0": 0.25,
        "null_weight_by_decile_last/0": 0.125,
    }


def test_an_event_is_logged_without_what_is_no_number() -> None:
    assert event_metrics(EVENT) == {"step": 3, "tokens": 100, "events/skipped": 3}
    spike = replace(EVENT, event="spike", reason="spike", loss=9.5, z_score=12.0)
    assert event_metrics(spike) == {
        "step": 3,
        "tokens": 100,
        "events/spike": 3,
        "events/loss": 9.5,
        "events/z_score": 12.0,
    }


@pytest.mark.slow
def test_a_server_that_refuses_connections_costs_its_patience_and_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setitem(wandb_logger._SETTINGS, "init_timeout", 3.0)
    wandb.teardown()  # its service has read the environment before
    logger = open_logger(tmp_path, "abc123", mode="online")
    logger.log(TRAIN)
    logger.log(EVENT)
    logger.close()
    assert logger.run_id == "abc123"
    assert len(read_offline_run(tmp_path)[0]) == 2
    assert sum("training goes on" in record.message for record in caplog.records) == 1


def test_disabled_writes_nothing(tmp_path: Path) -> None:
    logger = open_logger(tmp_path, "kept", mode="disabled")
    logger.log(TRAIN)
    logger.close()
    assert logger.run_id == "kept"
    assert list(tmp_path.iterdir()) == []


def test_no_connection_falls_back_to_offline_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = wandb.init

    def unreachable(**arguments: Any) -> Any:
        if arguments["mode"] == "online":
            raise wandb.errors.CommError("no route to host")
        return real(**arguments)

    monkeypatch.setattr(wandb_logger.wandb, "init", unreachable)
    logger = open_logger(tmp_path, "abc123", mode="online")
    logger.log(TRAIN)
    logger.close()
    assert logger.run_id == "abc123"
    assert len(read_offline_run(tmp_path)[0]) == 1
    warnings = [r for r in caplog.records if r.levelname == "WARNING" and r.name == wandb_logger.__name__]
    assert [warning.message for warning in warnings] == [
        "W&B could not start online: no route to host; training goes on"
    ]


def test_a_run_that_breaks_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken:
        id, url, dir = "x", None, "d"

        def define_metric(self, *_: Any, **__: Any) -> None: ...

        def log(self, _: Any) -> None:
            raise ConnectionResetError("service is gone")

        finish = log

    monkeypatch.setattr(wandb_logger.wandb, "init", lambda **_: Broken())
    logger = open_logger(tmp_path, None)
    for _ in range(3):
        logger.log(TRAIN)
    logger.log(EVAL)
    logger.close()
    assert sum("training goes on" in record.message for record in caplog.records) == 1


def test_a_run_that_cannot_start_does_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> Any:
        raise wandb.errors.UsageError("no")

    monkeypatch.setattr(wandb_logger.wandb, "init", refuse)
    logger = open_logger(tmp_path, "abc123")
    logger.log(TRAIN)
    logger.close()
    assert logger.run_id == "abc123"


@pytest.mark.parametrize("with_machine", [False, True])
def test_records_have_no_token_and_the_machine_by_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_machine: bool
) -> None:
    state = {"commit": "0" * 40, "dirty": False, "remote": "https://example.org/a.git"}
    monkeypatch.setattr(wandb_logger, "git_state", lambda folder: state)
    monkeypatch.setenv("WANDB_GIT_REMOTE_URL", "https://MARKER@example.org/a.git")
    config = LoggingConfig(wandb="offline", wandb_project="tide_test", wandb_machine=with_machine)
    run_config = {"checkpoint": {"remote": "https://MARKER@example.org/a", "also": ["s3://a?token=MARKER"]}}
    logger = WandbLogger(config, tmp_path, name="a_run", run_config=run_config, run_id=None)
    logger.log(TRAIN)
    logger.close()
    wandb.teardown()  # its service may still be writing
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*.wandb"))
    assert b"https://example.org/a" in written and b"MARKER" not in written
    assert (sys.executable.encode() in written) == with_machine
    if not with_machine:
        assert not re.search(rb"\b" + re.escape(socket.gethostname().encode()) + rb"\b", written)
