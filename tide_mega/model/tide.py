"""TIDE on megatron-core: GPTModel with the index of each microbatch and z-loss.

Shapes: B sequences, T tokens, D hidden size, V vocabulary.
"""

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from tide_mega.config.schema import TideConfig
from tide_mega.kernels.token_order import TokenOrder
from tide_mega.model.memory import MemoryBoard
from tide_mega.model.spec import block_spec
from tide_mega.model.targets import pick_targets
from tide_mega.parallel.groups import ParallelGroups


class TideChunk(GPTModel):
    """TIDE, or with K = 0 the LLaMA baseline: the layers of one chunk of a pipeline stage.

    The memory itself is not here: layers read it from the board that the stage's chunks share.
    """

    def __init__(
        self,
        config: TideConfig,
        megatron_config: TransformerConfig,
        board: MemoryBoard,
        groups: ParallelGroups,
        virtual: int = 0,
    ) -> None:
        chunks = config.parallel.virtual_pipeline
        vp_stage = virtual if chunks > 1 else None
        super().__init__(
            config=megatron_config,
            transformer_layer_spec=block_spec(megatron_config, config.memory.num_blocks, board, vp_stage),
            vocab_size=config.model.vocab_size,
            max_sequence_length=config.data.seq_length,
            pre_process=groups.is_first_stage and virtual == 0,
            post_process=groups.is_last_stage and virtual == chunks - 1,
            share_embeddings_and_output_weights=config.model.tie_embeddings,
            position_embedding_type="rope",
            rotary_base=config.model.rope_theta,
            pg_collection=groups.collection,
            vp_stage=vp_stage,
        )
        self.groups, self.board = groups, board
        if config.model.tie_embeddings and self.output_weight is not None:
            # A copy of the first stage's embedding: DeepSpeed leaves it out of the gradient norm by this.
            self.output_weight.ds_pipe_replicated = True  # type: ignore[attr-defined]

    @property
    def output_weight(self) -> nn.Parameter | None:
        """The output layer's own matrix: a copy where it is tied to the embedding of another stage."""
        if not self.post_process or (self.share_embeddings_and_output_weights and self.pre_process):
            return None
        return self.output_layer.weight

    def forward(
        self,
        tokens_BT: Tensor | None = None,
        labels_BT: Tensor | None = None,
        index_BT: Tensor | None = None,
    ) -> Tensor:
        """Run one microbatch.

        Args:
            tokens_BT: token ids.
            labels_BT: ids to predict, negative where there is nothing to predict; without labels the logits
                of this rank's part of the vocabulary [B, T, V / tensor size] are returned.
            index_BT: row of each token on the board; needed when K > 0.

        Returns:
            On the last chunk [2, B, T] in fp32: cross entropy and log-partition of each token; on others the
            hidden state [T or its slice, B, D].
        """
        context = None if index_BT is None else self._order_of_this_rank(index_BT).pack()
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

    def _order_of_this_rank(self, index_BT: Tensor) -> TokenOrder:
        index_TB = index_BT.transpose(0, 1)
        if self.config.sequence_parallel:
            index_TB = index_TB.chunk(self.groups.tensor_size, dim=0)[self.groups.tensor_rank]
        if self.board.rows_UKD is None:
            raise RuntimeError(
                "the memory was not read for this step: a MemoryReading comes before the schedule"
            )
        return TokenOrder.sort(index_TB.flatten(), self.board.rows_UKD.size(0))
