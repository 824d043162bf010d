"""The ranges of reduced gradients that DeepSpeed's ZeRO keeps on one data-parallel rank, by parameter."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class GradientRange:
    """A rank's share of a parameter's gradient; the ranges of all ranks are disjoint and cover it."""

    parameter: nn.Parameter
    start: int
    """Index of the first element in the flattened parameter."""
    values: torch.Tensor
    """1-D, in the gradient's dtype: a view of the optimizer's own memory."""


def gradient_ranges(
    optimizer: Any, parameters: Iterable[nn.Parameter], zero_stage: int, data_rank: int
) -> Iterator[GradientRange]:
    """Yield this rank's ranges of the reduced gradients of `parameters`; call between reduction and step.

    Padding, and parameters of which this rank keeps nothing, are left out.
    """
    wanted = {id(parameter) for parameter in parameters}
    groups = optimizer.fp16_groups if zero_stage == 3 else optimizer.params_in_partition
    for index, group in enumerate(groups):
        gradients = [g for g in optimizer.averaged_gradients[index] if not getattr(g, "_zero_padding", False)]
        for parameter, gradient in zip(group, gradients, strict=False):  # one more if the last is padding
            if id(parameter) not in wanted:
                continue
            values = gradient.detach().reshape(-1)
            if zero_stage == 3:
                start = values.numel() * data_rank
                # The last ranks' parts are padded with elements that are not the parameter's.
                values = values[: max(parameter.ds_numel - start, 0)]
            else:
                start = parameter._hp_mapping.lp_fragment_address.start
            if values.numel():
                yield GradientRange(parameter, start, values)
