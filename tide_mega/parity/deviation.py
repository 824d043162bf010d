"""How far a run is from the reference, and how far it may be."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from tide_mega.parity.case import Case

TABLES = "memory.tables"


@dataclass(frozen=True)
class Bounds:
    """What is allowed; the names are those of `Deviation`."""

    loss: float
    norm: float
    tensors: float


FP32 = Bounds(1e-5, 1e-5, 1e-5)
BF16 = Bounds(1e-2, 3e-2, 1.5)
"""Tensors in units of the error that the plain reference makes when it computes in bf16."""


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
    """Of each tensor: largest difference over largest magnitude, or what `compare_updates` says."""

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
        """Name what is over its bound, with figures; NaN is over any."""
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
    """Join the deviations of all processes: the largest of each tensor's shards and copies."""
    tensors: dict[str, float] = {}
    for deviation in deviations:
        for name, value in deviation.tensors.items():
            tensors[name] = largest([value, tensors.get(name, 0.0)])
    return Deviation(largest(d.loss for d in deviations), largest(d.norm for d in deviations), tensors)


def largest(values: Iterable[float]) -> float:
    """Return the largest; `max` would lose a NaN, here it is infinite."""
    return max((math.inf if math.isnan(value) else value for value in values), default=0.0)
