"""Random runs, exported once for all tests that load them by transformers."""

import pytest

from tests.support.exports import UNTIED, WITHOUT_MEMORY, RandomRun, random_run


@pytest.fixture(scope="session")
def runs(tiny_data, tmp_path_factory) -> dict[str, RandomRun]:
    root = tmp_path_factory.mktemp("random_runs")
    overrides = {"tied": (), "untied": UNTIED, "plain": WITHOUT_MEMORY}
    numbered = enumerate(overrides.items())
    return {name: random_run(tiny_data, root, *words, name=name, seed=i) for i, (name, words) in numbered}


@pytest.fixture(scope="session")
def exported(runs, tmp_path_factory):
    """Return the folder of a run's export in a format; made once."""
    root = tmp_path_factory.mktemp("exported")
    made = {}

    def of(name: str, **options: str):
        key = (name, *sorted(options.items()))
        if key not in made:
            made[key] = runs[name].export(root / str(len(made)), **options)
        return made[key]

    return of
