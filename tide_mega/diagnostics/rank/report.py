"""Perplexity with the tables cut to a lower rank (paper, Figure 12)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tide_mega.diagnostics.analysis import Analysis
from tide_mega.diagnostics.other_rows import finite_rows, missing_texts, rise, score_texts, scored_note
from tide_mega.diagnostics.rank.cuts import JOINT, MOST_JOINT_COLUMNS, PER_TABLE, Cut, cut_jointly, cut_tables
from tide_mega.diagnostics.rank.directions import largest_that_saves
from tide_mega.diagnostics.rank.plot import draw
from tide_mega.diagnostics.section import Cell, DataTable, Section
from tide_mega.metrics.records import TextResult
from tide_mega.trained.run import TrainedRun

PAPER = (
    "TIDE-8E-1B, every table cut by itself: perplexity is flat up to p = 30 % (ranks 2,048 to 1,434, 71 % of the "
    "elements), 10 to 25 % higher at 40 to 60 %, and at 90 % higher by 587 % on WikiText-2, 484 % on DCLM and "
    "657 % on PubMed. Storing (U, V) saves up to rank V d / (V + d) = 2,015 of 2,048."
)
PAPER_AT_90 = {"WikiText-2": 587.0, "DCLM": 484.0, "PubMed": 657.0}
"""Rise of the perplexity at p = 90 %, per cent."""
CUT_TEXT = (
    "Cut per table: E_k itself, before its norm, so that the norm restores the length of what is left. Cut "
    "jointly: the normalised rows of all tables side by side, as an export with tables=rank stores them. p = 0 is "
    "the whole model."
)


@dataclass(frozen=True)
class RankCurves:
    """What cutting does to one run."""

    label: str
    vocab_size: int
    num_blocks: int
    width: int
    whole: Mapping[str, TextResult]
    """Of the model as it is, by text."""
    cuts: Sequence[Cut]

    @property
    def methods(self) -> list[str]:
        """Those that there are."""
        return [method for method in (PER_TABLE, JOINT) if any(cut.method == method for cut in self.cuts)]

    def of(self, method: str) -> list[Cut]:
        """Return the cuts of a method, the smallest p first."""
        return [cut for cut in self.cuts if cut.method == method]

    def rise(self, cut: Cut, text: str) -> float:
        """Return by how much, in per cent, a cut's perplexity on a text is above the whole model's."""
        return rise(self.whole[text].loss, cut.by_text[text].loss)


def run(analysis: Analysis) -> Section:
    """Cut the tables of every run with memory to each rank and score the held-out split and each text file.

    Raises:
        SkippedError: no run has memory, or tables have rows that are not finite.
        ConfigError: a text is not there.
        DataError: a text cannot be read.
    """
    notes = [CUT_TEXT]
    found = [_measure(analysis, opened, notes) for opened in analysis.with_memory]
    tokens = {(of.label, name): result.tokens for of in found for name, result in of.whole.items()}
    return Section(
        paper=PAPER,
        findings=tuple(sentence for of in found for sentence in describe(of)),
        tables={"by_rank": by_rank(found), "paper": _paper()},
        figures={f"rank_{number}": draw(of, PAPER_AT_90) for number, of in enumerate(found, start=1)},
        notes=(*notes, scored_note(tokens), *missing_texts(analysis)),
    )


def _measure(analysis: Analysis, opened: TrainedRun, notes: list[str]) -> RankCurves:
    # A function of its own, so that nothing holds this model while the next run's is built.
    model, weights, texts = analysis.model(opened), opened.weights, analysis.texts(opened)
    shape = opened.config.model.vocab_size, opened.num_blocks, opened.config.model.hidden_size
    whole = score_texts(model, texts)
    with finite_rows(opened):
        cuts = cut_tables(model, weights, texts)
    if (columns := shape[1] * shape[2]) <= MOST_JOINT_COLUMNS:
        with finite_rows(opened):
            cuts += cut_jointly(model, weights, texts)
    else:
        notes.append(
            f"{opened.label}: not cut jointly, since all tables side by side have {columns:,} columns and at most "
            f"{MOST_JOINT_COLUMNS:,} are decomposed."
        )
    return RankCurves(opened.label, *shape, whole, cuts)


def describe(of: RankCurves) -> list[str]:
    """Say how perplexity rises, and from where factors take less room than the tables."""
    found = []
    for name, whole in of.whole.items():
        rises = "; ".join(
            f"{_METHOD[method]} {', '.join(_at(of, cut, name) for cut in of.of(method) if cut.percent in _SAID)}"
            for method in of.methods
        )
        found.append(f"{of.label}, {name}: perplexity {whole.perplexity:,.2f} rises: {rises}.")
    V, K, D = of.vocab_size, of.num_blocks, of.width
    saves = f"U and V of a table have fewer elements than it up to rank {largest_that_saves(V, D):,} of {D:,}"
    if JOINT in of.methods:
        saves += f", those of all tables side by side up to {largest_that_saves(V, K * D):,} of {K * D:,}"
    found.append(f"{of.label}: {saves}.")
    held_out = next(iter(of.whole))
    for method in of.methods:
        cheap = [cut for cut in of.of(method) if cut.stored < cut.dense and of.rise(cut, held_out) <= 1]
        if cheap:
            least = min(cheap, key=lambda cut: cut.stored)
            found.append(
                f"{of.label}: with at most 1 % more perplexity on {held_out}, the tables {_METHOD[method]} need "
                f"{100 * least.stored / least.dense:.0f} % of their bytes in bf16 (p = {least.percent} %)."
            )
        else:
            found.append(
                f"{of.label}: the tables {_METHOD[method]} save no bytes at 1 % more perplexity on {held_out} "
                "or less."
            )
    return found


_SAID = (30, 50, 70, 90)
_METHOD = {PER_TABLE: "cut one by one", JOINT: "cut jointly"}


def _at(of: RankCurves, cut: Cut, text: str) -> str:
    return f"{of.rise(cut, text):+,.1f} % at p = {cut.percent} %"


def by_rank(found: Sequence[RankCurves]) -> DataTable:
    """One row for each cut and text."""
    columns = (
        *("run", "text", "cut", "p (%)", "rank", "bytes", "of the bytes in bf16 (%)"),
        *("squared norm kept (%)", "loss (nats per token)", "perplexity", "rise of perplexity (%)"),
    )
    rows: list[tuple[Cell, ...]] = []
    for of in found:
        V, K, D = of.vocab_size, of.num_blocks, of.width
        for name, whole in of.whole.items():
            rows.append(
                (of.label, name, "none", 0, D, 2 * V * K * D, 100.0, 100.0, whole.loss, whole.perplexity, 0.0)
            )
            rows += [
                (
                    *(of.label, name, cut.method, cut.percent, cut.rank, cut.stored),
                    *(100 * cut.stored / cut.dense, 100 * cut.kept, cut.by_text[name].loss),
                    *(cut.by_text[name].perplexity, of.rise(cut, name)),
                )
                for cut in of.cuts
            ]
    return DataTable.of(columns, rows)


def _paper() -> DataTable:
    return DataTable.of(
        ("text", "p (%)", "rise of perplexity (%)"),
        [(name, 90, value) for name, value in PAPER_AT_90.items()],
    )
