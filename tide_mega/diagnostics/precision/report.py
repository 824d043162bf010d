"""Perplexity by the precision of the memory's tables (paper, Table 5)."""

from collections.abc import Sequence

from tide_mega.data.frequency import BIN_GROUPS
from tide_mega.diagnostics.analysis import Analysis
from tide_mega.diagnostics.other_rows import finite_rows, missing_texts, scored_note
from tide_mega.diagnostics.precision.measure import STORED, TRAINED, Precisions, measure
from tide_mega.diagnostics.precision.plot import draw
from tide_mega.diagnostics.section import Cell, DataTable, Section

PAPER = (
    "TIDE-8E-1B with tables of 16, 8 and 4 bit (4.20, 2.10, 1.05 GB) has a perplexity of 10.088, 10.089 and "
    "10.263 on WikiText-2, 11.100, 11.100 and 11.277 on PubMed, 16.108, 16.113 and 16.343 on DCLM: nothing is "
    "lost at 8 bit, 1.5 to 1.7 % at 4."
)
PAPER_PERPLEXITIES = {
    "bf16": {"WikiText-2": 10.088, "PubMed": 11.100, "DCLM": 16.108},
    "int8": {"WikiText-2": 10.089, "PubMed": 11.100, "DCLM": 16.113},
    "int4": {"WikiText-2": 10.263, "PubMed": 11.277, "DCLM": 16.343},
}
"""Of tables in 16, 8 and 4 bit."""
ROWS_NOTE = (
    "Every row is normalised with its gain folded in, in fp32, then encoded and decoded as an export stores and "
    "serves it: int8 with a scale a row, int4 with one for 32 elements, nf4 for 64. fp32 is the model as trained. "
    "Bytes are those of all records, scales included; the paper counts elements alone."
)


def run(analysis: Analysis) -> Section:
    """Score the held-out split and each text file with the tables of every run with memory in each format.

    Raises:
        SkippedError: no run has memory, or tables have rows that are not finite.
        ConfigError: a text is not there.
        DataError: a text cannot be read.
    """
    found = []
    for opened in analysis.with_memory:
        with finite_rows(opened):
            # No name for the model: nothing may hold it while the next one is built.
            found.append(measure(opened.label, analysis.model(opened), analysis.texts(opened)))
    notes = [ROWS_NOTE]
    if analysis.options.precision != "fp32":
        notes.append(
            f"precision={analysis.options.precision}: the trained tables are rounded to it before anything else, "
            "and rows again once they are decoded, which an export from the checkpoint does not do."
        )
    tokens = {
        (of.label, name): result.tokens for of in found for name, result in of.by_format[TRAINED].items()
    }
    return Section(
        paper=PAPER,
        findings=tuple(sentence for of in found for sentence in describe(of)),
        tables={"by_precision": by_precision(found), "paper": _paper()},
        figures={f"precision_{number}": draw(of, paper_rises()) for number, of in enumerate(found, start=1)},
        notes=(*notes, scored_note(tokens), *missing_texts(analysis)),
    )


def describe(of: Precisions) -> list[str]:
    """Say what each format costs on each text, and to whom on the first."""
    found = []
    for text in of.texts:
        rises = ", ".join(f"{kind} {of.rise(kind, text):+.2f} %" for kind in STORED)
        whole = of.by_format[TRAINED][text].perplexity
        found.append(f"{of.label}, {text}: perplexity {whole:,.3f} in fp32; {rises}.")
    sizes = ", ".join(
        f"{kind} {size / 1e6:,.1f} MB ({100 * size / of.stored['bf16']:.0f} %)"
        for kind, size in of.stored.items()
    )
    found.append(f"{of.label}: the rows take {sizes}; per cent are of bf16.")
    text = of.texts[0]
    for kind in ("int4", "nf4"):
        changes = ", ".join(
            f"{role} {getattr(of.by_format[kind][text], role) - before:+.5f}"
            for role in BIN_GROUPS
            if (before := getattr(of.by_format[TRAINED][text], role)) is not None
        )
        if changes:
            found.append(f"{of.label}, {text}: {kind} changes the loss by {changes} nats.")
    return found


def by_precision(found: Sequence[Precisions]) -> DataTable:
    """One row for each run, text and format."""
    columns = (
        *(
            "run",
            "K",
            "text",
            "tables",
            "bytes",
            "loss (nats per token)",
            "perplexity",
            "rise of perplexity (%)",
        ),
        *(f"{role} loss (nats)" for role in BIN_GROUPS),
    )
    rows: list[tuple[Cell, ...]] = [
        (
            *(of.label, of.num_blocks, text, kind, of.stored[kind], result.loss, result.perplexity),
            of.rise(kind, text),
            *(getattr(result, role) for role in BIN_GROUPS),
        )
        for of in found
        for text in of.texts
        for kind, by_text in of.by_format.items()
        for result in [by_text[text]]
    ]
    return DataTable.of(columns, rows)


def paper_rises() -> dict[str, dict[str, float]]:
    """Return the paper's rises over 16 bit, per cent, by format and text."""
    before = PAPER_PERPLEXITIES["bf16"]
    return {
        kind: {text: 100 * (value / before[text] - 1) for text, value in by_text.items()}
        for kind, by_text in PAPER_PERPLEXITIES.items()
    }


def _paper() -> DataTable:
    rises = paper_rises()
    return DataTable.of(
        ("text", "tables", "perplexity", "rise of perplexity (%)"),
        [
            (text, kind, value, rises[kind][text])
            for kind, by_text in PAPER_PERPLEXITIES.items()
            for text, value in by_text.items()
        ],
    )
