"""Micro-batches of each step on every rank of a replica, and the count of training windows left out as unreadable.

The first rank of a replica reads a step's micro-batches and sends them to the others with one broadcast. Windows
that cannot be read (`data.on_bad_shard=skip`) are replaced and counted over all starts of the run.

Dimensions: M micro-batches of a step, B sequences, T tokens.
"""

import logging
from collections import Counter, deque

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from tide_mega.checkpoint import TrainingState
from tide_mega.checkpoint.agreement import gather
from tide_mega.config.schema import TideConfig
from tide_mega.data.loader import IGNORE_LABEL, TokenBatch, TrainBatches, train_batches
from tide_mega.data.stream import TokenStream
from tide_mega.model.stage import TideStage

log = logging.getLogger(__name__)


LEFT_OUT = "left_out"
"""Key under which checkpoints keep the number of windows left out, by shard."""


class StepBatches:
    """Produces the micro-batches of each step: the first rank of a replica reads them, the others receive."""

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
        """Steps read but not yet reported: (samples consumed after the step, windows left out by shard)."""
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
        """Return the M micro-batches of the next step, on the device.

        Args:
            sequences: that the step takes over all ranks; rows beyond them are padding (EOS without labels).
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
                packed_2MBT = packed_2MBT.pin_memory()  # a copy from pageable memory would block the host
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
        """Return the windows, by shard, that this rank could not read up to `samples` consumed; each only once."""
        taken: Counter[str] = Counter()
        while self._left_out and self._left_out[0][0] <= samples:
            taken.update(self._left_out.popleft()[1])
        return dict(taken)

    def weights(self, sequences: int) -> list[float]:
        """Return the weight [M] of each micro-batch's mean loss in a step of `sequences` sequences over all ranks.

        The schedule and the data-parallel reduction average micro-batches and replicas with equal weight, but in a
        step that is not full each micro-batch holds between 0 and B sequences; the weights correct for that.
        """
        _, accumulation, size, _ = self.shape
        starts = range(self._first_row, self._first_row + accumulation * size, size)
        held = [min(size, max(0, sequences - start)) for start in starts]
        return [rows * accumulation * self.groups.data_size / sequences for rows in held]

    def close(self) -> None:
        """Stop the loader processes."""
        if self._source is not None:
            self._source.close()


class LeftOut:
    """Counts the windows replaced because they were unreadable, by shard; equal on every rank after `gather`."""

    def __init__(
        self, stream: TokenStream, batches: StepBatches, state: TrainingState, host: ProcessGroup
    ) -> None:
        """Continue the count kept in `state`; collective over `host`, a group of all ranks for host memory."""
        self._batches, self._state = batches, state
        self._windows: Counter[str] = Counter(state.extra.get(LEFT_OUT, {}))
        self._skipped_here = dict.fromkeys(stream.bad_shards, 0)
        self._group = host if stream.skips_bad else None
        self.gather()
        if self._windows and dist.get_rank() == 0:
            log.warning("left out so far: %s", self.describe())

    def gather(self) -> None:
        """Add what all ranks left out in the steps done; collective, and free unless bad shards are skipped."""
        if self._group is None:
            return
        of_batches = self._batches.take_left_out(self._state.samples)
        for here in gather(self._group, self._skipped_here | of_batches):
            self._windows.update(here)

    def keep(self) -> None:
        """Store the count in the training state, to be saved with it; collective."""
        self.gather()
        self._state.extra[LEFT_OUT] = dict(self._windows)

    @property
    def windows(self) -> int:
        """Number of windows left out so far."""
        return self._windows.total()

    @property
    def shards(self) -> int:
        """Number of shards that were skipped or had a window left out."""
        return len(self._windows)

    def describe(self) -> str:
        """Return the count by shard as text for a log line."""
        of_shards = ", ".join(f"{shard} ({count:,})" for shard, count in sorted(self._windows.items()))
        return f"{self.windows:,} windows of {self.shards} shards: {of_shards}"
