"""Fixtures shared by the whole suite."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.support.interpreter import Interpreter
from tests.support.package_log import package_log_kept
from tests.support.runs import tiny, train_here
from tide_mega.lab.bench.text import prepare_own_text
from tide_mega.lab.parity.pool import WorkerPool
from tide_mega.parallel.device import Device, choose_device
from tide_mega.parallel.groups import World, start_distributed, stop_distributed

# What a case takes says how busy the machine is, and nothing about the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def package_log() -> Iterator[None]:
    """Keep what a test does to the package's logger to that test; fixtures of wider scope keep their own."""
    with package_log_kept():
        yield


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], WorkerPool]]:
    """Return the warm pool of a size, started at its first use."""
    started: dict[int, WorkerPool] = {}

    def of_size(size: int) -> WorkerPool:
        for large in [other for other in started if other > 4 and other != size]:  # for their memory
            started.pop(large).close()
        return started.setdefault(size, WorkerPool(size, rests=True))

    yield of_size
    for pool in started.values():
        pool.close()


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Interpreter]:
    """Return what calls a function where triton's kernels are interpreted."""
    pytest.importorskip("triton", reason="triton is not installed")
    interpreter = Interpreter()
    yield interpreter
    interpreter.close()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a prepared dataset small enough for trainings of seconds."""
    return prepare_own_text(tmp_path_factory.mktemp("tiny"), 600)


@pytest.fixture(scope="session")
def tiny_runs(
    pools: Callable[[int], WorkerPool], tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, Path]:
    """Return run folders by K, 0 and 2: tiny trainings with checkpoints at steps 3 and 6."""
    root = tmp_path_factory.mktemp("tiny_runs")
    folders = {}
    for k, memory in ((0, "none"), (2, "k2")):
        words = [f"memory={memory}", "memory.owners=tensor", f"run.name=k{k}", "checkpoint.keep_every=3"]
        if k:
            words.append("memory.router_init_std=0.5")
        pools(1).run(train_here, tiny(tiny_data, root, *words))
        folders[k] = root / f"k{k}"
    return folders


@pytest.fixture(scope="module")
def alone() -> Iterator[Device]:
    """Join a group of this process alone, in this process; return its device."""
    device = choose_device("cpu", 0)
    start_distributed(device, World(0, 1, 0, 1), timeout_minutes=5)
    yield device
    stop_distributed()
