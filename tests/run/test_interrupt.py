import logging
import os
import signal

import pytest
import torch.distributed as dist

from tests.support.runs import curve, tiny, train_here, train_until
from tests.support.slow import quick_and_slow
from tide_mega.parallel.groups import World
from tide_mega.run.stop import SIGNALS, Agreement, Interrupt, RunStoppedError, job_interrupt
from tide_mega.training.trainer import Trainer


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_becomes_a_wish_and_the_handlers_stay(number):
    before = [signal.getsignal(n) for n in SIGNALS]
    try:
        with Interrupt() as interrupt:
            assert interrupt.wish() == 0
            os.kill(os.getpid(), number)
            assert interrupt.wish() == number
        os.kill(os.getpid(), number)  # a late one, on the way out: it must not end the process
    finally:
        for n, handler in zip(SIGNALS, before, strict=True):
            signal.signal(n, handler)


def test_without_a_signal_the_handlers_are_given_back():
    before = [signal.getsignal(n) for n in SIGNALS]
    with Interrupt():
        assert [signal.getsignal(n) for n in SIGNALS] != before
    assert [signal.getsignal(n) for n in SIGNALS] == before


def test_later_signals_are_ignored_with_a_log_line(caplog):
    before = [signal.getsignal(n) for n in SIGNALS]
    try:
        with caplog.at_level(logging.INFO, "tide_mega"), Interrupt() as interrupt:
            for number in (signal.SIGUSR1, signal.SIGTERM):
                os.kill(os.getpid(), number)
            assert interrupt.wish() == signal.SIGUSR1
            assert caplog.text == ""
        assert caplog.text.count("SIGTERM came too: already stopping, ignored") == 1
    finally:
        for n, handler in zip(SIGNALS, before, strict=True):
            signal.signal(n, handler)


def test_the_time_is_up_when_the_clock_says_so():
    now = [99.0]
    agreement = Agreement(Interrupt(100.0, clock=lambda: now[0]))
    assert agreement.reason() is None
    now[0] = 100.0
    assert agreement.reason() == "the job's time is nearly up"


def test_the_jobs_end_time_is_known_and_said(monkeypatch, caplog):
    for name in ("SLURM_JOB_ID", "SLURM_JOB_END_TIME", "SLURM_ARRAY_JOB_ID", "SUBMITIT_EXECUTOR"):
        monkeypatch.delenv(name, raising=False)
    assert job_interrupt(5.0).wish() == 0
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_JOB_END_TIME", "1000")
    with caplog.at_level(logging.INFO, "tide_mega"):
        assert job_interrupt(5.0).wish() == 1
    assert "job 17 ends at 1970-01-01T" in caplog.text
    assert "this start makes one or two steps; lower cluster.stop_before_minutes" in caplog.text
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    assert job_interrupt(5.0).wish() == 0, "submitit answers its time limit itself"


def reasons(asked_rank, asked_step, steps):
    """What each step's question is answered, when one rank gets a signal before one step's question."""
    interrupt = Interrupt(catches=False)
    agreement = Agreement(interrupt)
    answers = []
    for step in range(steps):
        if dist.get_rank() == asked_rank and step == asked_step:
            interrupt._note(signal.SIGTERM, None)
        answers.append(agreement.reason())
    agreement.close()
    return answers


@pytest.mark.parametrize("rank", [0, 1])
def test_any_ranks_signal_stops_all_ranks_at_the_same_step(pools, rank):
    here, there = pools(2).run(reasons, rank, 2, 5)
    assert here == there == [None, None, None, "SIGTERM came", "SIGTERM came"]


def stopped_at(config, step, rank):
    """Train; a signal comes to one rank in a step. How the run ended."""
    interrupt = Interrupt(catches=False)
    trainer = Trainer(config, World.from_environment(), interrupt)
    step_engine = trainer.engine.step

    def signalled(lr):
        if trainer.state.step == step - 1 and dist.get_rank() == rank:
            interrupt._note(signal.SIGUSR1, None)
        return step_engine(lr)

    trainer.engine.step = signalled
    try:
        trainer.run()
    except RunStoppedError as stopped:
        return str(stopped)
    finally:
        trainer.close()
    return trainer.state.step


@pytest.mark.parametrize("zero_stage", quick_and_slow([1], [1, 3]))
def test_a_run_stopped_where_an_evaluation_is_due_continues_as_if_it_had_not_been(
    pools, tiny_data, tmp_path, zero_stage
):
    overrides = ("checkpoint.every=0", "checkpoint.at_end=false", f"parallel.zero_stage={zero_stage}")
    whole = tiny(tiny_data, tmp_path / "whole", *overrides, world_size=2)
    assert pools(2).run(train_here, whole) == [6, 6]
    broken = tiny(tiny_data, tmp_path / "broken", *overrides, world_size=2)
    said = pools(2).run(stopped_at, broken, 2, 1)
    assert said == ["SIGUSR1 came: stopped after step 3; the same command continues the run"] * 2
    assert not (tmp_path / "broken" / "tiny" / "finished.json").exists()
    assert {r["step"] for r in curve(tmp_path / "broken" / "tiny" / "metrics.jsonl")} == {2}, "a kill is near"
    assert pools(2).run(train_here, broken) == [6, 6]
    curves = []
    for name in ("whole", "broken"):
        curves.append(curve(tmp_path / name / "tiny" / "metrics.jsonl"))
        for record in curves[-1]:
            record.pop("traffic", None)  # counted anew from the start
    assert curves[0] == curves[1]
    assert (tmp_path / "broken" / "tiny" / "finished.json").exists()


def test_an_evaluation_left_to_a_start_that_is_killed_is_logged_once(pools, tiny_data, tmp_path):
    config = tiny(tiny_data, tmp_path, "checkpoint.every=0", "checkpoint.at_end=false")
    (said,) = pools(1).run(stopped_at, config, 3, 0)
    assert "stopped after step 3" in said
    assert pools(1).run(train_until, config, 5) == [5]
    evaluated = [r["step"] for r in curve(tmp_path / "tiny" / "metrics.jsonl") if r["kind"] == "eval"]
    assert evaluated == [3], "by the start that got no further"
    assert pools(1).run(train_here, config) == [6]
    records = curve(tmp_path / "tiny" / "metrics.jsonl")
    assert [r["step"] for r in records if r["kind"] == "eval"] == [3, 6]
    assert [r["step"] for r in records if r["kind"] == "weights"] == [3, 6]


def test_a_signal_in_the_last_step_lets_the_run_end_as_planned(pools, tiny_data, tmp_path):
    assert pools(1).run(stopped_at, tiny(tiny_data, tmp_path), 6, 0) == [6]
