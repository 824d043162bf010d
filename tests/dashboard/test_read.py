import json
from pathlib import Path

import pytest

from tests.dashboard.samples import (
    all_rows,
    eval_record,
    event_record,
    live_record,
    train_record,
    weights_record,
)
from tide_mega.errors import DashboardError
from tide_mega.lab.dashboard.read import read_run
from tide_mega.metrics.jsonl import JsonlLogger


def log_all(logger: JsonlLogger) -> None:
    logger.log(train_record())
    logger.log(live_record())
    logger.log(eval_record())
    logger.log(weights_record())
    for event in ("skipped", "spike", "rollback"):
        logger.log(event_record(event))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a record of every kind."""
    path = tmp_path_factory.mktemp("runs") / "mine"
    path.mkdir()
    log_all(JsonlLogger(path / "metrics.jsonl", None))
    return path


def test_metrics_are_read_by_their_names_in_wandb(folder: Path) -> None:
    run = read_run(str(folder))
    assert run.rows == all_rows() and run.notes == []
    assert run.label == "mine" and run.source.endswith("mine/metrics.jsonl")
    assert read_run(f"other={folder}").label == "other"


def test_lines_of_other_versions_are_read_and_said(folder: Path, tmp_path: Path) -> None:
    line = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    old = {key: value for key, value in line.items() if key != "goodput"}
    new = line | {"fresh": 1.0, "step": 20}
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in (old, new, {"step": 21, "kind": "odd"}))
    )
    run = read_run(str(tmp_path))
    assert "throughput/goodput" not in run.rows[0] and run.rows[1]["step"] == 20
    assert run.notes == [
        "TrainRecord has no field 'fresh', which was left out",
        "lines of the unknown kind 'odd' were left out",
    ]


def test_a_line_that_lacks_what_it_needs_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "kind": "train"}\n')
    with pytest.raises(DashboardError, match="the train line of step 3"):
        read_run(str(tmp_path))


def test_a_folder_without_a_run_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DashboardError, match="is no folder"):
        read_run(str(tmp_path / "absent"))
    with pytest.raises(DashboardError, match=r"has no metrics.jsonl:"):
        read_run(str(tmp_path))
