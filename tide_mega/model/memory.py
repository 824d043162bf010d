"""EmbeddingMemory: the K tables and their norms, and the board from which all layers read them.

Shapes: U distinct token types of the step, K memory blocks, D width, W rows of the tables owned here.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from tide_mega.memory.exchange import gather_rows


class EmbeddingMemory(nn.Module):
    """K MemoryBlocks, M_k(v) = RMSNorm(E_k[v]) (paper 3.3).

    With a `group` the tables are a parameter, sharded by rows over that tensor-parallel group. Without one
    their rows come from outside (`tide_mega.memory.owned`) and only the norms' gains live here.
    """

    def __init__(
        self, num_blocks: int, vocab_size: int, width: int, norm_eps: float, group: ProcessGroup | None
    ) -> None:
        super().__init__()
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
        unit_UKD = F.rms_norm(rows_UKD, rows_UKD.shape[-1:], eps=self.norm_eps)
        return unit_UKD * self.gains_KD


@dataclass
class MemoryBoard:
    """What the layers of a stage read during a step: a plain object, so that no layer owns the tables.

    `rows_UKD` is an fp32 leaf: every layer's backward adds to its gradient, which goes home once, after the last
    microbatch. It stays the same for all microbatches, so recompute finds it as it was; the index of a
    microbatch is not here but travels through the block with the hidden state.
    """

    rows_UKD: Tensor | None = None
    null_weights_L: dict[int, list[Tensor]] | None = None
    """When a dictionary, each layer adds its null-bank weights [S, B] of each microbatch, by index from 0."""

    def record_null_weights(self, layer: int, null_SB: Tensor) -> None:
        """Keep a layer's null-bank weights, if someone asked for them."""
        if self.null_weights_L is not None:
            self.null_weights_L.setdefault(layer, []).append(null_SB)
