"""TIDE on megatron-core: a GPTModel whose layers receive each micro-batch's token order, and its loss or scores.

Dimensions: B sequences, T tokens, D hidden size, V vocabulary, N tokens of the micro-batch.
"""

from dataclasses import dataclass
from typing import Any

from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from tide_mega.config.schema import TideConfig
from tide_mega.kernels.token_order import TokenOrder
from tide_mega.kernels.vocab_loss import vocab_loss, vocab_scores
from tide_mega.memory.memory import Memory
from tide_mega.model.layer import order_to_model
from tide_mega.model.modules import InputEmbedding
from tide_mega.model.spec import block_spec
from tide_mega.parallel.groups import ParallelGroups

LossTensors = tuple[Tensor, Tensor, Tensor, Tensor]
ScoreTensors = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Targets:
    """What a micro-batch is trained on."""

    labels_BT: Tensor
    """Ids to predict; negative where there is nothing to predict."""
    z_loss: float
    """Weight of the mean log Z² in the loss."""


@dataclass(frozen=True)
class Scored:
    """What a micro-batch is scored on, without gradient."""

    labels_BT: Tensor
    """Ids to score; negative where there is nothing to score."""


class TideChunk(GPTModel):
    """TIDE, or with K = 0 the LLaMA baseline: one model chunk of a pipeline stage.

    It does not contain the memory itself: layers refer to the one that the stage's chunks share.
    """

    def __init__(
        self,
        config: TideConfig,
        megatron_config: TransformerConfig,
        memory: Memory,
        groups: ParallelGroups,
        virtual: int = 0,
    ) -> None:
        chunks = config.parallel.virtual_pipeline
        vp_stage = virtual if chunks > 1 else None
        super().__init__(
            config=megatron_config,
            transformer_layer_spec=block_spec(
                megatron_config,
                memory,
                vp_stage,
                rope_theta=config.model.rope_theta,
                compile_kernels=config.kernels.compile,
            ),
            vocab_size=config.model.vocab_size,
            max_sequence_length=config.data.seq_length,
            pre_process=groups.is_first_stage and virtual == 0,
            post_process=groups.is_last_stage and virtual == chunks - 1,
            share_embeddings_and_output_weights=config.model.tie_embeddings,
            position_embedding_type="none",  # CausalCoreAttention applies RoPE itself
            pg_collection=groups.collection,
            vp_stage=vp_stage,
        )
        if self.pre_process:
            self.embedding.word_embeddings = InputEmbedding(self.embedding.word_embeddings)
        self.groups, self.memory, self.kernels = groups, memory, config.kernels
        if config.model.tie_embeddings and self.output_weight is not None:
            # A copy of the first stage's embedding; this attribute makes DeepSpeed leave it out of the norm.
            self.output_weight.ds_pipe_replicated = True  # type: ignore[attr-defined]

    @property
    def output_weight(self) -> nn.Parameter | None:
        """The output layer's own matrix; a copy if it is tied to the embedding of another stage."""
        if not self.post_process or (self.share_embeddings_and_output_weights and self.pre_process):
            return None
        return self.output_layer.weight

    def forward(
        self,
        tokens_BT: Tensor | None = None,
        targets: Targets | Scored | None = None,
        index_BT: Tensor | None = None,
    ) -> Tensor | LossTensors | ScoreTensors:
        """Run one micro-batch.

        Args:
            tokens_BT: token ids.
            targets: what to predict or to score; if None, the logits are returned.
            index_BT: row of each token among those read; required if K > 0.

        Returns:
            On chunks other than the last, the hidden state [T or its slice, B, D]. On the last chunk:
            with `Targets`, the mean loss over labelled tokens and, without gradient, the cross entropy [B, T] (0
            where unlabelled), the sum of log Z² and the number of labelled tokens; with `Scored`, the cross
            entropy [B, T] and whether each label is the model's first choice [B, T]; without targets, the logits
            of this rank's part of the vocabulary [B, T, V / tensor size].
        """
        packed = None if index_BT is None else self._order_of_this_rank(index_BT).pack()
        return super().forward(tokens_BT, None, None, labels=targets, **order_to_model(packed))

    def _postprocess(
        self, hidden_states: Tensor, *args: Any, labels: Targets | Scored | None, **kwargs: Any
    ) -> Any:
        """Override megatron's step from the last layer's output to the loss, if there are targets.

        A private method, called with these keywords by megatron-core 0.16 to 0.19. Since 0.18 the public
        `output_processor` argument of `forward` does the same; 0.16, the last for Python 3.11, lacks it.
        """
        if labels is None or not self.post_process:
            return super()._postprocess(hidden_states, *args, labels=None, **kwargs)
        return self._loss(hidden_states, labels)

    def _loss(self, hidden_TBD: Tensor, targets: Targets | Scored) -> LossTensors | ScoreTensors:
        group = self.groups.tensor
        if self.config.sequence_parallel:
            hidden_TBD = tensor_parallel.gather_from_sequence_parallel_region(hidden_TBD, group=group)
        else:
            hidden_TBD = tensor_parallel.copy_to_tensor_model_parallel_region(hidden_TBD, group=group)
        tied = self.share_embeddings_and_output_weights
        weight_WD = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        hidden_ND, labels_N = hidden_TBD.flatten(0, 1), targets.labels_BT.transpose(0, 1).flatten()
        chunk_tokens = self.kernels.loss_tokens

        def by_sequence(values_N: Tensor) -> Tensor:
            return values_N.view(hidden_TBD.shape[:2]).transpose(0, 1)

        if isinstance(targets, Scored):
            scores = vocab_scores(hidden_ND, weight_WD, labels_N, group, chunk_tokens=chunk_tokens)
            return by_sequence(scores[0]), by_sequence(scores[1])
        loss, cross_entropy_N, z_square, count = vocab_loss(
            hidden_ND,
            weight_WD,
            labels_N,
            targets.z_loss,
            group,
            chunk_tokens=chunk_tokens,
            compile_kernels=self.kernels.compile,
        )
        return loss, by_sequence(cross_entropy_N), z_square, count

    def _order_of_this_rank(self, index_BT: Tensor) -> TokenOrder:
        index_TB = index_BT.transpose(0, 1)
        if self.config.sequence_parallel:
            index_TB = index_TB.chunk(self.groups.tensor_size, dim=0)[self.groups.tensor_rank]
        if self.memory.rows_UKD is None:
            raise RuntimeError("the memory was not read for this step: Memory.read goes around the schedule")
        return TokenOrder.sort(index_TB.flatten(), self.memory.rows_UKD.size(0))
