import re
from pathlib import Path

import pytest

from tide_mega.errors import ConfigError, DataError, Exit
from tide_mega.run import console
from tide_mega.run.console import exit_on_run_error
from tide_mega.run.stop import RunStoppedError
from tide_mega.training.trainer import DivergedError

OUTCOME = (Path(__file__).parents[2] / "slurm" / "outcome.sh").read_text()


@pytest.mark.parametrize(
    ("error", "status"),
    [(ConfigError("x"), Exit.CONFIG), (DataError("x"), Exit.DATA), (DivergedError("x"), Exit.DIVERGED)],
)
def test_what_a_user_can_mend_has_its_status(error, status):
    with pytest.raises(SystemExit) as ended, exit_on_run_error():
        raise error
    assert ended.value.code == status


def test_a_stopped_run_leaves_with_its_status(monkeypatch):
    left = []
    monkeypatch.setattr(console, "leave_at_once", left.append)
    with exit_on_run_error():
        raise RunStoppedError("x")
    assert left == [Exit.STOPPED]


def test_any_other_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), exit_on_run_error():
        raise ZeroDivisionError


def test_the_job_scripts_know_every_status():
    described = {int(number) for number in re.findall(r"^        (\d+)\) what=", OUTCOME, flags=re.M)}
    assert described == set(Exit) - {Exit.ERROR}
    (final,) = re.findall(r"^        ([\d |]+)\)$", OUTCOME, flags=re.M)
    assert {int(n) for n in final.split("|")} == set(Exit) - {Exit.STOPPED, Exit.HUNG} - {
        Exit.ERROR,
        Exit.UNHEALTHY,
        Exit.CHECKPOINT,  # as of any error: it depends on how soon it came
    }
