"""Bytes in memory and on disk against the number of memory blocks, by row format (paper, Figure 4).

Computed for K = 0 to 24, for the shapes of the runs and of the paper's model. For small runs the files are also
written, and their lengths compared with what was computed.

Shapes: V vocabulary, K memory blocks, D width, R bytes of a token's record, r rank.
"""

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from tide_mega.config.schema import MemoryConfig, ModelConfig
from tide_mega.config.sizes import count_parameters
from tide_mega.hf.rows_tide import KINDS, RowFormat, finished
from tide_mega.hf.sidecar_tide import Layout, write_sidecar
from tide_mega.lab import plotting
from tide_mega.lab.figures.analysis import Analysis
from tide_mega.lab.figures.kit import finite_rows
from tide_mega.lab.figures.section import Cell, DataTable, Section
from tide_mega.lab.plotting import line
from tide_mega.model.canonical import GAINS, TABLES
from tide_mega.trained.run import TrainedRun

BLOCKS = (0, 2, 4, 8, 16, 24)
"""K of the paper's models."""
CACHE = 0.05
"""Default share of the rows that a store on disk keeps in memory."""
RANK_PART = 0.5
"""Share of the K D columns that kind=rank keeps here."""
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
"""The paper's 1B model; the feed-forward width follows from its bytes (conf/model/1b.yaml)."""


@dataclass(frozen=True)
class Sizes:
    """Bytes of a model with K blocks whose rows are in a file, read through a cache."""

    num_blocks: int
    """K."""
    kind: str | None
    """Format of the rows; None at K = 0."""
    weights: int
    """Elements outside the memory, routers included: their bytes at 8 bit, half their bytes at 16 bit."""
    record: int = 0
    """R."""
    rows: int = 0
    """All records without the file around them: their size if all are kept in memory."""
    cache: int = 0
    """Always in memory: the cache's rows, all checksums, and the basis of a joint low rank."""
    file: int = 0
    """Length of the file on disk."""
    codes: int = 0
    """V K D elements at the format's bits, nothing else: the paper's measure (equation J.1); 0 for a rank."""


def format_of(kind: str, num_blocks: int, width: int) -> RowFormat:
    """Return a format; a rank keeps `RANK_PART` of the columns."""
    columns = math.ceil(RANK_PART * num_blocks * width)
    return RowFormat(kind, num_blocks, width, columns if kind == "rank" else None)


def sizes_of(model: ModelConfig, num_blocks: int, kind: str) -> Sizes:
    """Compute the sizes of a base model with K blocks in a format."""
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
    """Return the sizes for every K of `BLOCKS` and every format, K = 0 once."""
    return [
        sizes_of(model, num_blocks, kind)
        for num_blocks in BLOCKS
        for kind in (KINDS if num_blocks else KINDS[:1])
    ]


_BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int4": 4, "nf4": 4}


MOST_ELEMENTS = 2**26
"""Largest tables for which files are written: 256 MB in fp32."""


@dataclass(frozen=True)
class Written:
    """Length of a written file, and the computed one."""

    label: str
    kind: str
    computed: int
    found: int
    """Bytes."""


def write_all(run: TrainedRun) -> list[Written]:
    """Write the run's finished rows in every format into a temporary folder, one file at a time.

    Raises:
        SidecarError: the disk is full.
    """
    V, K, D = run.weights.shape(TABLES)
    written = []
    for kind in KINDS:
        form = format_of(kind, K, D)
        # Any orthonormal basis has the size of the best one.
        basis = None if form.basis_shape is None else torch.eye(*form.basis_shape)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "memory.tide"
            write_sidecar(path, form, V, _rows(run), basis)
            computed = sizes_of(run.config.model, K, kind).file
            written.append(Written(run.label, kind, computed, path.stat().st_size))
    return written


def _rows(run: TrainedRun) -> Iterator[Tensor]:
    gains_KD = run.weights.tensor(GAINS)
    for _, tables_NKD in run.weights.chunks(TABLES):
        yield finished(tables_NKD, gains_KD, run.config.model.norm_eps, torch.float32)


SHOWN = "int4"
"""The format whose cache is drawn: the paper's 4 bit."""


def draw(name: str, sizes: Sequence[Sizes], paper: tuple[float, float] | None = None) -> Figure:
    """Draw memory with rows on disk and with all rows in memory (left), and file sizes by format (right).

    `paper` has the paper's bytes of the base model at 8 bit, and on disk at K = 24 and 4 bit.
    """
    figure, (axes,) = plotting.panels(2, width=6, height=4.4)
    scale, unit = (1e9, "GB") if max(of.file for of in sizes) >= 1e9 else (1e6, "MB")
    _memory(axes[0], sizes, scale)
    _disk(axes[1], sizes, scale)
    plotting.label(axes[0], f"{name}: in memory", "memory blocks K", f"memory ({unit})")
    plotting.label(axes[1], f"{name}: on disk", "memory blocks K", f"file of rows ({unit})")
    if paper is not None:
        base, disk = paper
        axes[0].axhline(
            base / scale, color="black", linestyle=":", linewidth=1.2, label="paper, weights at 8 bit"
        )
        axes[1].plot([24], [disk / scale], "x", color="black", markersize=9, label="paper, 4 bit")
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def _memory(axis: Axes, sizes: Sequence[Sizes], scale: float) -> None:
    shown = [of for of in sizes if of.kind in (None, SHOWN)]
    names = [str(of.num_blocks) for of in shown]
    places = range(len(shown))
    weights = [of.weights / scale for of in shown]
    axis.bar(places, weights, color="#bdbdbd", width=0.6, label="weights at 8 bit")
    axis.bar(
        places,
        [of.cache / scale for of in shown],
        bottom=weights,
        color=line(1).colour,
        width=0.6,
        label=f"cache of {CACHE:.0%} of the rows, {SHOWN}",
    )
    look = line(0)
    inside = [(of.weights + of.rows) / scale for of in shown]
    axis.plot(
        places, inside, look.dash, marker=look.marker, color=look.colour, label=f"with all rows, {SHOWN}"
    )
    axis.set_xticks(list(places), names)
    axis.set_ylim(top=1.35 * max(inside))


def _disk(axis: Axes, sizes: Sequence[Sizes], scale: float) -> None:
    blocks = sorted({of.num_blocks for of in sizes})
    for i, kind in enumerate(KINDS):
        look = line(i)
        files = [next((of.file for of in sizes if (of.num_blocks, of.kind) == (k, kind)), 0) for k in blocks]
        name = f"{kind}, half of the columns" if kind == "rank" else kind
        axis.plot(
            blocks, [n / scale for n in files], look.dash, marker=look.marker, color=look.colour, label=name
        )
    axis.set_xticks(blocks)


PAPER = (
    "With the tables quantised to 4 bit and on an SSD, every TIDE-1B model needs the memory of LLaMA-Base-1B, "
    "1.03 GB at 8 bit, while the SSD's share grows from 0 to 3.152 GB at K = 24."
)
PAPER_MEMORY, PAPER_DISK = 1.03e9, 3.152e9
PAPER_NAME = "paper's 1B"

Shapes = Mapping[str, Sequence[Sizes]]


def run(analysis: Analysis) -> Section:
    """Compute the sizes of each shape, and write the rows of small runs to files for comparison.

    Raises:
        SkippedError: a run's tables have rows that are not finite.
        SidecarError: the disk is full.
    """
    notes = [
        "Routers count among the weights; gains are folded into the rows. The paper counts V K d elements of 4 "
        "bit alone; here an int4 record also has a scale for 32 elements, an nf4 one for 64, an int8 one for a "
        "row, and a file starts with a page, keeps a checksum of every record and lets no record touch more pages "
        f"than its size needs. The cache ({CACHE:.0%} of the rows) lies in host memory, with 4 bytes a row of "
        "checksums. Activations and the cache of keys and values are left out: they do not depend on K.",
    ]
    shapes: dict[str, Sequence[Sizes]] = {
        name: all_sizes(model) for name, model in _shapes(analysis.runs).items()
    }
    written: list[Written] = []
    for opened in analysis.runs:
        if opened.num_blocks == 0:
            continue
        V, K, D = opened.weights.shape(TABLES)
        if V * K * D <= MOST_ELEMENTS:
            with finite_rows(opened):
                written += write_all(opened)
        else:
            notes.append(
                f"{opened.label}: no files were written to compare, since its tables have {V * K * D:,} elements "
                f"and at most {MOST_ELEMENTS:,} are."
            )
    tables = {"bytes": bytes_table(shapes)}
    if written:
        tables["files"] = DataTable.of(
            ("run", "format", "computed (bytes)", "file (bytes)"), [astuple(of) for of in written]
        )
    return Section(
        paper=PAPER,
        findings=(
            *(sentence for name, sizes in shapes.items() for sentence in describe(name, sizes)),
            *_compared(written),
        ),
        tables=tables,
        figures={
            f"bytes_{number}": draw(name, sizes, (PAPER_MEMORY, PAPER_DISK) if name == PAPER_NAME else None)
            for number, (name, sizes) in enumerate(shapes.items(), start=1)
        },
        notes=tuple(notes),
    )


def _shapes(runs: Sequence[TrainedRun]) -> dict[str, ModelConfig]:
    """Return the runs' base models, one per shape under the first run's label, and the paper's."""
    found: dict[str, ModelConfig] = {}
    for one in runs:
        if all(_shape(one.config.model) != _shape(other) for other in found.values()):
            found[f"shape of {one.label}"] = one.config.model
    return {**found, PAPER_NAME: PAPER_1B}


def _shape(model: ModelConfig) -> tuple[object, ...]:
    return (
        *(model.vocab_size, model.hidden_size, model.num_layers, model.ffn_hidden_size),
        *(model.num_attention_heads, model.num_query_groups, model.tie_embeddings),
    )


def describe(name: str, sizes: Sequence[Sizes]) -> list[str]:
    """Compare the sizes at the largest K with those at K = 0."""
    base = next(of for of in sizes if of.num_blocks == 0)
    last = max(of.num_blocks for of in sizes)
    most = {of.kind: of for of in sizes if of.num_blocks == last}
    shown = most[SHOWN]
    resident = shown.weights + shown.cache
    files = ", ".join(f"{kind} {_size(of.file)}" for kind, of in most.items())
    return [
        f"{name}: at 8 bit the weights take {_size(base.weights)} at K = 0 and {_size(shown.weights)} at "
        f"K = {last} ({100 * (shown.weights / base.weights - 1):+.2f} %); with the cache of {SHOWN} rows, "
        f"{_size(shown.cache)} of host memory, it is {100 * (resident / base.weights - 1):+.1f} %.",
        f"{name}: on disk the rows take at K = {last}: {files}; {SHOWN}'s elements alone, as the paper counts, "
        f"{_size(shown.codes)}.",
    ]


def _compared(written: Sequence[Written]) -> list[str]:
    if not written:
        return []
    wrong = [of for of in written if of.computed != of.found]
    if not wrong:
        labels = ", ".join(dict.fromkeys(of.label for of in written))
        return [
            f"The {len(written)} files written of the rows of {labels} are as long as computed, to the byte."
        ]
    return [
        f"{of.label}: the file in {of.kind} has {of.found:,} bytes, and {of.computed:,} were computed."
        for of in wrong
    ]


def _size(number: int) -> str:
    return f"{number / 1e9:,.3f} GB" if number >= 1e9 else f"{number / 1e6:,.2f} MB"


def bytes_table(shapes: Shapes) -> DataTable:
    """One row for each shape, K and format."""
    columns = (
        *("shape", "K", "format", "weights at 16 bit (bytes)", "weights at 8 bit (bytes)", "record (bytes)"),
        *("cache, checksums, basis (bytes)", "all rows (bytes)", "file (bytes)", "elements alone (bytes)"),
    )
    rows: list[tuple[Cell, ...]] = [
        (
            *(name, of.num_blocks, of.kind or "none", 2 * of.weights, of.weights, of.record),
            *(of.cache, of.rows, of.file, of.codes or None),
        )
        for name, sizes in shapes.items()
        for of in sizes
    ]
    return DataTable.of(columns, rows)
