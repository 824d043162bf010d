import subprocess
import sys
import textwrap
import threading
import time

import pytest

from tide_mega.config.schema import TideConfig
from tide_mega.errors import Exit
from tide_mega.training.faults.watchdog import Watchdog, hang_seconds


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_beats_push_the_end_away(tmp_path):
    clock = Clock()
    dog = Watchdog(tmp_path, 0, 60.0, clock=clock)
    clock.now += 50
    assert dog.seconds_left() == 10
    dog.beat("evaluation")
    assert dog.seconds_left() == 60


def test_long_work_that_beats_is_left_alone_and_silence_is_not(tmp_path):
    ended = threading.Event()
    statuses = []
    dog = Watchdog(tmp_path, 3, 0.2, end=lambda status: (statuses.append(status), ended.set()))
    dog.start()
    until = time.monotonic() + 0.8
    while time.monotonic() < until:
        dog.beat("evaluation")
        ended.wait(0.01)
    assert not statuses
    assert ended.wait(10)
    assert statuses == [Exit.HUNG]
    dog.close()
    text = (tmp_path / "rank-3.txt").read_text()
    assert "rank 3" in text and "'evaluation'" in text
    assert "test_long_work_that_beats" in text  # the stack of the thread that was silent


def test_a_closed_or_disabled_watchdog_ends_nothing(tmp_path):
    def fail(status):
        raise AssertionError(status)

    for seconds in (0.05, 0.0):
        dog = Watchdog(tmp_path, 0, seconds, end=fail)
        dog.start()
        dog.close()
        assert not any(thread.name == "watchdog" for thread in threading.enumerate())


def test_a_folder_that_cannot_be_written_keeps_no_hung_process_alive(tmp_path):
    (tmp_path / "file").touch()
    code = textwrap.dedent(f"""
        import threading
        from pathlib import Path
        from tide_mega.training.faults.watchdog import Watchdog
        def stuck_here():
            threading.Event().wait()
        Watchdog(Path({str(tmp_path / "file")!r}), 0, 0.1).start()
        stuck_here()
    """)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == Exit.HUNG
    assert "could not be written" in done.stderr
    assert "in stuck_here" in done.stderr


@pytest.mark.parametrize(("minutes", "seconds"), [(None, 1200.0), (5.0, 300.0), (0.0, 0.0)])
def test_patience_ends_before_that_of_collectives(minutes, seconds):
    config = TideConfig()
    config.faults.hang_minutes = minutes
    assert hang_seconds(config) == seconds
