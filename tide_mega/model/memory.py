"""EmbeddingMemory: the K tables and their norms, and the board from which all layers read them.

Shapes: U distinct token types of the step, K memory blocks, J = K + 1, D width, W rows of the tables owned here,
S tokens of the sequence on this rank, B sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from tide_mega.kernels.choice import KernelChoice
from tide_mega.kernels.row_gradient import RowGradient
from tide_mega.kernels.row_norm import row_norm
from tide_mega.memory.exchange import gather_rows


class EmbeddingMemory(nn.Module):
    """K MemoryBlocks, M_k(v) = RMSNorm(E_k[v]) (paper 3.3).

    With a `group` the tables are a parameter, sharded by rows over that tensor-parallel group. Without one
    their rows come from outside (`tide_mega.memory.owned`) and only the norms' gains live here.
    """

    def __init__(
        self,
        num_blocks: int,
        vocab_size: int,
        width: int,
        norm_eps: float,
        norm_version: str,
        group: ProcessGroup | None,
    ) -> None:
        super().__init__()
        self.norm_version = norm_version
        self.group = group
        self.norm_eps = norm_eps
        self.tables_WKD: nn.Parameter | None = None
        if group is not None:
            self.tables_WKD = nn.Parameter(torch.empty(vocab_size // group.size(), num_blocks, width))
            # DeepSpeed counts a parameter on every rank of the model-parallel group, not once, by this.
            self.tables_WKD.tensor_model_parallel = group.size() > 1  # type: ignore[attr-defined]
        self.gains_KD = nn.Parameter(torch.ones(num_blocks, width))

    def forward(self, ids_U: Tensor, rows_UKD: Tensor | None = None) -> Tensor:
        """Return the normalised rows M [U, K, D] of distinct ids, in the tables' dtype.

        Args:
            ids_U: ascending.
            rows_UKD: their rows, where the tables are owned outside.
        """
        if rows_UKD is None:
            if self.tables_WKD is None or self.group is None:
                raise RuntimeError("tables owned outside the model: give their rows")
            rows_UKD = gather_rows(self.tables_WKD, ids_U, self.group)
        return row_norm(self.norm_version, rows_UKD, self.gains_KD, self.norm_eps)


@dataclass
class MemoryBoard:
    """What the layers of a stage read during a step: a plain object, so that no layer owns the tables.

    `rows_UKD` stays the same for all microbatches, so recompute finds it as it was; every layer's backward
    leaves its part of their gradient with `sink`, and the sum goes home once, after the last microbatch. The order
    of a microbatch's tokens is not here but travels through the block with the hidden state.
    """

    kernels: KernelChoice
    rows_UKD: Tensor | None = None
    sink: RowGradient | None = None
    """None where no gradient is wanted."""
    alpha_L: dict[int, list[Tensor]] | None = None
    """When a dictionary, each layer adds its router's weights [S, B, J] of each microbatch, the null bank last, by
    index from 0."""
    silenced: frozenset[int] = frozenset()
    """Layers, from 0, that leave the memory out (paper, appendix H)."""
    rows_of: Callable[[Tensor], Tensor] | None = None
    """When given, what a forward pass reads instead of the memory: M [U, K, D] of distinct ids [U]."""

    def record_alpha(self, layer: int, alpha_SBJ: Tensor) -> None:
        """Keep a layer's router weights, if someone asked for them."""
        if self.alpha_L is not None:
            self.alpha_L.setdefault(layer, []).append(alpha_SBJ)
