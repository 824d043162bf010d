"""How large the memory is that the trained routers inject, layer by layer.

Shapes: B sequences, T tokens, L layers, K blocks, J = K + 1, U distinct token types, D width.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tide_mega.diagnostics.analysis import SkippedError
from tide_mega.trained.model import TrainedModel

TOLERANCES = {"fp32": 1e-5, "bf16": 1e-2}
"""Relative, of rows and sums in a precision."""


@dataclass
class RoutedMemory:
    """Means over tokens, for each layer; filled by `add`."""

    tolerance: float = TOLERANCES["fp32"]
    tokens: int = 0
    memory_L: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """Sum of the norm of m_l."""
    part_L: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """Sum of the norm of m_l over that of h_l."""
    null_L: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    """Sum of the null bank's weight."""
    tightest: float = 0.0
    """The largest norm of m_l over (1 - null weight) C, of any token and layer (E.1 says at most 1)."""

    def add(self, alpha_LBTJ: Tensor, hidden_LBTD: Tensor, memory_BTKD: Tensor, largest_row: float) -> None:
        """Take some tokens: router weights, hidden states after each layer, normalised rows, and C.

        Raises:
            SkippedError: hidden states or what a layer injects are not finite.
        """
        layers = alpha_LBTJ.size(0)
        if not self.tokens:
            self.memory_L, self.part_L, self.null_L = (
                torch.zeros(layers, dtype=torch.float64) for _ in range(3)
            )
        self.tokens += alpha_LBTJ[0, ..., 0].numel()
        for i in range(layers):
            injected_BTD = torch.einsum("btk,btkd->btd", alpha_LBTJ[i, ..., :-1].float(), memory_BTKD)
            norm_BT = injected_BTD.norm(dim=-1).double()
            hidden_BT = hidden_LBTD[i].norm(dim=-1).double()
            # Comparisons below leave a NaN out.
            if not (norm_BT + hidden_BT).isfinite().all():
                raise SkippedError(
                    f"memory or hidden states of layer {i} are not finite: look at an earlier checkpoint"
                )
            null_BT = alpha_LBTJ[i, ..., -1].double()
            self.memory_L[i] += norm_BT.sum().cpu()
            self.part_L[i] += (norm_BT / hidden_BT).sum().cpu()
            self.null_L[i] += null_BT.sum().cpu()
            # From the weights of the blocks: 1 - null cancels where the null bank has nearly all.
            most_BT = alpha_LBTJ[i, ..., :-1].double().sum(-1) * largest_row
            used_BT = torch.where(most_BT > 0, norm_BT / most_BT, 0.0)
            self.tightest = max(self.tightest, float(used_BT.max()))

    @property
    def holds(self) -> bool:
        """Whether no token's memory is larger than (1 - null weight) C."""
        return self.tightest <= 1 + self.tolerance

    def null_logit(self, layer: int, num_blocks: int) -> float:
        """Return the s at which K / (K + e^s) is what the mean null weight leaves to the blocks (E.2)."""
        null = float(self.null_L[layer]) / self.tokens
        if not 0 < null < 1:
            return math.copysign(math.inf, null - 0.5)
        return math.log(num_blocks * null / (1 - null))


@torch.no_grad()
def measure(model: TrainedModel, sequences: Iterable[Tensor], largest_row: float) -> RoutedMemory:
    """Run sequences [T] one by one; `largest_row` is C."""
    found = RoutedMemory(TOLERANCES[model.config.trainer.precision])
    for tokens_T in sequences:
        tokens_BT = tokens_T[None].to(model.device.torch_device)
        inside = model.look_inside(tokens_BT)
        if inside.alpha_LBTJ is None:
            raise ValueError(f"{model.run.label} has no routers: it has no memory")
        ids_U, index_BT = torch.unique(tokens_BT, return_inverse=True)
        memory_UKD = normalised_rows(model, ids_U)
        found.add(inside.alpha_LBTJ, inside.hidden_LBTD, memory_UKD[index_BT], largest_row)
    return found


@torch.no_grad()
def normalised_rows(model: TrainedModel, ids_U: Tensor) -> Tensor:
    """Return M [U, K, D] of distinct, ascending ids, as the model's own layers get them; fp32."""
    memory_UKD: Tensor = model.stage(read_ids=ids_U)
    return memory_UKD.float()
