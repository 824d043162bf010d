"""Perplexity with the memory's tables truncated to a lower rank (paper, Figure 12).

Each table is truncated by itself, or all of them jointly, and the model that reads them is scored; perplexity is
drawn against the remaining rank and against the bytes it takes.

Matrices are truncated by singular value decomposition through their Gram matrices. The right singular vectors of a
matrix X [V, C] are the eigenvectors of X^T X [C, C], which is accumulated over chunks of rows; X truncated to rank
r is X V_r V_r^T (Eckart and Young). Neither X nor its left factor is ever held whole.

Shapes: A matrices side by side, N rows of a chunk, V vocabulary (rows of a matrix), K blocks, D width, C columns
of a matrix (K D for all tables side by side), r rank.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter
from torch import Tensor

from tide_mega.data.loader import TokenBatch
from tide_mega.export.low_rank import joint_basis
from tide_mega.hf.rows_tide import RowError, RowFormat
from tide_mega.lab import plotting
from tide_mega.lab.figures.analysis import Analysis
from tide_mega.lab.figures.kit import (
    as_stored,
    changed_rows,
    finite_rows,
    missing_texts,
    rise,
    score_texts,
    scored_note,
)
from tide_mega.lab.figures.section import Cell, DataTable, Section
from tide_mega.lab.plotting import line
from tide_mega.metrics.records import TextResult
from tide_mega.model.canonical import TABLES
from tide_mega.trained.model import TrainedModel
from tide_mega.trained.run import StoredWeights, TrainedRun


@dataclass(frozen=True)
class Directions:
    """The right singular vectors of A matrices, in descending order of singular values."""

    vectors_ACC: Tensor
    """Vector i of a matrix is column i; fp32."""
    squares_AC: Tensor
    """Squared singular values, fp64."""

    @classmethod
    def of(cls, chunks: Iterable[Tensor]) -> "Directions":
        """Compute them for matrices given by their rows, in chunks [N, A, C].

        Raises:
            RowError: an element is not finite.
            ValueError: there is no chunk.
        """
        gram_ACC: Tensor | None = None
        for rows_NAC in chunks:
            rows_ANC = rows_NAC.transpose(0, 1).double()
            if gram_ACC is None:
                _, A, C = rows_NAC.shape
                gram_ACC = rows_ANC.new_zeros(A, C, C)
            gram_ACC.baddbmm_(rows_ANC.mT, rows_ANC)
        if gram_ACC is None:
            raise ValueError("a matrix without rows has no directions")
        if not gram_ACC.isfinite().all():
            raise RowError("the tables have rows that are not finite: look at an earlier checkpoint")
        squares_AC, vectors_ACC = torch.linalg.eigh(gram_ACC)
        return cls(vectors_ACC.flip(-1).float(), squares_AC.flip(-1).clamp(min=0))

    def cut(self, rows_NAC: Tensor, rank: int) -> Tensor:
        """Return rows of the matrices truncated to rank r."""
        kept_ACr = self.vectors_ACC[..., :rank]
        return (rows_NAC.transpose(0, 1) @ kept_ACr @ kept_ACr.mT).transpose(0, 1)

    def kept(self, rank: int) -> float:
        """Return the share, 0 to 1, of the squared norm of all matrices that rank r keeps."""
        return float(self.squares_AC[:, :rank].sum() / self.squares_AC.sum())


def rank_of(percent: int, columns: int) -> int:
    """Return ceil((1 - p) * columns), p given in per cent (paper, appendix J.2)."""
    return -(-(100 - percent) * columns // 100)


def factor_elements(rows: int, columns: int, rank: int) -> int:
    """Return the elements of U [V, r] and V [r, C] together."""
    return (rows + columns) * rank


def largest_that_saves(rows: int, columns: int) -> int:
    """Return the largest rank at which U and V have no more elements than the matrix (equation J.2)."""
    return rows * columns // (rows + columns)


PERCENTS = tuple(range(10, 100, 10))
"""p, the reduction of the rank in per cent."""
PER_TABLE, JOINT = "per table", "joint"
_BF16 = 2
"""Bytes."""
MOST_JOINT_COLUMNS = 16_384
"""Of all tables side by side in a joint truncation: the paper's K = 8. Memory grows with their square and time
with their cube (`tide_mega.export.low_rank`)."""


@dataclass(frozen=True)
class Cut:
    """A model with truncated tables."""

    method: str
    """`PER_TABLE` or `JOINT`."""
    percent: int
    """p."""
    rank: int
    """r, of the columns of a table or of all tables side by side."""
    stored: int
    """Bytes of the factors."""
    dense: int
    """Bytes of the full tables."""
    kept: float
    """Share of the squared norm, 0 to 1."""
    by_text: Mapping[str, TextResult]


def cut_tables(
    model: TrainedModel, weights: StoredWeights, texts: Mapping[str, Sequence[TokenBatch]]
) -> list[Cut]:
    """Truncate every E_k by itself, before its norm, as in the paper, to each rank of `PERCENTS`."""
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
    """Truncate all tables jointly, M [V, K D], to each rank of `PERCENTS`, as an export with tables=rank does.

    Rows are truncated after their norms: what is stored is what the layers read.
    """
    V, K, D = weights.shape(TABLES)
    found = joint_basis(_finished(model, weights), rank_of(PERCENTS[0], K * D))
    cuts = []
    for percent in PERCENTS:
        rank = rank_of(percent, K * D)
        form = RowFormat("rank", K, D, rank)
        # A file stores the basis in bf16; the model multiplies by it in its own dtype.
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


_DASHES = {PER_TABLE: "-", JOINT: "--"}
_NAMES = {PER_TABLE: "each table by itself", JOINT: "all tables jointly"}
_PAPER_MARKERS = "x+1"


class Curves(Protocol):
    """The part of `RankCurves` that is drawn."""

    @property
    def label(self) -> str:
        """The run's."""

    @property
    def whole(self) -> Mapping[str, TextResult]:
        """Scores of the model with full tables, by text."""

    @property
    def methods(self) -> list[str]:
        """`PER_TABLE`, `JOINT`."""

    def of(self, method: str) -> list[Cut]:
        """Cuts of a method, the smallest p first."""

    def rise(self, cut: Cut, text: str) -> float:
        """Rise of the perplexity, in per cent."""


def draw(curves: Curves, paper_at_90: Mapping[str, float]) -> Figure:
    """Draw perplexity against p; its rise, with the paper's at 90 %; its rise against the factors' bytes."""
    figure, axes = plotting.panels(3, width=5.4, height=4.6)
    absolute, relative, by_bytes = axes[0]
    for i, (name, whole) in enumerate(curves.whole.items()):
        look = line(i)
        absolute.axhline(whole.perplexity, color=look.colour, linestyle=":", linewidth=1)
        for method in curves.methods:
            cuts = curves.of(method)
            drawn = {
                "color": look.colour,
                "linestyle": _DASHES[method],
                "marker": look.marker,
                "markersize": 4.5,
            }
            percents = [0, *(cut.percent for cut in cuts)]
            rises = [curves.rise(cut, name) for cut in cuts]
            absolute.plot(
                percents, [whole.perplexity, *(cut.by_text[name].perplexity for cut in cuts)], **drawn
            )
            relative.plot(percents, [0.0, *rises], **drawn)
            by_bytes.plot([100 * cut.stored / cut.dense for cut in cuts], rises, **drawn)
    for marker, (name, value) in zip(_PAPER_MARKERS, paper_at_90.items(), strict=True):
        relative.plot(
            [90], [value], linestyle="", marker=marker, color=plotting.GREY, markersize=8, label=name
        )
    plotting.label(
        absolute,
        f"{curves.label}: perplexity (dotted: nothing cut)",
        "reduction of the rank p (%)",
        "perplexity",
    )
    plotting.label(relative, "Rise of perplexity", "reduction of the rank p (%)", "rise (%)")
    plotting.label(
        by_bytes, "Rise against bytes stored", "bytes of the factors, of the tables' in bf16 (%)", "rise (%)"
    )
    relative.legend(frameon=False, fontsize=9, loc="upper left", title="paper, TIDE-8E-1B", title_fontsize=9)
    by_bytes.axvline(100, color=plotting.GREY, linestyle=":", linewidth=1)
    by_bytes.annotate(
        "saves nothing",
        (100, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-3, -4),
        ha="right",
        textcoords="offset points",
        va="top",
        fontsize=8,
        color=plotting.GREY,
    )
    absolute.set_yscale("log")
    absolute.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    absolute.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    _from_zero(relative)
    _from_zero(by_bytes)
    _legend(figure, curves)
    return figure


def _from_zero(axis: Axes) -> None:
    """Make the axis linear up to 1 % and logarithmic beyond."""
    axis.axhline(0, color="black", linewidth=0.8, zorder=0)
    axis.set_yscale("symlog", linthresh=1.0)
    low, high = axis.get_ylim()
    axis.set_ylim(max(low, -2.0) if math.isfinite(low) else -2.0, 2 * max(high, 1.0))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))


def _legend(figure: Figure, curves: Curves) -> None:
    """Add a legend below all panels: texts by colour, methods by dash."""
    handles = [
        Line2D([], [], color=line(i).colour, marker=line(i).marker, linestyle="", label=name)
        for i, name in enumerate(curves.whole)
    ]
    handles += [
        Line2D([], [], color="black", linestyle=_DASHES[method], label=_NAMES[method])
        for method in curves.methods
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False)


PAPER = (
    "TIDE-8E-1B, every table cut by itself: perplexity is flat up to p = 30 % (ranks 2,048 to 1,434, 71 % of the "
    "elements), 10 to 25 % higher at 40 to 60 %, and at 90 % higher by 587 % on WikiText-2, 484 % on DCLM and "
    "657 % on PubMed. Storing (U, V) saves up to rank V d / (V + d) = 2,015 of 2,048."
)
PAPER_AT_90 = {"WikiText-2": 587.0, "DCLM": 484.0, "PubMed": 657.0}
"""Rise of the perplexity at p = 90 %, in per cent."""
CUT_TEXT = (
    "Cut per table: E_k itself, before its norm, so that the norm restores the length of what is left. Cut "
    "jointly: the normalised rows of all tables side by side, as an export with tables=rank stores them. p = 0 is "
    "the whole model."
)


@dataclass(frozen=True)
class RankCurves:
    """The effect of truncation on one run."""

    label: str
    vocab_size: int
    num_blocks: int
    width: int
    whole: Mapping[str, TextResult]
    """Scores of the model with full tables, by text."""
    cuts: Sequence[Cut]

    @property
    def methods(self) -> list[str]:
        """The methods that were run."""
        return [method for method in (PER_TABLE, JOINT) if any(cut.method == method for cut in self.cuts)]

    def of(self, method: str) -> list[Cut]:
        """Return the cuts of a method, the smallest p first."""
        return [cut for cut in self.cuts if cut.method == method]

    def rise(self, cut: Cut, text: str) -> float:
        """Return the rise of a cut's perplexity on a text over the full model's, in per cent."""
        return rise(self.whole[text].loss, cut.by_text[text].loss)


def run(analysis: Analysis) -> Section:
    """Truncate the tables of every run with memory to each rank; score the held-out split and each text file.

    Raises:
        SkippedError: no run has memory, or tables have rows that are not finite.
        ConfigError: a text does not exist.
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
    # A separate function, so that nothing keeps this model alive while the next run's is built.
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
    """Say how perplexity rises, and from which rank the factors are smaller than the tables."""
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
