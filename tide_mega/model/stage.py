"""What one process holds of the model: its chunks of the transformer, and on the first stage the memory.

Shapes: B sequences, T tokens, U distinct types, K blocks, D width, L layers.
"""

from collections.abc import Callable

import torch
from megatron.core import tensor_parallel
from torch import Tensor, nn

from tide_mega.config.schema import TideConfig
from tide_mega.kernels.choice import choose_kernels
from tide_mega.memory.meter import TrafficMeter
from tide_mega.memory.owned import OwnedTables
from tide_mega.model.memory import EmbeddingMemory, MemoryBoard
from tide_mega.model.spec import transformer_config
from tide_mega.model.tide import LossTensors, Scored, ScoreTensors, Targets, TideChunk
from tide_mega.parallel.groups import ParallelGroups
from tide_mega.parallel.megatron_cpu import cuda_means_cpu


class TideStage(nn.Module):
    """One pipeline stage of one tensor shard: the module DeepSpeed's engine holds.

    `chunks` are megatron models (one, or several with the interleaved schedule); `memory` is there on the first
    stage when K > 0; `owned` holds tables that DeepSpeed must not see, because each row has one owner.
    """

    def __init__(self, config: TideConfig, groups: ParallelGroups, device: torch.device) -> None:
        super().__init__()
        model, memory = config.model, config.memory
        self.groups = groups
        self.board = MemoryBoard(choose_kernels(config.kernels, device, memory.num_blocks))
        self.meter = TrafficMeter()
        self.num_layers, self.num_blocks = model.num_layers, memory.num_blocks
        self.vocab_size = model.vocab_size
        self.chunk_layers = model.num_layers // (config.parallel.pipeline * config.parallel.virtual_pipeline)
        self.block_shape = (memory.num_blocks, model.hidden_size)
        self.sequence_parallel = config.parallel.sequence_parallel
        megatron_config = transformer_config(
            model,
            config.parallel,
            config.trainer.precision,
            device,
            config.kernels.compile,
        )
        self.dtype: torch.dtype = megatron_config.params_dtype
        with cuda_means_cpu():
            self.chunks = nn.ModuleList(
                TideChunk(config, megatron_config, self.board, groups, virtual)
                for virtual in range(config.parallel.virtual_pipeline)
            )
        self.memory: EmbeddingMemory | None = None
        self.owned: OwnedTables | None = None
        self.absent_tables: nn.Parameter | None = None
        """Stands for the tables on stages without them: DeepSpeed's norm is one collective for each group of
        parameters, so every stage must have the same groups. It stays 0."""
        if memory.num_blocks and memory.owners == "tensor" and not groups.is_first_stage:
            self.absent_tables = nn.Parameter(torch.zeros(1, dtype=self.dtype))
        if memory.num_blocks and groups.is_first_stage:
            outside = memory.owners == "tensor_data"
            self.memory = EmbeddingMemory(
                memory.num_blocks,
                model.vocab_size,
                model.hidden_size,
                model.norm_eps,
                self.board.kernels.row_norm,
                None if outside else groups.memory,
            ).to(self.dtype)
            if outside:
                self.owned = OwnedTables(
                    memory.num_blocks,
                    model.vocab_size,
                    model.hidden_size,
                    dtype=self.dtype,
                    device=device,
                    optim=config.optim,
                    groups=groups,
                    meter=self.meter,
                    kernel=self.board.kernels.mix,
                )

    @property
    def transformers(self) -> list[TideChunk]:
        """The chunks, with their type."""
        return [chunk for chunk in self.chunks if isinstance(chunk, TideChunk)]

    def forward(
        self,
        chunk: int = 0,
        tokens_BT: Tensor | None = None,
        targets: Targets | Scored | None = None,
        index_BT: Tensor | None = None,
        *,
        read_ids: Tensor | None = None,
        rows_UKD: Tensor | None = None,
    ) -> Tensor | LossTensors | ScoreTensors:
        """Run one microbatch through a chunk, or with `read_ids` [U] read the memory.

        Returns:
            What `TideChunk.forward` returns; or M [U, K, D].
        """
        if read_ids is not None:
            if self.memory is None:
                raise RuntimeError("this stage has no memory to read")
            if self.board.rows_of is not None:
                return self._given_rows(self.board.rows_of, read_ids)
            return self.memory(read_ids, rows_UKD)
        return self.chunks[chunk](tokens_BT, targets, index_BT)

    def _given_rows(self, rows_of: Callable[[Tensor], Tensor], ids_U: Tensor) -> Tensor:
        memory_UKD = rows_of(ids_U)
        expected = (ids_U.numel(), *self.block_shape)
        if tuple(memory_UKD.shape) != expected or memory_UKD.dtype != self.dtype:
            raise ValueError(
                f"the rows read instead of the memory are {list(memory_UKD.shape)} in {memory_UKD.dtype}: they "
                f"must be {list(expected)} in {self.dtype}"
            )
        return memory_UKD

    def null_weights(self) -> Tensor:
        """Return the null-bank weights the layers of all stages left on their boards [L, B, T]; collective.

        Whole sequences; B counts those of all microbatches since the board began to record.
        """
        recorded = self.board.alpha_L or {}
        slices = {
            layer: torch.cat([alpha_SBJ[..., -1] for alpha_SBJ in of_layer], dim=1)
            for layer, of_layer in recorded.items()
        }
        like_SB = next(iter(slices.values()))
        whole_LSB = like_SB.new_zeros(self.num_layers, *like_SB.shape)
        for layer, null_SB in slices.items():
            whole_LSB[layer] = null_SB
        if self.groups.pipeline.size() > 1:
            torch.distributed.all_reduce(whole_LSB, group=self.groups.pipeline)
        if self.sequence_parallel:
            whole_SLB = tensor_parallel.gather_from_sequence_parallel_region(
                whole_LSB.transpose(0, 1).contiguous(), group=self.groups.tensor
            )
            whole_LSB = whole_SLB.transpose(0, 1)
        return whole_LSB.transpose(1, 2)
