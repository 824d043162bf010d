"""Fixtures shared by the whole suite."""

from collections.abc import Callable, Iterator

import pytest

from tests.support.pool import WorkerPool


@pytest.fixture(scope="session")
def pools() -> Iterator[Callable[[int], WorkerPool]]:
    """Return the warm pool of a size, started at its first use."""
    started: dict[int, WorkerPool] = {}

    def of_size(size: int) -> WorkerPool:
        return started.setdefault(size, WorkerPool(size))

    yield of_size
    for pool in started.values():
        pool.close()
