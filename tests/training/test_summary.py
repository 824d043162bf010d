import json
import math
from dataclasses import replace

from tests.training.test_progress import EVAL, TRAIN
from tide_mega.training.faults.policy import DivergedError, FaultState
from tide_mega.training.goodput import Ledger
from tide_mega.training.report import lines, publish, summarise


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def summary(**changes):
    clock = Clock()
    ledger = Ledger(clock=clock, born=990.0)
    ledger.enter("compute")
    clock.now += 85
    ledger.enter("evaluation")
    clock.now += 5
    values = {
        "steps": 120,
        "total_steps": 120,
        "tokens": 1_250_000,
        "last_train": TRAIN,
        "last_eval": EVAL,
        "skipped_windows": 0,
        "skipped_shards": 0,
        "error": None,
        **changes,
    }
    return summarise(ledger, FaultState(skipped_steps=2, spikes=1, rollbacks=1), **values)


def test_the_last_lines_say_what_was_reached_and_where_the_time_went():
    assert lines(summary()) == [
        "complete at step 120/120, 1.25M tokens, loss 4.8731, held-out loss 4.5000",
        "goodput 85.0% of 1m40s; the rest: startup 10.0%, evaluation 5.0%",
        "0 restarts, 2 skipped steps, 1 loss spikes, 1 rollbacks",
    ]


def test_the_last_line_says_what_was_left_out():
    assert lines(summary(skipped_windows=1234, skipped_shards=2))[-1].endswith(
        "1 rollbacks, 1,234 unreadable windows of 2 shards left out"
    )


def test_the_file_is_json_that_adds_up(tmp_path):
    publish(
        summary(
            steps=7, error=DivergedError("enough"), last_train=replace(TRAIN, loss=math.nan), last_eval=None
        ),
        tmp_path / "summary.json",
    )

    def refuse(word):
        raise AssertionError(word)

    kept = json.loads((tmp_path / "summary.json").read_text(), parse_constant=refuse)
    assert (kept["is_complete"], kept["ended_by"]) == (False, "DivergedError: enough")
    assert (kept["loss"], kept["held_out_loss"]) == (None, None)
    assert sum(kept["seconds"].values()) == kept["wall_seconds"] == 100.0
    assert kept["goodput"] == 0.85


def test_a_disk_that_refuses_ends_nothing(tmp_path, caplog):
    (tmp_path / "file").touch()
    publish(summary(), tmp_path / "file" / "summary.json")
    assert "could not be written" in caplog.text
