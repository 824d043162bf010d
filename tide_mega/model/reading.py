"""One reading of the memory: rows to every stage before the schedule, their gradients home after it.

Shapes: U distinct token types, K blocks, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tide_mega.kernels.row_gradient import RowGradient
from tide_mega.memory.owned import Fetch
from tide_mega.memory.plan import MemoryPlan
from tide_mega.model.stage import TideStage
from tide_mega.parallel.groups import sum_over


class MemoryReading:
    """Gather, normalise, broadcast to the stages; and the way back.

    Normalising happens before the broadcast, on the first stage, where the gains live: the same numbers as after
    it, once instead of on every stage, and each gain has one gradient.
    """

    def __init__(
        self, stage: TideStage, call: Callable[..., Any], plan: MemoryPlan, fetch: Fetch | None = None
    ) -> None:
        """Read the memory and put it on the stage's board; collective.

        Args:
            stage: this process's part of the model.
            call: runs the stage's forward pass: DeepSpeed's engine when training, else the stage.
            plan: of this replica's microbatches.
            fetch: rows already under way, where tables are owned outside the model.
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
        """Carry the gradient the layers of all stages left back to the norms and the tables; collective.

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
                # Each tensor rank has seen its slice of the tokens only.
                sum_over(groups.tensor, gradient_UKD)
                stage.meter.add_sum("row gradients", gradient_UKD, groups.tensor_size)
            assert self.memory_UKD is not None
            self.memory_UKD.backward(gradient_UKD.to(self.memory_UKD.dtype))
            if stage.owned is not None and self.fetch is not None and self.rows_UKD is not None:
                assert self.rows_UKD.grad is not None
                stage.owned.add_gradient(self.fetch, self.rows_UKD.grad)
        self.close()

    def close(self) -> None:
        """Free the rows."""
        self.stage.board.rows_UKD = self.stage.board.sink = None
