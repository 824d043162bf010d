"""Every kind that `faults.inject` takes, through a whole training: each does what it says, and only it does."""

import errno
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import TINY, tiny, train_here
from tests.support.slow import quick_and_slow
from tide_mega.checkpoint.folder import verify
from tide_mega.config.validate import KINDS
from tide_mega.errors import CheckpointError, DataError, Exit
from tide_mega.metrics.jsonl import read_metrics

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Seen:
    """What can be seen of a run that has ended."""

    ended: int | str
    """Its steps, the name of its error, or of a process of its own the exit status."""
    said: str
    """Warnings and errors, or what the process wrote."""
    folder: Path

    @property
    def records(self) -> list[dict[str, Any]]:
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def events(self) -> list[tuple[str, str, int]]:
        return [(r["event"], r["reason"], r["at_step"]) for r in self.records if r["kind"] == "event"]

    @property
    def seconds(self) -> dict[int, float]:
        return {r["step"]: r["step_seconds"] for r in self.records if r["kind"] == "train"}

    @property
    def saved(self) -> list[str]:
        return sorted(path.name for path in (self.folder / "checkpoints").iterdir())


@dataclass(frozen=True)
class Fault:
    """A fault, the run it strikes, and what then must be seen of it."""

    inject: str
    shows: Callable[[Seen], bool]
    words: tuple[str, ...] = ()
    in_own_process: bool = False
    """It ends the process."""


FAULTS = {
    "nan_loss": Fault("nan_loss@4", lambda seen: ("skipped", "loss", 4) in seen.events),
    "nan_grad": Fault("nan_grad@4", lambda seen: ("skipped", "gradient", 4) in seen.events),
    "spike": Fault(
        "spike@10", lambda seen: ("spike", "spike", 10) in seen.events, ("faults.spike_window=8",)
    ),
    "slow": Fault("slow@9:0:1", lambda seen: seen.seconds.get(10, 0) > 1 > seen.seconds[8]),
    "bad_shard": Fault(
        "bad_shard@4", lambda seen: seen.ended == "DataError" and "cannot be read at batch 4" in seen.said
    ),
    "disk_full": Fault(
        "disk_full@4",
        lambda seen: (
            seen.ended == "CheckpointError"
            and "step 6 could not be written (rank 0: OSError" in seen.said
            and os.strerror(errno.ENOSPC) in seen.said
        ),
    ),
    "kill": Fault("kill@5", lambda seen: seen.ended == -signal.SIGKILL, in_own_process=True),
    "hang": Fault(
        "hang@5",
        lambda seen: seen.ended == Exit.HUNG and "no progress" in seen.said,
        ("faults.hang_minutes=0.1",),
        in_own_process=True,
    ),
}
"""Every one is brought about in a run of 10 steps that is saved every 3."""
WORDS = ("trainer.max_steps=10", "trainer.eval_every=0")


def watched(config):
    """Train in a pool's worker; return how it ended, and the warnings."""
    said = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("tide_mega")
    logger.addHandler(handler)
    try:
        return train_here(config), said
    except (CheckpointError, DataError) as error:
        return type(error).__name__, [*said, str(error)]
    finally:
        logger.removeHandler(handler)


def train(pools, data, root, *words, world=1):
    """Train in this process's pool; return what each rank saw."""
    config = tiny(data, root, *WORDS, *words, world_size=world)
    return [Seen(ended, "\n".join(said), root / "tiny") for ended, said in pools(world).run(watched, config)]


def train_alone(data, root, *words):
    """Train in a process of its own, as a user does."""
    command = [sys.executable, "-m", "tide_mega.train", *TINY, f"data.path={data}", f"run.root={root}"]
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(
        [*command, "run.name=tiny", *WORDS, *words],
        env={**alone, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return Seen(done.returncode, done.stdout + done.stderr, root / "tiny")


def test_every_kind_has_a_training_here():
    assert FAULTS.keys() == KINDS.keys()
    assert all(fault.inject.startswith(f"{kind}@") for kind, fault in FAULTS.items())


@pytest.mark.parametrize(
    "kind", quick_and_slow([kind for kind, fault in FAULTS.items() if not fault.in_own_process], list(FAULTS))
)
def test_the_fault_strikes_the_training_and_shows_what_it_says(pools, tiny_data, tmp_path, kind):
    fault = FAULTS[kind]
    words = (*fault.words, f"faults.inject=[{fault.inject}]")
    seen = (
        train_alone(tiny_data, tmp_path, *words)
        if fault.in_own_process
        else train(pools, tiny_data, tmp_path, *words)[0]
    )
    assert f"FAULT INJECTION (faults.inject): {fault.inject}: {KINDS[kind]}" in seen.said
    assert [name for name, other in FAULTS.items() if other.shows(seen)] == [kind], seen


def test_a_training_without_faults_shows_none_of_them(pools, tiny_data, tmp_path):
    (seen,) = train(pools, tiny_data, tmp_path, "faults.spike_window=8")
    assert seen.ended == 10
    assert [kind for kind, fault in FAULTS.items() if fault.shows(seen)] == []


@pytest.mark.slow
def test_a_killed_run_is_not_killed_again(tiny_data, tmp_path):
    words = ("faults.inject=[kill@5]", "checkpoint.asynchronous=false")  # step 3 is saved before the kill
    first, second = (train_alone(tiny_data, tmp_path, *words) for _ in range(2))
    assert (first.ended, second.ended) == (-signal.SIGKILL, 0)
    assert "resumed from" in second.said and "has struck before in this run folder" in second.said


@pytest.mark.parametrize("asynchronous", ["true", "false"])
@pytest.mark.parametrize("rank", ["", ":1"])
def test_a_full_disk_stops_the_run_on_every_rank_and_the_next_start_goes_on(
    pools, tiny_data, tmp_path, asynchronous, rank
):
    words = (f"faults.inject=[disk_full@4{rank}]", f"checkpoint.asynchronous={asynchronous}")
    for seen in train(pools, tiny_data, tmp_path, *words, world=2):
        assert seen.ended == "CheckpointError"
        struck = "rank 1: OSError" if rank else "rank 0: OSError"
        assert f"the checkpoint of step 6 could not be written ({struck}" in seen.said
        assert f"[Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}" in seen.said
        assert "checkpoint.on_error=continue would go on" in seen.said
        assert seen.saved == ["step-00000003"]
        assert verify(seen.folder / "checkpoints" / "step-00000003") == []
    for seen in train(pools, tiny_data, tmp_path, *words, world=2):
        assert seen.ended == 10
        assert seen.saved == ["step-00000009", "step-00000010"]


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_with_on_error_continue_the_run_goes_on_past_a_full_disk(pools, tiny_data, tmp_path, asynchronous):
    words = (
        *("faults.inject=[disk_full@4]", "checkpoint.on_error=continue", "checkpoint.keep_last=9"),
        f"checkpoint.asynchronous={asynchronous}",
    )
    (seen,) = train(pools, tiny_data, tmp_path, *words)
    assert seen.ended == 10
    (line,) = [line for line in seen.said.splitlines() if "could not be written" in line]
    assert "step 6 could not be written" in line and "training goes on" in line
    assert seen.saved == ["step-00000003", "step-00000009", "step-00000010"]
