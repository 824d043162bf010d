"""Bytes in memory and on disk for K = 0 to 24, of the runs' shapes and of the paper's (paper, Figure 4)."""

from collections.abc import Mapping, Sequence
from dataclasses import astuple

from tide_mega.config.schema import ModelConfig
from tide_mega.diagnostics.analysis import Analysis
from tide_mega.diagnostics.other_rows import finite_rows
from tide_mega.diagnostics.section import Cell, DataTable, Section
from tide_mega.diagnostics.storage.files import MOST_ELEMENTS, Written, write_all
from tide_mega.diagnostics.storage.plot import SHOWN, draw
from tide_mega.diagnostics.storage.sizes import CACHE, PAPER_1B, Sizes, all_sizes
from tide_mega.model.canonical import TABLES
from tide_mega.trained.run import TrainedRun

PAPER = (
    "With the tables quantised to 4 bit and on an SSD, every TIDE-1B model needs the memory of LLaMA-Base-1B, "
    "1.03 GB at 8 bit, while the SSD's share grows from 0 to 3.152 GB at K = 24."
)
PAPER_MEMORY, PAPER_DISK = 1.03e9, 3.152e9
PAPER_NAME = "paper's 1B"

Shapes = Mapping[str, Sequence[Sizes]]


def run(analysis: Analysis) -> Section:
    """Compute what each shape takes, and write files of the rows of small runs to compare.

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
    """Return the runs' base models, one of each shape by the first run's label, and the paper's."""
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
    """Say what the largest K takes beside K = 0."""
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
