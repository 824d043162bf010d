"""Norms of embedding and tables by decile, and cosine distances over a fixed sample of types.

Shapes: V vocabulary, W rows of a shard, K blocks, J = K + 1 with the embedding first, D width, S slots, R sampled
types of a shard.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tide_mega.data.frequency import NUM_BINS
from tide_mega.metrics.deciles import BySlot
from tide_mega.metrics.live_records import WeightsRecord
from tide_mega.metrics.slots import SLOTS, SlotIndex
from tide_mega.parallel.engine import Engine
from tide_mega.parallel.groups import sum_over
from tide_mega.training.live.row_shards import RowShard, embedding_shard, table_shard

SAMPLE = 256
"""Types that cosine distances are means over."""


def sample_types(bins_V: Tensor, size: int, seed: int) -> list[int]:
    """Draw types of the deciles, as many of each as it has and `size` allows; ascending, by the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    sampled: list[int] = []
    for decile in range(NUM_BINS):
        share = size * (decile + 1) // NUM_BINS - size * decile // NUM_BINS
        types = (bins_V.cpu() == decile).nonzero().flatten()
        sampled += types[torch.randperm(len(types), generator=generator)[:share]].tolist()
    return sorted(sampled)


class WeightDiagnostics:
    """Looks at the weights of a run, each time in the same way."""

    def __init__(self, engine: Engine, bins_V: Tensor, seed: int) -> None:
        """Take the decile of every type of the model's vocabulary [V], on the device."""
        self._engine, self._vocab_size = engine, bins_V.numel()
        self._index = SlotIndex(bins_V)
        self._sample = sample_types(bins_V, SAMPLE, seed)

    def measure(self, step: int, tokens: int) -> WeightsRecord | None:
        """Measure the weights as they are after `step` steps and `tokens` tokens.

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
        # `where`, not a product: a norm that is not finite stays in its slot.
        sums_K = [torch.where(hot_W[:, None], norms_WK, 0.0).sum(0) for hot_W in hot_SW]
        sums_SK = sum_over(shard.shards, torch.stack(sums_K))
        return sums_SK.cpu(), sum_over(shard.shards, hot_SW.sum(1)).cpu()

    def _distances(self, embedding: RowShard, tables: RowShard) -> Tensor:
        """Mean cosine distance over the sample between embedding and tables [J, J], fp64."""
        own_RD = _rows_of(embedding, self._sample)
        places_R, rows_RKD = _rows_here(tables, self._sample)
        both_RJD = torch.cat([own_RD[places_R, None], rows_RKD], dim=1)
        unit_RJD = normalize(both_RJD, dim=2, eps=1e-30)
        cosines_JJ = torch.bmm(unit_RJD, unit_RJD.transpose(1, 2)).sum(0, dtype=torch.float64)
        return sum_over(tables.shards, len(places_R) - cosines_JJ).cpu() / len(self._sample)


def _rows_of(embedding: RowShard, types: list[int]) -> Tensor:
    """Return the embedding's rows of any types [R, D] to every process of its shards."""
    found_RD = embedding.values.new_zeros(len(types), embedding.shape[2])
    places_R, rows_R1D = _rows_here(embedding, types)
    found_RD[places_R] = rows_R1D[:, 0]
    return sum_over(embedding.shards, found_RD)


def _rows_here(shard: RowShard, types: list[int]) -> tuple[Tensor, Tensor]:
    """Return which of the types this shard has, as places among them, and their rows [R, K, D]."""
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
