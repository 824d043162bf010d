"""Live diagnostics of TIDE: null-bank weights, gradient norms by table, weight norms and distances by decile.

- Null-bank weights of a logged step, by layer and by decile of the input token (`StepNullWeights`).
- L2 norm of each memory table's reduced gradient, wherever its parts are kept (`table_square_norms`).
- Norms of embedding and table rows by decile, and cosine distances over a fixed sample of types
  (`WeightDiagnostics`). They read the fp32 rows where this process's optimizer keeps them; whole tables are never
  gathered.

Dimensions: L layers, B sequences, T tokens, V vocabulary, S slots, W rows of a shard, K blocks (1 for the
embedding), J = K + 1 with the embedding first, D width, R rows or sampled types of a shard.
"""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import normalize

from tide_mega.data.frequency import NUM_BINS
from tide_mega.data.loader import TokenBatch
from tide_mega.memory.ranges import row_squares, sum_by_block
from tide_mega.metrics.deciles import SLOTS, BySlot, NullWeight, NullWeightResult, SlotIndex
from tide_mega.metrics.records import WeightsRecord
from tide_mega.model.stage import TideStage
from tide_mega.parallel.engine import Engine
from tide_mega.parallel.groups import sum_over
from tide_mega.parallel.optimizer_state import OptimizerState
from tide_mega.training.optimizer import TABLES

SAMPLE = 256
"""Number of types over which cosine distances are averaged."""


class StepNullWeights:
    """Averages the null-bank weights that the layers record in a logged step."""

    def __init__(self, stage: TideStage, bins_V: Tensor) -> None:
        """Take the stage and the decile of each type [V], on the device."""
        self._stage = stage
        self._recording = ExitStack()
        self._null = NullWeight(stage.memory.num_layers if stage.num_blocks else 0, bins_V)

    def record(self, logged: bool) -> None:
        """Set before a step whether its router weights are recorded."""
        self._recording.close()
        if logged and self._stage.num_blocks:
            self._recording.enter_context(self._stage.memory.recording())

    def read(self, batches: list[TokenBatch]) -> NullWeightResult:
        """Average over the input tokens of the step, padding left out, and stop recording.

        Collective over the world; empty without memory. `batches` are this replica's micro-batches of the step.
        """
        stage = self._stage
        self._null.reset()
        if stage.num_blocks:
            sizes = [batch.tokens_BT.size(0) for batch in batches]
            of_microbatches = stage.memory.null_weights().split(sizes, dim=1)
            self._recording.close()
            for null_LBT, batch in zip(of_microbatches, batches, strict=True):
                self._null.update(null_LBT, *batch)
        # Every stage and tensor rank has the weights of all layers, so only replicas differ.
        return self._null.reduce(lambda tensor: sum_over(stage.groups.data, tensor))


@dataclass(frozen=True)
class RowShard:
    """A process's range of a row shard [W, K, D]; row r of the shard is token type `first + every * r`."""

    values: Tensor
    """The range's elements, 1-D fp32: a view of the optimizer's own memory."""
    start: int
    """Offset of the first of them in the flattened shard."""
    shape: tuple[int, int, int]
    """(W, K, D)"""
    first: int
    every: int
    vocab_size: int
    ranges: ProcessGroup | None
    """Processes whose ranges make up the shard; None if this one has all of it."""
    shards: ProcessGroup
    """Processes whose shards make up the table."""

    def ids(self) -> Tensor:
        """Token type of each row [W]; -1 beyond the vocabulary."""
        ids_W = self.first + self.every * torch.arange(self.shape[0], device=self.values.device)
        return torch.where(ids_W < self.vocab_size, ids_W, -1)

    def row_of(self, token: int) -> int | None:
        """Return the row of a token type; None if another shard has it."""
        row, rest = divmod(token - self.first, self.every)
        return row if rest == 0 and 0 <= row < self.shape[0] else None

    def norms(self) -> Tensor:
        """Return the L2 norm of every row of the shard [W, K], fp64; collective over `ranges`."""
        rows, blocks, width = self.shape
        squares = torch.zeros(rows * blocks, dtype=torch.float64, device=self.values.device)
        if self.values.numel():
            first, found = row_squares(self.values, self.start, width)
            squares[first : first + len(found)] = found
        return self._whole(squares).sqrt().view(rows, blocks)

    def rows(self, rows: list[int]) -> Tensor:
        """Return the given rows of the shard [R, K, D], fp32; collective over `ranges`."""
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
    if (owned := stage.memory.owned) is not None:
        rows, blocks, width = owned.master_WKD.shape
        return RowShard(
            values=owned.master_WKD.detach().view(-1),
            start=0,
            shape=(rows, blocks, width),
            first=owned.group.rank(),
            every=owned.group.size(),
            vocab_size=vocab_size,
            ranges=None,
            shards=owned.group,
        )
    if (tables := stage.memory.blocks) is None or tables.tables_WKD is None:
        return None
    return _parameter_shard(engine.state, tables.tables_WKD, stage, stage.num_blocks, vocab_size)


def _parameter_shard(
    state: OptimizerState, weight: nn.Parameter, stage: TideStage, blocks: int, vocab_size: int
) -> RowShard:
    """Return the shard of a parameter whose rows are split by tensor parallelism and then cut by ZeRO."""
    groups, (_, width) = stage.groups, stage.memory.block_shape
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


def table_square_norms(engine: Engine, device: torch.device) -> Tensor:
    """Return the squared L2 norm of each table's whole reduced gradient [K], fp64; collective over the world.

    Call between `accumulate` and `step`, that is before clipping. Each element is counted by exactly one
    process: its owner, or the data-parallel rank in whose ZeRO range it lies. Not finite if the gradient is not.
    """
    stage: TideStage = engine.module
    blocks, width = stage.memory.block_shape
    squares_K = torch.zeros(blocks, dtype=torch.float64, device=device)
    if stage.memory.owned is not None:
        squares_K += stage.memory.owned.square_norms()
    elif stage.memory.blocks is not None:
        for part in engine.gradient_ranges(TABLES):
            squares_K += sum_by_block(*row_squares(part.values, part.start, width), blocks)
    dist.all_reduce(squares_K)
    return squares_K


def sample_types(bins_V: Tensor, size: int, seed: int) -> list[int]:
    """Draw up to `size` types, evenly over the deciles; ascending, a function of deciles and seed alone."""
    generator = torch.Generator().manual_seed(seed)
    sampled: list[int] = []
    for decile in range(NUM_BINS):
        share = size * (decile + 1) // NUM_BINS - size * decile // NUM_BINS
        types = (bins_V.cpu() == decile).nonzero().flatten()
        sampled += types[torch.randperm(len(types), generator=generator)[:share]].tolist()
    return sorted(sampled)


class WeightDiagnostics:
    """Measures norms and distances of a run's weights, over the same types each time."""

    def __init__(self, engine: Engine, bins_V: Tensor, seed: int) -> None:
        """Take the decile of every type of the model's vocabulary [V], on the device."""
        self._engine, self._vocab_size = engine, bins_V.numel()
        self._index = SlotIndex(bins_V)
        self._sample = sample_types(bins_V, SAMPLE, seed)

    def measure(self, step: int, tokens: int) -> WeightsRecord | None:
        """Return the record of the weights after `step` steps and `tokens` tokens.

        Collective over the first pipeline stage; None on the others.
        """
        embedding = embedding_shard(self._engine, self._vocab_size)
        if embedding is None:
            return None
        tables = table_shard(self._engine, self._vocab_size)
        norms_S1, count_S = self._norm_sums(embedding)
        norms_SK = None if tables is None else self._norm_sums(tables)[0]
        distances_JJ = self._distances(embedding, tables) if tables is not None and self._sample else None
        return _record(step, tokens, count_S, norms_S1, norms_SK, len(self._sample), distances_JJ)

    def _norm_sums(self, shard: RowShard) -> tuple[Tensor, Tensor]:
        """Sum the norms of all rows of a table by slot [S, K], and count them [S]."""
        hot_SW = self._index.one_hot(shard.ids()).T
        norms_WK = shard.norms()
        # `where` and not a product, so that a non-finite norm stays in its slot.
        sums_K = [torch.where(hot_W[:, None], norms_WK, 0.0).sum(0) for hot_W in hot_SW]
        sums_SK = sum_over(shard.shards, torch.stack(sums_K))
        return sums_SK.cpu(), sum_over(shard.shards, hot_SW.sum(1)).cpu()

    def _distances(self, embedding: RowShard, tables: RowShard) -> Tensor:
        """Return the mean cosine distances between embedding and tables over the sample [J, J], fp64."""
        own_RD = _rows_of(embedding, self._sample)
        places_R, rows_RKD = _rows_here(tables, self._sample)
        both_RJD = torch.cat([own_RD[places_R, None], rows_RKD], dim=1)
        unit_RJD = normalize(both_RJD, dim=2, eps=1e-30)
        cosines_JJ = torch.bmm(unit_RJD, unit_RJD.transpose(1, 2)).sum(0, dtype=torch.float64)
        return sum_over(tables.shards, len(places_R) - cosines_JJ).cpu() / len(self._sample)


def _rows_of(embedding: RowShard, types: list[int]) -> Tensor:
    """Return the embedding's rows of the given types [R, D] on every process of its shards; collective."""
    found_RD = embedding.values.new_zeros(len(types), embedding.shape[2])
    places_R, rows_R1D = _rows_here(embedding, types)
    found_RD[places_R] = rows_R1D[:, 0]
    return sum_over(embedding.shards, found_RD)


def _rows_here(shard: RowShard, types: list[int]) -> tuple[Tensor, Tensor]:
    """Return the positions in `types` of those that this shard has [R], and their rows [R, K, D]."""
    rows = {place: row for place, token in enumerate(types) if (row := shard.row_of(token)) is not None}
    places_R = torch.tensor(list(rows), dtype=torch.int64, device=shard.values.device)
    return places_R, shard.rows(list(rows.values()))


def _record(
    step: int,
    tokens: int,
    count_S: Tensor,
    embedding_S1: Tensor,
    tables_SK: Tensor | None,
    sampled: int,
    distances_JJ: Tensor | None,
) -> WeightsRecord:
    blocks_KS = [] if tables_SK is None else list(tables_SK.T)
    return WeightsRecord(
        step=step,
        tokens=tokens,
        types_by_bin=dict(zip(SLOTS, count_S.tolist(), strict=True)),
        embedding_norm_by_bin=_means(embedding_S1[:, 0], count_S),
        table_norm_by_bin={} if tables_SK is None else _means(tables_SK.mean(1), count_S),
        table_norm_by_block_and_bin=[_means(sums_S, count_S) for sums_S in blocks_KS],
        sampled_types=0 if distances_JJ is None else sampled,
        cosine_distance_to_embedding=[] if distances_JJ is None else distances_JJ[0, 1:].tolist(),
        cosine_distance_between=[] if distances_JJ is None else distances_JJ[1:, 1:].tolist(),
    )


def _means(sums_S: Tensor, count_S: Tensor) -> BySlot:
    means = zip(SLOTS, sums_S.tolist(), count_S.tolist(), strict=True)
    return {slot: total / count if count else None for slot, total, count in means}
