"""The optimizer state that DeepSpeed's ZeRO keeps on one data-parallel rank, by parameter: to save and to load.

ZeRO cuts the flattened parameters of a group into one range per rank. Nothing here communicates except
`publish`: each rank saves and loads its own range.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's moments, under torch's and apex's names."""


@dataclass(frozen=True)
class Kept:
    """A rank's share of a parameter: a range of its flattened elements, as 1-D views of the fp32 memory itself."""

    start: int
    """Index of the range's first element."""
    master: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor


class OptimizerState:
    """Master weights, moments and update count of a ZeRO 1, 2 or 3 optimizer around AdamW."""

    def __init__(self, optimizer: Any, module: nn.Module, zero_stage: int, data_rank: int) -> None:
        """Wrap DeepSpeed's optimizer of `module`; AdamW's state is created if it does not exist yet."""
        self._optimizer, self._module = optimizer, module
        self._is_sharded, self._data_rank = zero_stage == 3, data_rank
        self._make_moments()

    def kept(self, parameter: nn.Parameter) -> Kept | None:
        """Return what this rank keeps of a parameter, or None; after writing to it, call `publish`."""
        if self._is_sharded:
            parts = [self._optimizer.get_local_fp32_param(parameter, key) for key in (None, *MOMENTS)]
            start = parts[0].numel() * self._data_rank
            # The last ranks' parts are padded with elements that are not the parameter's.
            count = min(parameter.ds_numel - start, parts[0].numel())  # type: ignore[attr-defined]
            return Kept(start, *(part.detach().flatten()[:count] for part in parts)) if count > 0 else None
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return None
        # Not the mapping's own moments: DeepSpeed 0.19 links only those of the first parameter group.
        flat = self._optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
        state = self._optimizer.optimizer.state[flat]
        at = mapping.get_hp_fragment_address()
        whole = (flat.detach(), *(state[key] for key in MOMENTS))
        return Kept(
            mapping.lp_fragment_address.start, *(part.narrow(0, at.start, at.numel) for part in whole)
        )

    def publish(self) -> None:
        """Propagate master weights written through `kept` to the weights of all ranks; collective."""
        if not self._is_sharded:
            self._optimizer.update_lp_params()
            return
        whole = self._optimizer.persistent_parameters  # small ones stay gathered between passes
        if whole:
            whole[0].partition(whole)
        for parameter in self._module.parameters():
            master = self._optimizer.get_local_fp32_param(parameter)
            parameter.ds_tensor.data.copy_(master.view_as(parameter.ds_tensor))  # type: ignore[attr-defined]
        if whole:
            whole[0].all_gather(whole)

    @property
    def updates(self) -> int:
        """AdamW's update count, used for bias correction; skipped steps do not count.

        Raises:
            RuntimeError: parameter groups were updated different numbers of times.
        """
        inner = self._optimizer.optimizer
        counts = {int(inner.state[flat]["step"]) for flat in self._flat() if "step" in inner.state[flat]}
        counts |= {int(group["step"]) for group in inner.param_groups if "step" in group}  # apex
        if len(counts) > 1:
            raise RuntimeError(f"parameter groups were updated {sorted(counts)} times: they must agree")
        return counts.pop() if counts else 0

    @updates.setter
    def updates(self, count: int) -> None:
        inner = self._optimizer.optimizer
        for group in inner.param_groups:
            if "step" in group or not self._counts_by_tensor():
                group["step"] = count
        for flat in self._flat():
            if "step" in inner.state[flat]:
                inner.state[flat]["step"].fill_(count)

    def _counts_by_tensor(self) -> bool:
        return isinstance(self._optimizer.optimizer, torch.optim.AdamW)

    def _flat(self) -> list[torch.Tensor]:
        """Return the flat fp32 tensors that AdamW updates."""
        if self._is_sharded:
            return list(self._optimizer.fp32_partitioned_groups_flat)
        return list(self._optimizer.single_partition_of_fp32_groups)

    def _make_moments(self) -> None:
        state = self._optimizer.optimizer.state
        for flat in self._flat():
            if state[flat]:
                continue
            state[flat].update({key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS})
            if self._counts_by_tensor():
                state[flat]["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
