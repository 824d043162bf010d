"""One worker for all dry runs, and each topology trained once."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.fake_cuda.cases import TOPOLOGIES
from tests.fake_cuda.training import Report, train
from tide_mega.dryrun.worker import DryWorker


@pytest.fixture(scope="package")
def dry_worker() -> Iterator[DryWorker]:
    """Return a worker that has the stack imported on a faked card."""
    with DryWorker() as worker:
        yield worker


@pytest.fixture(scope="package")
def trained(
    dry_worker: DryWorker, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Report]:
    """Return what a topology's training did, by its name."""
    reports: dict[str, Report] = {}
    root = tmp_path_factory.mktemp("dry")

    def of(name: str) -> Report:
        if name not in reports:
            topology = TOPOLOGIES[name]
            config = topology.configuration(tiny_data, root)
            reports[name] = dry_worker.run(train, config, topology.world, topology.rank, root)
        return reports[name]

    return of
