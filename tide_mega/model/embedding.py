"""The input embedding: megatron-core's weight, our lookup.

Shapes: B sequences, T tokens, S tokens of the sequence on this rank, D hidden size.
"""

from megatron.core.tensor_parallel import (
    VocabParallelEmbedding,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor, nn

from tide_mega.kernels.row_lookup import look_up


class InputEmbedding(nn.Module):
    """Takes the place of megatron-core's VocabParallelEmbedding in its LanguageModelEmbedding.

    Megatron's adds up the gradient of a row in the weight's precision on a CPU, where a frequent token of a bf16
    run loses most of its own, and in any order on a GPU.
    """

    def __init__(self, megatron: VocabParallelEmbedding) -> None:
        """Take over the weight, a parameter with all of megatron's marks, and the shard's place."""
        super().__init__()
        self.weight: nn.Parameter = megatron.weight
        self._first, self._group = megatron.vocab_start_index, megatron.tp_group
        self._scatters: bool = megatron.reduce_scatter_embeddings

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return the tokens' rows [B, T, D], or with sequence parallelism those of this rank's slice [S, B, D]."""
        if self._group.size() == 1:
            return look_up(self.weight, tokens_BT)
        # Tokens of other shards read some row of this one, spread as they are, and neither see nor change it.
        entries = self.weight.size(0)
        is_absent_BT = (tokens_BT < self._first) | (tokens_BT >= self._first + entries)
        rows_BTD = look_up(self.weight, (tokens_BT - self._first) % entries)
        rows_BTD = rows_BTD.masked_fill(is_absent_BT[..., None], 0.0)
        if self._scatters:
            return reduce_scatter_to_sequence_parallel_region(
                rows_BTD.transpose(0, 1).contiguous(), group=self._group
            )
        return reduce_from_tensor_model_parallel_region(rows_BTD, group=self._group)
