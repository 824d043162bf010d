"""A step's microbatches on every rank that shares a replica: read once, sent with one broadcast.

Shapes: M microbatches of a step, B sequences, T tokens.
"""

import torch
import torch.distributed as dist

from tide_mega.config.schema import TideConfig
from tide_mega.data.batch import TokenBatch
from tide_mega.data.loader import TrainBatches, train_batches
from tide_mega.data.stream import TokenStream
from tide_mega.model.stage import TideStage


class StepBatches:
    """Yields the microbatches of each step; the first rank of a replica reads, the others receive."""

    def __init__(
        self,
        config: TideConfig,
        stream: TokenStream,
        stage: TideStage,
        device: torch.device,
        *,
        first_sample: int,
        accumulation: int,
    ) -> None:
        groups = stage.groups
        self.groups, self.device, self.meter = groups, device, stage.meter
        self.shape = (2, accumulation, config.trainer.micro_batch_size, config.data.seq_length)
        self._source: TrainBatches | None = None
        if groups.model.rank() == 0:
            self._source = train_batches(
                stream,
                seed=config.data.seed,
                first_sample=first_sample,
                global_batch_size=config.trainer.global_batch_size,
                micro_batch_size=config.trainer.micro_batch_size,
                dp_rank=groups.data_rank,
                dp_size=groups.data_size,
                num_workers=config.data.num_workers,
            )

    def next_step(self) -> list[TokenBatch]:
        """Return the M microbatches of the next step, on the device."""
        if self._source is not None:
            batches = [next(self._source) for _ in range(self.shape[1])]
            both_MBT = [torch.stack(column) for column in zip(*batches, strict=True)]
            packed_2MBT = torch.stack(both_MBT).to(torch.int32).to(self.device, non_blocking=True)
        else:
            packed_2MBT = torch.empty(self.shape, dtype=torch.int32, device=self.device)
        model = self.groups.model
        if model.size() > 1:
            dist.broadcast(packed_2MBT, src=dist.get_global_rank(model, 0), group=model)
            self.meter.add_broadcast("tokens", packed_2MBT, model.size(), is_root=self._source is not None)
        tokens_MBT, labels_MBT = packed_2MBT.long()
        return [TokenBatch(*pair) for pair in zip(tokens_MBT, labels_MBT, strict=True)]

    def close(self) -> None:
        """End loader processes."""
        if self._source is not None:
            self._source.close()
