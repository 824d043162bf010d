"""Perplexity by the precision of the memory's tables (paper, Table 5).

Texts are scored with the rows that an export stores in each format. The cost of a format is given for every text,
and for rare, mid and common tokens.

Shapes: V vocabulary, K memory blocks, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tide_mega.data.frequency import BIN_GROUPS
from tide_mega.data.loader import TokenBatch
from tide_mega.hf.rows_tide import RowFormat
from tide_mega.lab import plotting
from tide_mega.lab.figures.analysis import Analysis
from tide_mega.lab.figures.kit import as_stored, finite_rows, missing_texts, rise, score_texts, scored_note
from tide_mega.lab.figures.section import Cell, DataTable, Section
from tide_mega.lab.plotting import line
from tide_mega.metrics.records import TextResult
from tide_mega.trained.model import TrainedModel

TRAINED = "fp32"
"""The tables as trained, the reference of the comparison."""
STORED = ("bf16", "int8", "int4", "nf4")
"""Formats of finished rows; lower ranks are the subject of Figure 12."""


@dataclass(frozen=True)
class Precisions:
    """Scores of one run with its tables in every format."""

    label: str
    num_blocks: int
    """K."""
    stored: Mapping[str, int]
    """Bytes of all rows, by format."""
    by_format: Mapping[str, Mapping[str, TextResult]]
    """By format, `TRAINED` first, and text."""

    @property
    def texts(self) -> list[str]:
        """Names of the texts, the held-out split first."""
        return list(self.by_format[TRAINED])

    def rise(self, kind: str, text: str) -> float:
        """Return the rise of the perplexity over that of the trained tables, in per cent."""
        return rise(self.by_format[TRAINED][text].loss, self.by_format[kind][text].loss)


def measure(label: str, model: TrainedModel, texts: Mapping[str, Sequence[TokenBatch]]) -> Precisions:
    """Score the texts with the model's own rows, and with those of each of `STORED`."""
    K, D = model.stage.memory.block_shape
    forms = {kind: RowFormat(kind, K, D) for kind in (TRAINED, *STORED)}
    by_format = {TRAINED: score_texts(model, texts)}
    by_format |= {kind: score_texts(model, texts, as_stored(model, forms[kind])) for kind in STORED}
    stored = {kind: model.config.model.vocab_size * form.record_bytes for kind, form in forms.items()}
    return Precisions(label, K, stored, by_format)


_GROUP_WIDTH = 0.8


def draw(of: Precisions, paper: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw the rise of perplexity by text beside the paper's (left) and the change of loss by frequency (right).

    `paper` has rises in per cent, by format and text.
    """
    figure, (axes,) = plotting.panels(2, width=6.2, height=4.6)
    by_text, by_role = axes
    heights = {text: [of.rise(kind, text) for kind in STORED] for text in of.texts}
    _bars(by_text, heights)
    first = True
    for place, kind in enumerate(STORED):
        for value in paper.get(kind, {}).values():
            by_text.plot(
                [place], [value], "x", color="black", markersize=7, label="paper, K = 8" if first else None
            )
            first = False
    plotting.label(
        by_text, f"{of.label}: rise of perplexity over fp32", "precision of the tables", "rise (%)"
    )
    text = of.texts[0]
    whole = of.by_format[TRAINED][text]
    changes = {
        role: [getattr(of.by_format[kind][text], role) - getattr(whole, role) for kind in STORED]
        for role in BIN_GROUPS
        if getattr(whole, role) is not None
    }
    _bars(by_role, changes)
    plotting.label(
        by_role,
        f"{of.label}, {text}: loss by frequency",
        "precision of the tables",
        "change of the loss (nats)",
    )
    for axis in axes:
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(STORED)), STORED)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=9, loc="upper left")
    return figure


def _bars(axis: Axes, heights: Mapping[str, list[float]]) -> None:
    """Draw the bars of all series side by side for every format."""
    width = _GROUP_WIDTH / max(1, len(heights))
    for i, (name, values) in enumerate(heights.items()):
        left = -_GROUP_WIDTH / 2 + width * (i + 0.5)
        places = [place + left for place in range(len(values))]
        axis.bar(places, values, width=0.9 * width, color=line(i).colour, label=name)


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
"""With tables in 16, 8 and 4 bit."""
ROWS_NOTE = (
    "Every row is normalised with its gain folded in, in fp32, then encoded and decoded as an export stores and "
    "serves it: int8 with a scale a row, int4 with one for 32 elements, nf4 for 64. fp32 is the model as trained. "
    "Bytes are those of all records, scales included; the paper counts elements alone."
)


def run(analysis: Analysis) -> Section:
    """Score the held-out split and each text file with the tables of every run with memory in each format.

    Raises:
        SkippedError: no run has memory, or tables have rows that are not finite.
        ConfigError: a text does not exist.
        DataError: a text cannot be read.
    """
    found = []
    for opened in analysis.with_memory:
        with finite_rows(opened):
            # No variable for the model: nothing may keep it alive while the next one is built.
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
    """Say what each format costs on each text and, on the first, for which tokens."""
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
    """Return the paper's rises over 16 bit, in per cent, by format and text."""
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
