"""Fixtures shared by the whole suite."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tide_mega.bench.own_text import prepare_own_text
from tide_mega.parity.pool import WorkerPool


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], WorkerPool]]:
    """Return the warm pool of a size, started at its first use."""
    started: dict[int, WorkerPool] = {}

    def of_size(size: int) -> WorkerPool:
        # Idle gloo groups poll: a large pool would slow down everything that follows.
        for large in [other for other in started if other > 4 and other != size]:
            started.pop(large).close()
        return started.setdefault(size, WorkerPool(size))

    yield of_size
    for pool in started.values():
        pool.close()


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a prepared dataset small enough for trainings of seconds."""
    return prepare_own_text(tmp_path_factory.mktemp("tiny"), 600)
