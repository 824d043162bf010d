"""The dashboard tool and the plotting tool, as they are called."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from tests.dashboard.samples import eval_record, forget_login, renumbered, train_record
from tests.support.tools import tool_module
from tide_mega.lab import dashboard as dashboard_package
from tide_mega.metrics.jsonl import JsonlLogger


@pytest.fixture(scope="module")
def dashboard() -> Iterator[ModuleType]:
    pytest.importorskip("wandb_workspaces")
    with tool_module("dashboard") as module:
        yield module


@pytest.fixture(scope="module")
def plot_run() -> Iterator[ModuleType]:
    with tool_module("plot_run") as module:
        yield module


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    forget_login(monkeypatch, tmp_path)
    path = tmp_path / "runs" / "x"
    path.mkdir(parents=True)
    logger = JsonlLogger(path / "metrics.jsonl", None)
    for step in (10, 20):
        logger.log(renumbered(train_record(traffic={}, null_weight_by_layer=[]), step))
    logger.log(renumbered(eval_record(null_weight_by_layer_and_bin=[]), 20))
    return path


@pytest.fixture
def bare_run(tmp_path: Path) -> Path:
    """A run that has logged little, and is drawn fast."""
    path = tmp_path / "runs" / "bare"
    path.mkdir(parents=True)
    logger = JsonlLogger(path / "metrics.jsonl", None)
    logger.log(train_record(traffic={}, null_weight_by_layer=[], grad_norm_tables=None))
    empty = {
        "null_weight_by_layer": [],
        "null_weight_by_layer_and_bin": [],
        "null_weight_by_bin": {},
        "texts": {},
    }
    logger.log(eval_record(**empty))
    return path


def test_without_a_login_one_sentence_says_what_to_do(
    dashboard: ModuleType, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dashboard.main(["entity=team"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "wandb login" in said and "json=" in said


def test_the_workspace_is_written_without_a_login(
    dashboard: ModuleType, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "dashboard.json"
    assert dashboard.main([f"json={path}", f"run={run}", "entity=team", "project=mine"]) == 0
    made = json.loads(path.read_text())
    assert (made["entity"], made["project"], made["displayName"]) == ("team", "mine", "TIDE")
    assert "Loss by decile on text: pubmed" in path.read_text()
    capsys.readouterr()
    assert dashboard.main(["dry_run=true"]) == 0
    assert json.loads(capsys.readouterr().out)["project"] == "tide_mega"


def test_a_missing_run_or_library_is_said(
    dashboard: ModuleType,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert dashboard.main(["dry_run=true", f"run={tmp_path / 'absent'}"]) == 1
    assert "is no folder" in capsys.readouterr().err
    monkeypatch.delitem(sys.modules, "tide_mega.lab.dashboard.workspace", raising=False)
    monkeypatch.delattr(dashboard_package, "workspace", raising=False)
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert dashboard.main(["dry_run=true"]) == 2
    assert "pip install 'tide_mega[dashboard]'" in capsys.readouterr().err


def test_a_run_is_drawn_and_summed_up(
    plot_run: ModuleType, bare_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert plot_run.main([f"run={bare_run}", f"out={out}"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("bare: 2 records, ") and "step 10, 1,000 tokens" in said
    assert "panels without data: " in said and "Norm of memory rows by decile" in said
    names = {path.name for path in out.iterdir()}
    assert {"series.csv", "1_loss_by_frequency.png", "1_loss_by_frequency.svg", "5_speed.png"} <= names


def test_two_runs_of_one_name_must_be_told_apart(
    plot_run: ModuleType, bare_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plot_run.main([f"run={bare_run},{bare_run}", f"out={tmp_path}"]) == 2
    assert "two runs called 'bare'" in capsys.readouterr().err
    assert plot_run.main([f"run=a={bare_run},b={bare_run}", f"out={tmp_path / 'out'}", "x=step"]) == 0


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["run=absent"], 1, "absent is no folder"),
        (["run={run}/wandb"], 1, "is no folder"),
        (["run={run}/.."], 1, "has no metrics.jsonl"),
        (["run={run}", "x=loss"], 2, "use tokens or step"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    plot_run: ModuleType,
    run: Path,
    tmp_path: Path,
    words: list[str],
    status: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert plot_run.main([*(word.format(run=run) for word in words), f"out={tmp_path / 'out'}"]) == status
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


def test_a_run_that_logged_nothing_is_refused(
    plot_run: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert plot_run.main([f"run={tmp_path}", f"out={tmp_path / 'out'}"]) == 1
    assert "nothing to draw" in capsys.readouterr().err
