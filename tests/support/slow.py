"""Long lists of cases of which a few are quick enough, and telling enough, for every change."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick_and_slow(quick: Iterable[Any], cases: Collection[Any]) -> list[Any]:
    """Return all cases as parameters, marked slow but for the quick ones; cases of several values are tuples.

    Raises:
        ValueError: a quick one is not among the cases.
    """
    chosen = list(quick)
    if strangers := [case for case in chosen if case not in cases]:
        raise ValueError(f"{strangers} are not among the cases")
    marks = {True: (), False: pytest.mark.slow}
    return [
        pytest.param(*(case if type(case) is tuple else (case,)), marks=marks[case in chosen])
        for case in cases
    ]
