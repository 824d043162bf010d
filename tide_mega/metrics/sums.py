"""Exact sums and counts across micro batches and ranks."""

from collections.abc import Callable

import torch
from torch import Tensor

AllReduce = Callable[[Tensor], object]
"""Sums a tensor in place over the data-parallel ranks; whatever it returns is left alone."""


class SumAndCount:
    """A float64 sum and an int64 count on one device, added to without waiting for it."""

    def __init__(
        self, sum_shape: tuple[int, ...], count_shape: tuple[int, ...], device: torch.device
    ) -> None:
        self.sum = torch.zeros(sum_shape, dtype=torch.float64, device=device)
        self.count = torch.zeros(count_shape, dtype=torch.int64, device=device)

    def reset(self) -> None:
        """Start from zero."""
        self.sum.zero_()
        self.count.zero_()

    def reduced(self, all_reduce: AllReduce) -> tuple[Tensor, Tensor]:
        """Sum and count over all ranks, on the CPU; what is held here stays as it was."""
        total, count = self.sum.clone(), self.count.clone()
        all_reduce(total)
        all_reduce(count)
        return total.cpu(), count.cpu()
