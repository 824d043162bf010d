import signal
import subprocess
import sys

import pytest
import torch

from tide_mega.errors import ConfigError, DataError
from tide_mega.model.steps import StepResult
from tide_mega.training.faults.guard import Injector

RESULT = StepResult(torch.tensor(6.0), torch.tensor(1.0), torch.tensor(3), [])


class Engine:
    poisoned = 0

    def poison_gradient(self) -> None:
        self.poisoned += 1


def test_nothing_asked_for_changes_nothing(tmp_path):
    injector = Injector([], 0, tmp_path / "marks")
    injector.before(1)
    assert injector.spoil(RESULT, Engine(), 1) is RESULT
    assert not (tmp_path / "marks").exists()


def test_a_fault_strikes_its_batch_on_its_rank_alone(tmp_path):
    texts = ["nan_loss@3:1", "nan_grad@4", "spike@5"]
    for rank in (0, 1):
        injector, engine = Injector(texts, rank, tmp_path), Engine()
        losses = [float(injector.spoil(RESULT, engine, batch).loss_sum) for batch in (2, 4, 5)]
        assert losses == [6.0, 6.0, 60.0]
        assert engine.poisoned == 1
        assert injector.spoil(RESULT, engine, 3).loss_sum.isnan() == (rank == 1)


def test_faults_are_said_aloud(tmp_path, caplog):
    Injector(["nan_loss@3"], 0, tmp_path).spoil(RESULT, Engine(), 3)
    messages = [record.message for record in caplog.records]
    assert messages == [
        "FAULT INJECTION (faults.inject): nan_loss@3: the step's loss is NaN",
        "FAULT INJECTION: nan_loss@3 strikes",
    ]


def test_a_bad_shard_is_the_error_of_a_bad_shard(tmp_path):
    injector = Injector(["bad_shard@2"], 0, tmp_path)
    injector.before(1)
    with pytest.raises(DataError, match="batch 2"):
        injector.before(2)


def test_a_full_disk_strikes_once_from_its_step_on(tmp_path):
    texts = ["disk_full@4", "disk_full@7:1"]
    injector = Injector(texts, 0, tmp_path)
    assert [injector.is_disk_full(batch) for batch in (3, 6, 7, 9)] == [False, True, False, False]
    started_again = Injector(texts, 0, tmp_path)
    assert [started_again.is_disk_full(batch) for batch in (6, 9)] == [False, False]
    other = Injector(texts, 1, tmp_path)
    assert [other.is_disk_full(batch) for batch in (3, 6, 7, 9)] == [False, True, True, False]


def test_an_unknown_fault_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is no known fault"):
        Injector(["gremlins@2"], 0, tmp_path)


@pytest.mark.slow
def test_a_kill_is_a_kill_and_comes_once(tmp_path):
    code = (
        "from pathlib import Path; from tide_mega.training.faults.guard import Injector\n"
        f"Injector(['kill@2:0'], 0, Path({str(tmp_path / 'marks')!r})).before(2); print('alive')"
    )
    first, second = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True) for _ in "12"
    )
    assert first.returncode == -signal.SIGKILL
    assert (second.returncode, second.stdout) == (0, "alive\n")
