"""What runs have in common, said once."""

from collections.abc import Mapping


def by_run(said: Mapping[str, str]) -> str:
    """Return what is said of every run, by label: once where it is the same, else run by run."""
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return ", ".join(f"{label} {each}" for label, each in said.items())
