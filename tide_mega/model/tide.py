"""TIDE on megatron-core: GPTModel with the memory, the index of each microbatch, and z-loss.

Shapes: B sequences, T tokens, S tokens of a sequence on this rank, U distinct types, K blocks, D width,
L layers, V vocabulary.
"""

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from tide_mega.config.schema import TideConfig
from tide_mega.model.memory import EmbeddingMemory, MemoryBoard
from tide_mega.model.spec import block_spec, transformer_config
from tide_mega.model.targets import pick_targets
from tide_mega.parallel.groups import ParallelGroups


class TideModel(GPTModel):
    """TIDE, or with K = 0 the LLaMA baseline, on one pipeline stage of a tensor-parallel group.

    A step reads the memory once (`forward(read_ids=...)`, so that DeepSpeed's engine sees the call),
    puts the rows on `board`, runs its microbatches, and sends the gradients back: see
    `tide_mega.training.step`.
    """

    def __init__(self, config: TideConfig, groups: ParallelGroups, device: torch.device) -> None:
        megatron_config = transformer_config(config.model, config.parallel, config.trainer.precision, device)
        board = MemoryBoard()
        super().__init__(
            config=megatron_config,
            transformer_layer_spec=block_spec(megatron_config, config.memory.num_blocks, board),
            vocab_size=config.model.vocab_size,
            max_sequence_length=config.data.seq_length,
            share_embeddings_and_output_weights=config.model.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=config.model.rope_theta,
            pg_collection=groups.collection,
        )
        self.groups = groups
        self.board = board
        self.memory: EmbeddingMemory | None = None
        if config.memory.num_blocks:
            self.memory = EmbeddingMemory(
                config.memory.num_blocks,
                config.model.vocab_size,
                config.model.hidden_size,
                config.model.norm_eps,
                groups.memory,
            ).to(megatron_config.params_dtype)

    def forward(
        self,
        tokens_BT: Tensor | None = None,
        labels_BT: Tensor | None = None,
        index_BT: Tensor | None = None,
        *,
        read_ids: Tensor | None = None,
    ) -> Tensor:
        """Run one microbatch, or with `read_ids` [U] read the memory.

        Args:
            tokens_BT: token ids.
            labels_BT: ids to predict, negative where there is nothing to predict; without labels the logits
                of this rank's part of the vocabulary [B, T, V / tensor size] are returned.
            index_BT: row of each token on the board; needed when K > 0.
            read_ids: distinct ids, ascending.

        Returns:
            [2, B, T] in fp32: cross entropy and log-partition of each token; or M [U, K, D].
        """
        if read_ids is not None:
            if self.memory is None:
                raise RuntimeError("a model with memory.num_blocks = 0 has no memory to read")
            return self.memory(read_ids)
        context = None if index_BT is None else self._index_of_this_rank(index_BT)
        return super().forward(
            tokens_BT, None, None, labels=labels_BT, extra_block_kwargs={"context": context}
        )

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Return cross entropy and log-partition [2, B, T] from vocab-parallel logits [T, B, V / tensor size].

        log Z = cross entropy + logit of the target: the z-loss needs no second pass over the vocabulary.
        """
        labels_TB = labels.transpose(0, 1).contiguous()
        logits, targets_TB = pick_targets(logits, labels_TB, self.groups.tensor)
        cross_entropy_TB = tensor_parallel.vocab_parallel_cross_entropy(logits, labels_TB)
        return torch.stack((cross_entropy_TB, cross_entropy_TB + targets_TB)).transpose(1, 2)

    def null_weights(self) -> Tensor:
        """Return the null-bank weights the layers left on the board [L, B, T]: whole sequences.

        B counts the sequences of all microbatches since the board began to record.
        """
        recorded = self.board.null_weights_L or {}
        slice_LSB = torch.stack([torch.cat(recorded[layer], dim=1) for layer in sorted(recorded)])
        if self.config.sequence_parallel:
            whole_SLB = tensor_parallel.gather_from_sequence_parallel_region(
                slice_LSB.transpose(0, 1).contiguous(), group=self.groups.tensor
            )
            slice_LSB = whole_SLB.transpose(0, 1)
        return slice_LSB.transpose(1, 2)

    def _index_of_this_rank(self, index_BT: Tensor) -> Tensor:
        index_TB = index_BT.transpose(0, 1)
        if self.config.sequence_parallel:
            index_TB = index_TB.chunk(self.groups.tensor_size, dim=0)[self.groups.tensor_rank]
        return index_TB.contiguous()
