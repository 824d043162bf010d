"""How many bytes a model with K blocks takes in memory and on disk, by the format of its rows.

Shapes: V vocabulary, K memory blocks, D width, R bytes of a token's record.
"""

import math
from dataclasses import dataclass

from tide_mega.config.schema import MemoryConfig, ModelConfig
from tide_mega.config.sizes import count_parameters
from tide_mega.hf.rows_tide import KINDS, RowFormat
from tide_mega.hf.sidecar_tide import Layout

BLOCKS = (0, 2, 4, 8, 16, 24)
"""K of the paper's models."""
CACHE = 0.05
"""Part of the rows that a store on disk keeps in memory unless it is told otherwise."""
RANK_PART = 0.5
"""Part of the K D columns that kind=rank keeps here."""
_CHECKSUM = 4
"""Bytes a row, kept in memory while a file of rows is open."""

PAPER_1B = ModelConfig(
    name="1b",
    num_layers=24,
    hidden_size=2048,
    ffn_hidden_size=3584,
    num_attention_heads=32,
    num_query_groups=8,
    vocab_size=128_256,
    tie_embeddings=True,
)
"""The paper's 1B model, its feed-forward as wide as its bytes allow (conf/model/1b.yaml)."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model with K blocks whose rows lie in a file, read through a cache."""

    num_blocks: int
    """K."""
    kind: str | None
    """Format of the rows; None at K = 0."""
    weights: int
    """Elements outside the memory, routers included: bytes at 8 bit, half of those at 16."""
    record: int = 0
    """R."""
    rows: int = 0
    """Of all records without the file around them: what they take where all are kept in memory."""
    cache: int = 0
    """Rows of the cache, checksums of all, and the basis of a joint low rank: in memory, whatever is read."""
    file: int = 0
    """On disk."""
    codes: int = 0
    """V K D elements at the format's bits, nothing else: the paper's measure (equation J.1); 0 for a rank."""


def format_of(kind: str, num_blocks: int, width: int) -> RowFormat:
    """Return a format; a rank keeps `RANK_PART` of the columns."""
    columns = math.ceil(RANK_PART * num_blocks * width)
    return RowFormat(kind, num_blocks, width, columns if kind == "rank" else None)


def sizes_of(model: ModelConfig, num_blocks: int, kind: str) -> Sizes:
    """Add up what a base model with K blocks takes in a format."""
    count = count_parameters(model, MemoryConfig(num_blocks=num_blocks))
    weights = count.base + count.routers  # gains are folded into the rows
    if num_blocks == 0:
        return Sizes(0, None, weights)
    V, form = model.vocab_size, format_of(kind, num_blocks, model.hidden_size)
    layout = Layout(form, V)
    cached = math.ceil(CACHE * V) * form.record_bytes
    return Sizes(
        num_blocks,
        kind,
        weights,
        record=form.record_bytes,
        rows=V * form.record_bytes + layout.basis_bytes,
        cache=cached + _CHECKSUM * V + layout.basis_bytes,
        file=layout.file_bytes,
        codes=V * num_blocks * model.hidden_size * _BITS.get(kind, 0) // 8,
    )


def all_sizes(model: ModelConfig) -> list[Sizes]:
    """Return those of every K of `BLOCKS` and every format, K = 0 once."""
    return [
        sizes_of(model, num_blocks, kind)
        for num_blocks in BLOCKS
        for kind in (KINDS if num_blocks else KINDS[:1])
    ]


_BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4, "nf4": 4}
