"""What one process holds of the model, and the reading of the memory around a step.

`TideStage` holds a stage's chunks of the transformer and, on the first stage, the memory. `MemoryReading` brings
the step's rows to every stage before the pipeline schedule and their gradients back to the tables after it.

Dimensions: B sequences, T tokens, U distinct token types, K blocks, D width, L layers.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from torch import Tensor, nn

from tide_mega.config.schema import TideConfig
from tide_mega.kernels.choice import choose_kernels
from tide_mega.kernels.row_gradient import RowGradient
from tide_mega.memory.owned import Fetch, OwnedTables
from tide_mega.memory.plan import MemoryPlan
from tide_mega.memory.traffic import TrafficMeter
from tide_mega.model.chunk import LossTensors, Scored, ScoreTensors, Targets, TideChunk
from tide_mega.model.layer import EmbeddingMemory, MemoryBoard
from tide_mega.model.spec import transformer_config
from tide_mega.parallel.groups import ParallelGroups, sum_over
from tide_mega.parallel.megatron_cpu import cuda_means_cpu


class TideStage(nn.Module):
    """One pipeline stage of one tensor shard: the module that DeepSpeed's engine wraps.

    `chunks` are megatron models (one, or several with the interleaved schedule). `memory` exists on the first
    stage if K > 0. `owned` holds tables that DeepSpeed must not see because each row has one owner.
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
        """Placeholder for the tables on stages without them, always 0: DeepSpeed's gradient norm makes one
        collective per parameter group, so every stage must have the same groups."""
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
        """The chunks, typed."""
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
        """Run one micro-batch through a chunk or, with `read_ids` [U], read the memory.

        Returns:
            The result of `TideChunk.forward`; with `read_ids` M [U, K, D].
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
        """Return the null-bank weights that the layers of all stages recorded [L, B, T]; collective.

        T covers whole sequences; B counts those of all micro-batches since recording began.
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


class MemoryReading:
    """One reading of the memory: gathers, normalises and broadcasts its rows to the stages, and returns gradients.

    Rows are normalised before the broadcast, on the first stage, where the gains live: with the same result as
    after it, but once instead of on every stage, and with a single gradient for each gain. As a context manager it
    frees the rows when it ends, of a pass that fails too.
    """

    def __init__(
        self, stage: TideStage, call: Callable[..., Any], plan: MemoryPlan, fetch: Fetch | None = None
    ) -> None:
        """Read the memory and put it on the stage's board; collective.

        Args:
            stage: this process's part of the model.
            call: runs the stage's forward pass: DeepSpeed's engine in training, else the stage itself.
            plan: of this replica's micro-batches.
            fetch: a fetch already in flight, if tables are owned outside the model.
        """
        self.stage, groups, ids_U = stage, stage.groups, plan.ids_U
        self.rows_UKD: Tensor | None = None
        self.memory_UKD: Tensor | None = None
        self.fetch: Fetch | None = None
        if groups.is_first_stage:
            if stage.owned is not None:
                self.fetch = fetch or stage.owned.fetch(plan)
                self.rows_UKD = stage.owned.rows_of(self.fetch).requires_grad_(torch.is_grad_enabled())
            self.memory_UKD = call(read_ids=ids_U, rows_UKD=self.rows_UKD)
            if stage.owned is None and groups.tensor_size > 1:
                stage.meter.add_sum("rows", self.memory_UKD, groups.tensor_size)
        board, rows_UKD = stage.board, self._on_this_stage(ids_U)
        board.rows_UKD = rows_UKD
        if torch.is_grad_enabled():
            board.sink = RowGradient(rows_UKD.shape, rows_UKD.device, board.kernels.mix, stage.chunk_layers)

    def _on_this_stage(self, ids_U: Tensor) -> Tensor:
        stage, pipeline = self.stage, self.stage.groups.pipeline
        if self.memory_UKD is not None:
            travelling = self.memory_UKD.detach()
        else:
            shape = (ids_U.numel(), *stage.block_shape)
            travelling = torch.empty(shape, dtype=stage.dtype, device=ids_U.device)
        if pipeline.size() > 1:
            travelling = travelling.contiguous()
            dist.broadcast(travelling, src=dist.get_global_rank(pipeline, 0), group=pipeline)
            stage.meter.add_broadcast(
                "rows", travelling, pipeline.size(), is_root=stage.groups.is_first_stage
            )
        return travelling

    def send_gradients(self) -> None:
        """Send the gradient that the layers of all stages left back to the norms and tables; collective.

        Raises:
            RuntimeError: no layer has read the board.
        """
        stage, groups = self.stage, self.stage.groups
        sink = stage.board.sink
        if sink is None or sink.is_empty:
            raise RuntimeError("no layer has read the memory: send_gradients belongs after the backward pass")
        gradient_UKD = sink.total()
        if groups.pipeline.size() > 1:
            sum_over(groups.pipeline, gradient_UKD)
            stage.meter.add_sum("row gradients", gradient_UKD, groups.pipeline.size())
        if groups.is_first_stage:
            if stage.sequence_parallel:
                # Each tensor rank has seen only its slice of the tokens.
                sum_over(groups.tensor, gradient_UKD)
                stage.meter.add_sum("row gradients", gradient_UKD, groups.tensor_size)
            assert self.memory_UKD is not None
            self.memory_UKD.backward(gradient_UKD.to(self.memory_UKD.dtype))
            if stage.owned is not None and self.fetch is not None and self.rows_UKD is not None:
                assert self.rows_UKD.grad is not None
                stage.owned.add_gradient(self.fetch, self.rows_UKD.grad)

    def __enter__(self) -> "MemoryReading":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the rows and their gradient; whatever refers to this reading keeps none of them alive."""
        self.stage.board.rows_UKD = self.stage.board.sink = None
        self.rows_UKD = self.memory_UKD = self.fetch = None
