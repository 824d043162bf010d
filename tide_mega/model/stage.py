"""What one process holds of the model: the module that DeepSpeed's engine wraps."""

import torch
from torch import Tensor, nn

from tide_mega.config.schema import TideConfig
from tide_mega.memory.memory import Memory
from tide_mega.memory.traffic import TrafficMeter
from tide_mega.model.chunk import LossTensors, Scored, ScoreTensors, Targets, TideChunk
from tide_mega.model.spec import transformer_config
from tide_mega.parallel.groups import ParallelGroups
from tide_mega.parallel.megatron_cpu import cuda_means_cpu


class TideStage(nn.Module):
    """One pipeline stage of one tensor shard.

    `chunks` are megatron models (one, or several with the interleaved schedule); `memory` is what their layers
    read.
    """

    def __init__(self, config: TideConfig, groups: ParallelGroups, device: torch.device) -> None:
        super().__init__()
        self.groups = groups
        megatron_config = transformer_config(
            config.model,
            config.parallel,
            config.trainer.precision,
            device,
            config.kernels.compile,
        )
        self.dtype: torch.dtype = megatron_config.params_dtype
        self.meter = TrafficMeter()
        self.memory = Memory(config, groups, self.meter, device=device, dtype=self.dtype)
        with cuda_means_cpu():
            self.chunks = nn.ModuleList(
                TideChunk(config, megatron_config, self.memory, groups, virtual)
                for virtual in range(config.parallel.virtual_pipeline)
            )
        self.memory_blocks = self.memory.blocks
        self.absent_tables: nn.Parameter | None = None
        """Placeholder for the tables on stages without them, always 0: DeepSpeed's gradient norm makes one
        collective per parameter group, so every stage must have the same groups."""
        if self.num_blocks and config.memory.owners == "tensor" and not groups.is_first_stage:
            self.absent_tables = nn.Parameter(torch.zeros(1, dtype=self.dtype))

    @property
    def num_blocks(self) -> int:
        """K."""
        return self.memory.num_blocks

    @property
    def transformers(self) -> list[TideChunk]:
        """The chunks, typed."""
        return [chunk for chunk in self.chunks if isinstance(chunk, TideChunk)]

    def forward(
        self,
        chunk: int,
        tokens_BT: Tensor | None = None,
        targets: Targets | Scored | None = None,
        index_BT: Tensor | None = None,
    ) -> Tensor | LossTensors | ScoreTensors:
        """Run one micro-batch through a chunk; see `TideChunk.forward`."""
        return self.chunks[chunk](tokens_BT, targets, index_BT)
