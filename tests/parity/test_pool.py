import os
import threading

import pytest
import torch
import torch.distributed as dist

from tide_mega.lab.parity.pool import WorkerError, WorkerPool, _by_text, default_timeout


def rank_and_threads(add):
    total = torch.tensor([dist.get_rank() + add])
    dist.all_reduce(total)
    return dist.get_rank(), int(total), os.environ["OMP_NUM_THREADS"], torch.get_num_threads()


def fail_on_last_rank():
    if dist.get_rank() == dist.get_world_size() - 1:
        raise ValueError("the last rank has had enough")
    threading.Event().wait()


def die_on_first_rank():
    if dist.get_rank() == 0:
        os._exit(3)
    threading.Event().wait()


def hang_on_first_rank():
    if dist.get_rank() == 0:
        threading.Event().wait()
    return dist.get_rank()


def test_results_come_back_by_rank(pools):
    assert pools(2).run(rank_and_threads, 10) == [(0, 21, "1", 1), (1, 21, "1", 1)]


def test_a_failure_of_all_is_told_once():
    assert _by_text({1: "late\n", 0: "late", 2: "died"}) == "ranks 0, 1: late\nrank 2: died"


def test_more_processes_may_take_longer():
    assert default_timeout(8) > default_timeout(1) >= 60


def test_workers_that_rest_are_stopped_between_calls_and_end_with_the_pool():
    with WorkerPool(2, rests=True) as pool:
        for add in (0, 5):
            assert pool.run(rank_and_threads, add)[0][1] == 1 + 2 * add
            for worker in pool._workers:
                os.waitid(os.P_PID, worker.pid, os.WSTOPPED | os.WNOWAIT)
        workers = pool._workers
    assert [worker.exitcode for worker in workers] == [0, 0]


@pytest.mark.slow
def test_a_pool_names_what_failed_and_starts_afresh(monkeypatch):
    monkeypatch.setattr("tide_mega.lab.parity.pool.LAST_WORDS_SECONDS", 0.2)
    with WorkerPool(2) as pool:
        with pytest.raises(
            WorkerError, match=r"(?s)rank 0: no answer after another's failure\nrank 1: .*had enough"
        ):
            pool.run(fail_on_last_rank)
        assert pool.run(rank_and_threads, 0)[1][1] == 1
        with pytest.raises(WorkerError, match=r"rank 0: the process died\nrank 1: "):
            pool.run(die_on_first_rank)
        pool.start()
        pool.timeout = 1
        with pytest.raises(WorkerError, match=r"^rank 0: no answer in 1 s$"):
            pool.run(hang_on_first_rank)
        pool.timeout = default_timeout(2)
        assert pool.run(rank_and_threads, 0)[0][1] == 1
        workers = list(pool._workers)
    assert not any(worker.is_alive() for worker in workers)


@pytest.mark.slow
def test_a_pool_that_cannot_start_in_time_says_so():
    with (
        WorkerPool(2, timeout=0.01) as pool,
        pytest.raises(WorkerError, match=r"no answer of its start in 0\.01 s"),
    ):
        pool.run(rank_and_threads, 0)
