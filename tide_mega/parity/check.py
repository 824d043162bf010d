"""Running many cases, one pool size at a time; a case that fails or hangs does not stop the next."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from tide_mega.parity.case import Case
from tide_mega.parity.deviation import Deviation, bounds_of, over_ranks
from tide_mega.parity.pool import WorkerError, WorkerPool

Compare = Callable[[Case], Deviation]


@dataclass(frozen=True)
class Outcome:
    """What came of one case."""

    case: Case
    seconds: float
    """Wall time, without the start of the processes."""
    deviation: Deviation | None
    """None where the case raised, died or hung."""
    failures: list[str]
    """What is over its bound, or why there is no deviation; empty when the case agrees."""


def compare(case: Case) -> Deviation:
    """Compare with the reference; imports the whole stack, which only the workers need."""
    from tide_mega.parity.run import compare as compare_with_reference

    return compare_with_reference(case)


def check_all(
    cases: Iterable[Case], compare: Compare, make_pool: Callable[[int], WorkerPool] = WorkerPool
) -> Iterator[Outcome]:
    """Run `compare` in the processes of each case, fewest first, and judge the result by the case's bounds.

    Args:
        cases: any order.
        compare: a module-level function, called in the workers.
        make_pool: from a number of processes to the pool that runs its cases; closed before the next starts.
    """
    for world, group in groupby(sorted(cases, key=lambda case: case.world), key=lambda case: case.world):
        with make_pool(world) as pool:
            for case in group:
                yield _check(case, compare, pool)


def _check(case: Case, compare: Compare, pool: WorkerPool) -> Outcome:
    start = time.monotonic()
    try:
        pool.start()
        start = time.monotonic()
        deviation = over_ranks(pool.run(compare, case))
    except WorkerError as error:
        return Outcome(case, time.monotonic() - start, None, [str(error)])
    return Outcome(case, time.monotonic() - start, deviation, deviation.excesses(bounds_of(case)))
