"""EmbeddingMemory: the K tables and their norms, read once a step and shared by all layers.

Shapes: U distinct token types of the step, K memory blocks, D width, W rows of the tables owned here.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from tide_mega.memory.exchange import gather_rows
from tide_mega.parallel.groups import sum_over


class EmbeddingMemory(nn.Module):
    """K MemoryBlocks, M_k(v) = RMSNorm(E_k[v]) (paper 3.3), sharded by rows over the memory group."""

    def __init__(
        self, num_blocks: int, vocab_size: int, width: int, norm_eps: float, group: ProcessGroup
    ) -> None:
        super().__init__()
        self.group = group
        self.norm_eps = norm_eps
        rows = vocab_size // group.size()
        self.tables_WKD = nn.Parameter(torch.empty(rows, num_blocks, width))
        # DeepSpeed counts a parameter on every rank of the model-parallel group, instead of once, by this.
        self.tables_WKD.tensor_model_parallel = group.size() > 1  # type: ignore[attr-defined]
        self.gains_KD = nn.Parameter(torch.ones(num_blocks, width))

    def forward(self, ids_U: Tensor) -> Tensor:
        """Return the normalised rows M [U, K, D] of distinct token ids, in the tables' dtype."""
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


class MemoryStep:
    """One reading of the memory: from the tables to the board, and the gradients back."""

    def __init__(self, memory_UKD: Tensor, board: MemoryBoard) -> None:
        self.memory_UKD = memory_UKD
        self.board = board
        board.rows_UKD = memory_UKD.detach().float().requires_grad_(memory_UKD.requires_grad)

    def send_gradients(self, tensor_group: ProcessGroup, *, partial: bool) -> None:
        """Carry the gradient the layers left on the board back to the norms and the tables.

        Args:
            tensor_group: ranks that share the tokens of this step.
            partial: under sequence parallelism each rank saw only its slice of the tokens.
        """
        leaf_UKD = self.board.rows_UKD
        if leaf_UKD is None or leaf_UKD.grad is None:
            raise RuntimeError("no layer has read the memory: send_gradients belongs after the backward pass")
        if partial:
            sum_over(tensor_group, leaf_UKD.grad)
        self.memory_UKD.backward(leaf_UKD.grad.to(self.memory_UKD.dtype))
        self.close()

    def close(self) -> None:
        """Free the rows."""
        self.board.rows_UKD = None
