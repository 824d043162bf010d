"""Rows of the embedding and of the tables, as this process's optimizer keeps them: fp32, never gathered.

Shapes: V vocabulary, W rows of a shard, K blocks (1 for the embedding), D width, R rows asked for.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from tide_mega.memory.ranges import row_squares
from tide_mega.model.stage import TideStage
from tide_mega.parallel.engine import Engine
from tide_mega.parallel.groups import sum_over
from tide_mega.parallel.optimizer_state import OptimizerState


@dataclass(frozen=True)
class RowShard:
    """A process's range of a shard [W, K, D]: row r of the shard is of token type `first + every * r`."""

    values: Tensor
    """The range's elements, 1-D fp32: memory of the optimizer itself."""
    start: int
    """Of the first of them in the flattened shard."""
    shape: tuple[int, int, int]
    """(W, K, D)"""
    first: int
    every: int
    vocab_size: int
    ranges: ProcessGroup | None
    """Processes whose ranges together are the shard; None where this one has all of it."""
    shards: ProcessGroup
    """Processes whose shards together are the table."""

    def ids(self) -> Tensor:
        """Token type of each row [W]; -1 beyond the vocabulary."""
        ids_W = self.first + self.every * torch.arange(self.shape[0], device=self.values.device)
        return torch.where(ids_W < self.vocab_size, ids_W, -1)

    def row_of(self, token: int) -> int | None:
        """Return the row of a token type, None where another shard has it."""
        row, rest = divmod(token - self.first, self.every)
        return row if rest == 0 and 0 <= row < self.shape[0] else None

    def norms(self) -> Tensor:
        """L2 norm of every row of the shard [W, K], fp64; collective over `ranges`."""
        rows, blocks, width = self.shape
        squares = torch.zeros(rows * blocks, dtype=torch.float64, device=self.values.device)
        if self.values.numel():
            first, found = row_squares(self.values, self.start, width)
            squares[first : first + len(found)] = found
        return self._whole(squares).sqrt().view(rows, blocks)

    def rows(self, rows: list[int]) -> Tensor:
        """Return a few rows of the shard [R, K, D], fp32; collective over `ranges`."""
        _, blocks, width = self.shape
        size = blocks * width
        found = self.values.new_zeros(len(rows), size)
        for place, row in enumerate(rows):
            begin = row * size - self.start
            low, high = max(begin, 0), min(begin + size, self.values.numel())
            if low < high:
                found[place, low - begin : high - begin] = self.values[low:high]
        return self._whole(found).view(-1, blocks, width)

    def _whole(self, partial: Tensor) -> Tensor:
        return partial if self.ranges is None else sum_over(self.ranges, partial)


def embedding_shard(engine: Engine, vocab_size: int) -> RowShard | None:
    """Return this process's range of the input embedding, sharded over tensor parallelism; None past stage 1."""
    stage: TideStage = engine.module
    chunk = stage.transformers[0]
    if not chunk.pre_process:
        return None
    weight = chunk.embedding.word_embeddings.weight
    return _parameter_shard(engine.state, weight, stage, 1, vocab_size)


def table_shard(engine: Engine, vocab_size: int) -> RowShard | None:
    """Return this process's range of the tables, whoever owns them; None past stage 1 and without memory."""
    stage: TideStage = engine.module
    if stage.owned is not None:
        rows, blocks, width = stage.owned.master_WKD.shape
        return RowShard(
            values=stage.owned.master_WKD.detach().view(-1),
            start=0,
            shape=(rows, blocks, width),
            first=stage.owned.group.rank(),
            every=stage.owned.group.size(),
            vocab_size=vocab_size,
            ranges=None,
            shards=stage.owned.group,
        )
    if stage.memory is None or stage.memory.tables_WKD is None:
        return None
    return _parameter_shard(engine.state, stage.memory.tables_WKD, stage, stage.num_blocks, vocab_size)


def _parameter_shard(
    state: OptimizerState, weight: nn.Parameter, stage: TideStage, blocks: int, vocab_size: int
) -> RowShard:
    """A parameter whose rows are cut over tensor parallelism, and then by ZeRO over data parallelism."""
    groups, (_, width) = stage.groups, stage.block_shape
    rows = vocab_size // groups.tensor_size
    kept = state.kept(weight)
    return RowShard(
        values=weight.new_empty(0, dtype=torch.float32) if kept is None else kept.master,
        start=0 if kept is None else kept.start,
        shape=(rows, blocks, width),
        first=rows * groups.tensor_rank,
        every=1,
        vocab_size=vocab_size,
        ranges=groups.data,
        shards=groups.tensor,
    )
