"""Every table cut to a rank, by itself or all in one, and what the model that reads them then scores.

Shapes: N rows of a chunk, V vocabulary, K blocks, D width, C = K D columns of all tables side by side, r rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tide_mega.data.batch import TokenBatch
from tide_mega.diagnostics.other_rows import as_stored, changed_rows, score_texts
from tide_mega.diagnostics.rank.directions import Directions, factor_elements, rank_of
from tide_mega.export.low_rank import joint_basis
from tide_mega.hf.rows_tide import RowFormat
from tide_mega.metrics.records import TextResult
from tide_mega.model.canonical import TABLES
from tide_mega.trained.model import TrainedModel
from tide_mega.trained.run import StoredWeights

PERCENTS = tuple(range(10, 100, 10))
"""p, by how much the rank is reduced."""
PER_TABLE, JOINT = "per table", "joint"
_BF16 = 2
"""Bytes."""
MOST_JOINT_COLUMNS = 16_384
"""Of all tables side by side that are cut jointly: the paper's K = 8. What that takes grows with their square in
memory and with their cube in time (`tide_mega.export.low_rank`)."""


@dataclass(frozen=True)
class Cut:
    """A model whose tables are cut."""

    method: str
    """`PER_TABLE` or `JOINT`."""
    percent: int
    """p."""
    rank: int
    """r, of the columns of a table or of all tables side by side."""
    stored: int
    """Bytes of the factors."""
    dense: int
    """Bytes of the tables uncut."""
    kept: float
    """Share of the squared norm, 0 to 1."""
    by_text: Mapping[str, TextResult]


def cut_tables(
    model: TrainedModel, weights: StoredWeights, texts: Mapping[str, Sequence[TokenBatch]]
) -> list[Cut]:
    """Cut every E_k by itself, before its norm, as the paper does, to each rank of `PERCENTS`."""
    V, K, D = weights.shape(TABLES)
    device = model.device.torch_device
    directions = Directions.of(rows_NKD.to(device) for _, rows_NKD in weights.chunks(TABLES))
    cuts = []
    for percent in PERCENTS:
        rank = rank_of(percent, D)

        def change(rows_NKD: Tensor, rank: int = rank) -> Tensor:
            return model.normalised(directions.cut(rows_NKD, rank))

        stored = _BF16 * K * factor_elements(V, D, rank)
        cuts.append(
            Cut(
                *(PER_TABLE, percent, rank, stored, _BF16 * V * K * D, directions.kept(rank)),
                score_texts(model, texts, changed_rows(model, change)),
            )
        )
    return cuts


def cut_jointly(
    model: TrainedModel, weights: StoredWeights, texts: Mapping[str, Sequence[TokenBatch]]
) -> list[Cut]:
    """Cut all tables side by side, M [V, K D], to each rank of `PERCENTS`, as an export with tables=rank does.

    There rows are cut after their norms: what is stored is what the layers read.
    """
    V, K, D = weights.shape(TABLES)
    found = joint_basis(_finished(model, weights), rank_of(PERCENTS[0], K * D))
    cuts = []
    for percent in PERCENTS:
        rank = rank_of(percent, K * D)
        form = RowFormat("rank", K, D, rank)
        # In a file the basis is in bf16; the model multiplies by it in its own dtype.
        basis_rC = found.basis_rC[:rank].bfloat16().to(model.stage.dtype)
        stored = V * form.record_bytes + _BF16 * basis_rC.numel()
        kept = float(found.energies_r[:rank].sum())
        rows_of = as_stored(model, form, basis_rC)
        cuts.append(
            Cut(
                *(JOINT, percent, rank, stored, _BF16 * V * K * D, kept),
                score_texts(model, texts, rows_of),
            )
        )
    return cuts


def _finished(model: TrainedModel, weights: StoredWeights) -> Iterator[Tensor]:
    """Yield the finished rows of all tokens, [N, K, D]."""
    for _, rows_NKD in weights.chunks(TABLES):
        yield model.normalised(rows_NKD.to(model.device.torch_device))
