"""Random runs with a prepared dataset, exported by the tests that need no transformers."""

import pytest

from tests.support.exports import RandomRun, random_run


@pytest.fixture(scope="session")
def with_memory(tiny_data, tmp_path_factory) -> RandomRun:
    return random_run(tiny_data, tmp_path_factory.mktemp("random"), step=7)
