"""A step's microbatches on every rank that shares a replica: read once, sent with one broadcast.

Shapes: M microbatches of a step, B sequences, T tokens.
"""

from collections import Counter, deque

import torch
import torch.distributed as dist

from tide_mega.config.schema import TideConfig
from tide_mega.data.batch import IGNORE_LABEL, TokenBatch
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
        self._eos_id = stream.eos_id
        self._first_row = groups.data_rank * accumulation * config.trainer.micro_batch_size
        self._source: TrainBatches | None = None
        self._samples, self._samples_in_step = first_sample, config.trainer.global_batch_size
        self._left_out: deque[tuple[int, dict[str, int]]] = deque()
        """Of the steps read and not yet asked for: samples consumed after the step, and windows by shard."""
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

    def next_step(self, sequences: int) -> list[TokenBatch]:
        """Return the M microbatches of the next step, on the device.

        Of a step that takes fewer `sequences` than a batch, over all ranks, the rows beyond are padding.
        """
        if self._source is not None:
            batches = [next(self._source) for _ in range(self.shape[1])]
            self._samples += self._samples_in_step
            if left_out := self._source.take_left_out():
                self._left_out.append((self._samples, left_out))
            both_MBT = [torch.stack(column) for column in zip(*batches, strict=True)]
            packed_2MBT = torch.stack(both_MBT).to(torch.int32)
            rows = packed_2MBT.view(2, -1, self.shape[-1])[:, max(0, sequences - self._first_row) :]
            rows[0], rows[1] = self._eos_id, IGNORE_LABEL
            if self.device.type == "cuda":
                packed_2MBT = packed_2MBT.pin_memory()  # from other memory the host would wait for the copy
            packed_2MBT = packed_2MBT.to(self.device, non_blocking=True)
        else:
            packed_2MBT = torch.empty(self.shape, dtype=torch.int32, device=self.device)
        model = self.groups.model
        if model.size() > 1:
            dist.broadcast(packed_2MBT, src=dist.get_global_rank(model, 0), group=model)
            self.meter.add_broadcast("tokens", packed_2MBT, model.size(), is_root=self._source is not None)
        tokens_MBT, labels_MBT = packed_2MBT.long()
        return [TokenBatch(*pair) for pair in zip(tokens_MBT, labels_MBT, strict=True)]

    def take_left_out(self, samples: int) -> dict[str, int]:
        """Windows that this rank could not read, by shard, of the steps up to `samples` consumed; each once."""
        taken: Counter[str] = Counter()
        while self._left_out and self._left_out[0][0] <= samples:
            taken.update(self._left_out.popleft()[1])
        return dict(taken)

    def weights(self, sequences: int) -> list[float]:
        """Return the weight [M] of each microbatch's mean loss in that of a step that takes so many `sequences`.

        Microbatches and replicas are averaged over as equals, and these hold from 0 to B of the sequences each.
        """
        _, accumulation, size, _ = self.shape
        starts = range(self._first_row, self._first_row + accumulation * size, size)
        held = [min(size, max(0, sequences - start)) for start in starts]
        return [rows * accumulation * self.groups.data_size / sequences for rows in held]

    def close(self) -> None:
        """End loader processes."""
        if self._source is not None:
            self._source.close()
