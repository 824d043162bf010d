import json
import math
from pathlib import Path

import pytest
from wandb.proto import wandb_internal_pb2 as pb

from tests.dashboard.samples import (
    eval_record,
    event_record,
    forget_login,
    framed,
    live_record,
    train_record,
    wandb_file,
    weights_record,
    write_offline_run,
)
from tide_mega.errors import DashboardError
from tide_mega.lab.dashboard.offline import read_frames, read_offline
from tide_mega.metrics.names import eval_metrics, event_metrics, live_metrics, train_metrics, weights_metrics
from tide_mega.training.loggers import WandbLogger

TRAIN = train_record(loss=5.123456789012345, grad_norm=math.inf, z_loss=math.nan)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("offline")
    with pytest.MonkeyPatch.context() as patch:
        forget_login(patch, path)

        def log(logger: WandbLogger) -> None:
            logger.log_train(TRAIN)
            logger.log_live(live_record())
            logger.log_eval(eval_record())
            logger.log_weights(weights_record())
            logger.log_event(event_record())

        (path / "id").write_text(write_offline_run(path, log))
    return path


def same(one: float, two: float) -> bool:
    return one == two or (math.isnan(one) and math.isnan(two))


def test_every_value_comes_back_as_it_was_logged(run_dir: Path) -> None:
    run = read_offline(wandb_file(run_dir))
    logged = [
        train_metrics(TRAIN),
        live_metrics(live_record()),
        eval_metrics(eval_record()),
        weights_metrics(weights_record()),
        event_metrics(event_record()),
    ]
    assert [row.keys() for row in run.rows] == [values.keys() for values in logged]
    assert all(
        same(row[name], values[name]) for row, values in zip(run.rows, logged, strict=True) for name in values
    )
    assert (run.run_id, run.name) == ((run_dir / "id").read_text(), "a_run")
    assert run.config["memory"] == {"num_blocks": 3}
    assert run.is_finished and run.notes == []


def test_the_file_cut_anywhere_gives_the_rows_before_the_cut(run_dir: Path, tmp_path: Path) -> None:
    data = wandb_file(run_dir).read_bytes()
    whole = read_offline(wandb_file(run_dir)).rows
    path = tmp_path / "run-x.wandb"
    counts = []
    for end in [*range(0, len(data), 61), len(data) - 1]:
        path.write_bytes(data[:end])
        run = read_offline(path)
        assert repr(run.rows) == repr(whole[: len(run.rows)])
        assert not run.is_finished
        counts.append(len(run.rows))
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == len(whole)


def test_a_damaged_row_is_said_and_the_others_are_read(run_dir: Path, tmp_path: Path) -> None:
    frames = read_frames(wandb_file(run_dir).read_bytes())
    path = tmp_path / "run-x.wandb"
    path.write_bytes(framed([*frames.records[:-1], b"\xff\xff", frames.records[-1]]))
    run = read_offline(path)
    assert len(run.rows) == 5
    assert any("is no W&B record" in note for note in run.notes)


def test_rows_that_training_did_not_log_are_counted(tmp_path: Path) -> None:
    def history(**values: object) -> bytes:
        record = pb.Record()
        for key, value in values.items():
            record.history.item.add(key=key, value_json=json.dumps(value))
        return record.SerializeToString()

    path = tmp_path / "run-x.wandb"
    path.write_bytes(
        framed([history(step=1, tokens=2, lr=0.5, _runtime=3, sample="a text"), history(other=1.0)])
    )
    run = read_offline(path)
    assert run.rows == [{"step": 1, "tokens": 2, "lr": 0.5}]
    assert run.notes == [
        "sample is not a number and was left out",
        "1 rows without step and tokens, which training did not log",
    ]


def test_a_file_that_is_no_run_or_absent_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run-x.wandb"
    with pytest.raises(DashboardError, match=r"run-x\.wandb cannot be read"):
        read_offline(path)
    path.write_text("something else")
    with pytest.raises(DashboardError, match=r"run-x\.wandb: the file begins with"):
        read_offline(path)
