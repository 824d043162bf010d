import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.dashboard.samples import (
    all_rows,
    eval_record,
    event_record,
    forget_login,
    live_record,
    renumbered,
    train_record,
    wandb_file,
    weights_record,
    write_offline_run,
)
from tide_mega.errors import DashboardError
from tide_mega.lab.dashboard.read import read_run
from tide_mega.metrics.jsonl import JsonlLogger
from tide_mega.training.loggers import WandbLogger


def log_all(logger: WandbLogger | JsonlLogger) -> None:
    logger.log_train(train_record())
    logger.log_live(live_record())
    logger.log_eval(eval_record())
    logger.log_weights(weights_record())
    for event in ("skipped", "spike", "rollback"):
        logger.log_event(event_record(event))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with metrics.jsonl and an offline W&B run of the same records."""
    path = tmp_path_factory.mktemp("runs") / "both"
    path.mkdir()
    log_all(JsonlLogger(path / "metrics.jsonl", None))
    with pytest.MonkeyPatch.context() as patch:
        forget_login(patch, path.parent)
        write_offline_run(path, log_all)
    return path


def test_metrics_jsonl_and_wandb_say_the_same(both: Path) -> None:
    jsonl, offline = read_run(str(both), "jsonl"), read_run(str(both), "wandb")
    assert jsonl.rows == all_rows()
    assert offline.rows == jsonl.rows
    assert jsonl.notes == offline.notes == []
    assert jsonl.source.endswith("both/metrics.jsonl") and offline.source.endswith(".wandb")


def test_metrics_jsonl_is_preferred_and_wandb_found_without_it(both: Path, tmp_path: Path) -> None:
    assert read_run(str(both)).source.endswith("metrics.jsonl")
    shutil.copytree(both / "wandb", tmp_path / "other" / "wandb", ignore=shutil.ignore_patterns("latest-run"))
    run = read_run(str(tmp_path / "other"))
    assert run.label == "other" and run.source.endswith(".wandb")


def test_a_run_may_be_named_and_given_as_folder_or_file_of_wandb(both: Path) -> None:
    file = wandb_file(both)
    assert read_run(str(file)).label == file.stem
    assert read_run(f"mine={file.parent}").label == "mine"
    assert read_run(str(file.parent)).rows == read_run(str(both)).rows


def log(*steps: int) -> Callable[[WandbLogger], object]:
    return lambda logger: [logger.log_train(renumbered(train_record(lr=0.1), step)) for step in steps]


def test_a_resumed_run_is_read_from_both_of_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_login(monkeypatch, tmp_path)
    run_dir = tmp_path / "run"
    run_id = write_offline_run(run_dir, log(10, 20, 30))
    (first,) = (run_dir / "wandb").glob("offline-run-*")
    first.rename(first.with_name(f"offline-run-20200101_000000-{run_id}"))
    write_offline_run(run_dir, log(30, 40), run_id)
    run = read_run(str(run_dir))
    assert [row["step"] for row in run.rows] == [10, 20, 30, 40]
    assert run.notes == ["1 rows were logged again after a resume or rollback, and left out"]

    other = write_offline_run(run_dir, log(5))
    run = read_run(str(run_dir))
    last = sorted((run_dir / "wandb").glob("offline-run-*"))[-1].name
    shown, left = (other, run_id) if last.endswith(other) else (run_id, other)
    assert any(left in note for note in run.notes) and not any(shown in note for note in run.notes)


def test_a_run_started_online_and_resumed_offline_is_read_in_order_of_date(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget_login(monkeypatch, tmp_path)
    run_dir = tmp_path / "run"
    run_id = write_offline_run(run_dir, log(10, 20, 30))
    (first,) = (run_dir / "wandb").glob("offline-run-*")
    first.rename(first.with_name(f"run-20200101_000000-{run_id}"))
    write_offline_run(run_dir, log(30, 40), run_id)
    assert [row["step"] for row in read_run(str(run_dir)).rows] == [10, 20, 30, 40]


def test_a_killed_run_says_so(both: Path, tmp_path: Path) -> None:
    path = tmp_path / "run-x.wandb"
    path.write_bytes(wandb_file(both).read_bytes()[:-400])
    run = read_run(str(path))
    assert run.rows == all_rows()[: len(run.rows)]
    assert run.notes[0] == "run-x.wandb: the run was not closed: it was killed, or goes on"
    assert "no whole record" in run.notes[1]


def test_lines_of_other_versions_are_read_and_said(both: Path, tmp_path: Path) -> None:
    line = json.loads((both / "metrics.jsonl").read_text().splitlines()[0])
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


def test_a_line_that_lacks_what_it_needs_is_refused(both: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "kind": "train"}\n')
    with pytest.raises(DashboardError, match="the train line of step 3"):
        read_run(str(tmp_path))


def test_a_folder_without_a_run_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DashboardError, match="is no folder"):
        read_run(str(tmp_path / "absent"))
    with pytest.raises(DashboardError, match=r"has no metrics.jsonl nor wandb/offline-run"):
        read_run(str(tmp_path))
    with pytest.raises(DashboardError, match=r"has no metrics.jsonl:"):
        read_run(str(tmp_path), "jsonl")
