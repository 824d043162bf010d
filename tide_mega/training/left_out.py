"""Training data that cannot be read (`data.on_bad_shard=skip`), counted over all starts of a run."""

import logging
from collections import Counter

import torch.distributed as dist
from torch.distributed import ProcessGroup

from tide_mega.checkpoint import TrainingState
from tide_mega.checkpoint.together import gather
from tide_mega.data.stream import TokenStream
from tide_mega.training.batches import StepBatches

log = logging.getLogger(__name__)

LEFT_OUT = "left_out"
"""Name under which checkpoints keep the windows left out, by shard."""


class LeftOut:
    """Windows whose place others took, by shard, up to the steps done; the same on every rank after `gather`."""

    def __init__(
        self, stream: TokenStream, batches: StepBatches, state: TrainingState, host: ProcessGroup
    ) -> None:
        """Go on from what `state` says, counting over `host`, a group of all ranks for host memory; collective."""
        self._batches, self._state = batches, state
        self._windows: Counter[str] = Counter(state.extra.get(LEFT_OUT, {}))
        self._skipped_here = dict.fromkeys(stream.bad_shards, 0)
        self._group = host if stream.skips_bad else None
        self.gather()
        if self._windows and dist.get_rank() == 0:
            log.warning("left out so far: %s", self.describe())

    def gather(self) -> None:
        """Take in what all ranks left out of the steps done; collective, and free where nothing is skipped."""
        if self._group is None:
            return
        of_batches = self._batches.take_left_out(self._state.samples)
        for here in gather(self._group, self._skipped_here | of_batches):
            self._windows.update(here)

    def keep(self) -> None:
        """Put the count into what a checkpoint keeps; collective."""
        self.gather()
        self._state.extra[LEFT_OUT] = dict(self._windows)

    @property
    def windows(self) -> int:
        """Windows left out so far."""
        return self._windows.total()

    @property
    def shards(self) -> int:
        """Shards that were skipped, or of which a window was left out."""
        return len(self._windows)

    def describe(self) -> str:
        """Return shards and their windows, as in a log line."""
        of_shards = ", ".join(f"{shard} ({count:,})" for shard, count in sorted(self._windows.items()))
        return f"{self.windows:,} windows of {self.shards} shards: {of_shards}"
