"""Runs many parity cases, and judges how far each deviates from the reference.

Cases run one pool size at a time; one that fails or hangs does not stop the next.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby

from tide_mega.lab.parity.case import Case
from tide_mega.lab.parity.pool import WorkerError, WorkerPool

TABLES = "memory.tables"


@dataclass(frozen=True)
class Bounds:
    """Allowed deviations, named as in `Deviation`."""

    loss: float
    norm: float
    tensors: float


FP32 = Bounds(1e-5, 1e-5, 1e-5)
BF16 = Bounds(1e-2, 3e-2, 1.5)
"""Tensors relative to the error of the plain reference computing in bf16."""


def bounds_of(case: Case) -> Bounds:
    """Return the bounds for the case's precision."""
    return BF16 if case.precision == "bf16" else FP32


@dataclass(frozen=True)
class Deviation:
    """Largest relative differences from the reference; infinite where a number is not finite."""

    loss: float
    """Over the steps."""
    norm: float
    """Of the global gradient norm, over the steps."""
    tensors: dict[str, float]
    """By tensor: largest difference over largest magnitude, or as defined by `compare_updates`."""

    def worst(self) -> float:
        """Return the largest of all."""
        return largest([self.loss, self.norm, *self.tensors.values()])

    def worst_parameter(self) -> tuple[str, float]:
        """Return name and deviation of the worst tensor apart from the tables."""
        return self._worst_of({name: value for name, value in self.tensors.items() if name != TABLES})

    def worst_tensor(self) -> tuple[str, float]:
        """Return name and deviation of the worst tensor."""
        return self._worst_of(self.tensors)

    def tables(self) -> float | None:
        """Return the deviation of the tables' rows; None at K = 0."""
        return self.tensors.get(TABLES)

    def excesses(self, bounds: Bounds) -> list[str]:
        """Name what exceeds its bound, with numbers; NaN exceeds any."""
        found = {"loss": (self.loss, bounds.loss), "norm": (self.norm, bounds.norm)}
        found |= {name: (value, bounds.tensors) for name, value in self.tensors.items()}
        return [
            f"{name} {value:.1e} > {bound:g}" for name, (value, bound) in found.items() if not value <= bound
        ]

    @staticmethod
    def _worst_of(tensors: dict[str, float]) -> tuple[str, float]:
        name = max(tensors, key=lambda key: largest([tensors[key]]))
        return name, tensors[name]


def over_ranks(deviations: list[Deviation]) -> Deviation:
    """Merge the deviations of all processes: the largest over each tensor's shards and copies."""
    tensors: dict[str, float] = {}
    for deviation in deviations:
        for name, value in deviation.tensors.items():
            tensors[name] = largest([value, tensors.get(name, 0.0)])
    return Deviation(largest(d.loss for d in deviations), largest(d.norm for d in deviations), tensors)


def largest(values: Iterable[float]) -> float:
    """Return the largest value; a NaN counts as infinite, where `max` might drop it."""
    return max((math.inf if math.isnan(value) else value for value in values), default=0.0)


Compare = Callable[[Case], Deviation]


@dataclass(frozen=True)
class Outcome:
    """The result of one case."""

    case: Case
    seconds: float
    """Wall time, excluding the start of the processes."""
    deviation: Deviation | None
    """None where the case raised, died or hung."""
    failures: list[str]
    """What exceeds its bound, or why there is no deviation; empty if the case agrees."""


def compare(case: Case) -> Deviation:
    """Compare with the reference; imports the whole stack, so only workers call it."""
    from tide_mega.lab.parity.run import compare as compare_with_reference

    return compare_with_reference(case)


def check_all(
    cases: Iterable[Case], compare: Compare, make_pool: Callable[[int], WorkerPool] = WorkerPool
) -> Iterator[Outcome]:
    """Run `compare` in the processes of each case, fewest first, and judge the result by the case's bounds.

    Args:
        cases: any order.
        compare: a module-level function, called in the workers.
        make_pool: makes the pool for a number of processes; closed before the next one starts.
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
