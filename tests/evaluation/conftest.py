"""The tiny run, the reference with its weights, and a scorer over it in this process alone."""

import pytest

from tests.evaluation.oracle import Oracle
from tests.evaluation.tiny import text_scorer
from tide_mega.trained.run import TrainedRun


@pytest.fixture(scope="module")
def run(tiny_runs):
    return TrainedRun.open(tiny_runs[2])


@pytest.fixture(scope="module")
def oracle(run):
    return Oracle(run)


@pytest.fixture(scope="module")
def scorer(run, alone):
    return text_scorer(run, alone)
