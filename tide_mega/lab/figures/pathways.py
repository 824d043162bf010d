"""Proposition 3.2: K tables are K pathways for a token's gradient (paper, section 3.3.2, appendix F).

Sums the squared gradients of each token's rows over steps and compares them, by decile, with those of the input
embedding and of the baseline.

Shapes: B sequences, T tokens, V vocabulary, K blocks, D width, U distinct token types of a step.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from tide_mega.data.frequency import NUM_BINS
from tide_mega.data.loader import IGNORE_LABEL, TokenBatch
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.kit import by_run
from tide_mega.lab.figures.section import DataTable, Section
from tide_mega.lab.plotting import Line, decile_axis, label, legend, panels
from tide_mega.trained.model import RowGradients
from tide_mega.trained.run import TrainedRun

TOLERANCE = 1e-12
"""Relative, for float64 sums in different orders."""
PIECE = 256
"""Token types whose gradients are squared at a time."""


@dataclass(eq=False)
class GradientSums:
    """Sums over steps by token type; float64, on the CPU."""

    tables_VK: Tensor
    """Squared norm of the gradient of each table's row."""
    embedding_V: Tensor
    """The same for the input embedding's row, through its path into the first layer only."""
    weakest_V: Tensor
    """The smallest squared norm of any table at any step with the token (G²min of the proposition)."""
    steps_V: Tensor
    """Steps that contain the token."""
    tokens_V: Tensor
    """Occurrences of the token."""
    zeros_V: Tensor
    """Rows, in steps with the token, whose gradient was exactly 0."""
    step_tokens: list[int] = field(default_factory=list)
    """Tokens of each step."""

    @classmethod
    def zero(cls, vocab_size: int, num_blocks: int) -> "GradientSums":
        """Return sums before the first step; at K = 0 for the embedding only."""
        empty = torch.zeros(vocab_size, dtype=torch.float64)
        return cls(
            tables_VK=torch.zeros(vocab_size, num_blocks, dtype=torch.float64),
            embedding_V=empty.clone(),
            weakest_V=torch.full_like(empty, torch.inf),
            steps_V=empty.clone(),
            tokens_V=empty.clone(),
            zeros_V=empty.clone(),
        )

    def add(self, step: RowGradients) -> None:
        """Add one step's gradients."""
        ids_U = step.ids_U.cpu()
        self.step_tokens.append(int(step.counts_U.sum()))
        self.steps_V[ids_U] += 1
        self.tokens_V[ids_U] += step.counts_U.cpu().double()
        self.embedding_V[ids_U] += _squares(step.embedding_UD)
        if step.tables_UKD is None:
            return
        squares_UK = _squares(step.tables_UKD)
        self.tables_VK[ids_U] += squares_UK
        self.weakest_V[ids_U] = torch.minimum(self.weakest_V[ids_U], squares_UK.min(1).values)
        self.zeros_V[ids_U] += (squares_UK == 0).sum(1).double()

    def is_of_the_same_text(self, other: "GradientSums") -> bool:
        """Whether both have steps of equal sizes and equal total counts of every token type."""
        return self.step_tokens == other.step_tokens and torch.equal(
            *(
                torch.stack((of.nonzero()[:, 0].double(), of[of > 0]))
                for of in (self.tokens_V, other.tokens_V)
            )
        )

    @property
    def steps(self) -> int:
        """Steps taken."""
        return len(self.step_tokens)

    @property
    def num_blocks(self) -> int:
        """K."""
        return self.tables_VK.size(1)

    @property
    def total_V(self) -> Tensor:
        """Sum over the tables."""
        return self.tables_VK.sum(1)

    @property
    def smallest_V(self) -> Tensor:
        """K times the smallest table's sum."""
        return self.num_blocks * self.tables_VK.min(1).values

    @property
    def pathways_V(self) -> Tensor:
        """Total over the largest table's sum: 1 (one table has all) to K (all equal); NaN if 0."""
        return self.total_V / self.tables_VK.max(1).values

    @property
    def bound_V(self) -> Tensor:
        """K x steps with the token x G²min (paper, F.5, with the counted instead of the expected steps)."""
        return torch.where(self.steps_V > 0, self.num_blocks * self.steps_V * self.weakest_V, 0.0)

    def below_bound(self) -> int:
        """Count token types whose total is NaN, or less than K times the smallest table's or `bound_V`."""
        most_V = torch.maximum(self.smallest_V, self.bound_V)
        return int((~(self.total_V >= most_V * (1 - TOLERANCE))).sum())


@dataclass(frozen=True)
class OfDecile:
    """Token types of one decile that appeared; means over types unless stated otherwise."""

    decile: int
    types: int
    total: float
    """Squared gradient over the tables, over all steps."""
    smallest: float
    """K times the smallest table's."""
    embedding: float
    """Squared gradient of the input embedding's row."""
    pathways: float
    """Median of `pathways_V`; NaN without memory."""
    steps_seen: float
    """Steps that contain the token, over all types of the decile, including those that did not appear."""
    steps_expected: float
    """Sum over steps of κ, over the same types: κ = 1 - (1 - f)^BT of a step of BT tokens (paper, F.1)."""


def by_decile(sums: GradientSums, bins_V: np.ndarray, counts_V: np.ndarray) -> list[OfDecile]:
    """Average within each decile that has a type which appeared; `counts_V` are of the training text."""
    frequency_V = counts_V / max(1, counts_V.sum())
    expected_V = np.zeros(len(frequency_V))
    for tokens, steps in Counter(sums.step_tokens).items():
        # log1p: 1 - f rounds to 1 for the rarest types of a large corpus.
        expected_V -= steps * np.expm1(tokens * np.log1p(-frequency_V))
    seen_V = sums.steps_V.numpy() > 0
    found = []
    for decile in range(NUM_BINS):
        of_decile = bins_V == decile
        chosen = torch.from_numpy(of_decile & seen_V)
        if not chosen.any():
            continue
        pathways = sums.pathways_V[chosen] if sums.num_blocks else torch.tensor([torch.nan])
        found.append(
            OfDecile(
                decile=decile,
                types=int(chosen.sum()),
                total=float(sums.total_V[chosen].mean()),
                smallest=float(sums.smallest_V[chosen].mean()) if sums.num_blocks else 0.0,
                embedding=float(sums.embedding_V[chosen].mean()),
                pathways=float(pathways.nanmedian()),
                steps_seen=float(sums.steps_V[torch.from_numpy(of_decile)].mean()),
                steps_expected=float(expected_V[of_decile].mean()),
            )
        )
    return found


def _squares(gradient: Tensor) -> Tensor:
    # In pieces: a whole step's gradients in fp64 would exceed the memory of the computation itself.
    return torch.cat([rows.double().square().sum(-1) for rows in gradient.split(PIECE)]).cpu()


@dataclass(frozen=True)
class Measured:
    """One run."""

    label: str
    sums: GradientSums
    deciles: list[OfDecile]


def measure(analysis: Analysis, one: TrainedRun) -> Measured:
    """Treat each held-out microbatch as a step; only full sequences, since padding is not text."""
    model = analysis.model(one)
    sums = GradientSums.zero(one.config.model.vocab_size, one.num_blocks)
    for batch in analysis.held_out(one):
        is_whole_B = (batch.labels_BT != IGNORE_LABEL).all(1)
        if is_whole_B.any():
            sums.add(model.row_gradients(TokenBatch(*(x_BT[is_whole_B] for x_BT in batch))))
    return Measured(one.label, sums, by_decile(sums, one.bins, one.counts))


def ratio(value: float, to: float | None) -> float | None:
    """Divide; None if the divisor is missing or 0."""
    return value / to if to else None


def embeddings_before(one: Measured, base: Measured | None) -> dict[int, float]:
    """Return the baseline's squared embedding gradient by decile; empty if it saw other text."""
    if base is None or not one.sums.is_of_the_same_text(base.sums):
        return {}
    return {row.decile: row.embedding for row in base.deciles}


def ratios(one: Measured, base: Measured | None) -> tuple[list[float], list[float]]:
    """Return the tables' squared gradient over the own and the baseline's embedding's, by decile; NaN without."""
    before = embeddings_before(one, base)
    own = [ratio(row.total, row.embedding) or math.nan for row in one.deciles]
    return own, [ratio(row.total, before.get(row.decile)) or math.nan for row in one.deciles]


def draw(memory: Sequence[Measured], base: Measured | None, looks: Mapping[str, Line]) -> Figure:
    """Draw squared gradients, pathways, ratios to embeddings, and steps, by decile; `looks` by label."""
    if not any(embeddings_before(one, base) for one in memory):
        base = None
    figure, axes = panels(2, 2, width=6.0, height=4.6)
    gradients, pathways, shares, steps = axes.flat
    for one in memory:
        look, blocks = looks[one.label], one.sums.num_blocks
        solid = {"marker": look.marker, "color": look.colour, "markersize": 5}
        x = [row.decile for row in one.deciles]
        gradients.plot(
            x, [_positive(row.total) for row in one.deciles], label=f"{one.label}, tables", **solid
        )
        gradients.plot(x, [_positive(row.smallest) for row in one.deciles], ":", color=look.colour)
        pathways.plot(x, [row.pathways for row in one.deciles], label=f"{one.label} (K = {blocks})", **solid)
        pathways.axhline(blocks, color=look.colour, linestyle=":", linewidth=1)
        own, against = ratios(one, base)
        shares.plot(x, own, **solid)
        if base is not None:
            shares.plot(x, against, "--", **solid, markerfacecolor="white")
    _generic(gradients, ":", "K x least table")
    _generic(pathways, ":", "K")
    _generic(shares, "o-", "to its own embedding")
    if base is not None:
        _generic(shares, "o--", f"to that of {base.label}")
        x = [row.decile for row in base.deciles]
        y = [_positive(row.embedding) for row in base.deciles]
        look = looks[base.label]
        gradients.plot(
            x, y, look.dash, marker=look.marker, color=look.colour, label=f"{base.label}, embedding"
        )
    first, look = memory[0].deciles, looks[memory[0].label]
    x = [row.decile for row in first]
    steps.plot(
        x, [_positive(row.steps_seen) for row in first], f"{look.marker}-", color=look.colour, label="seen"
    )
    expected = [_positive(row.steps_expected) for row in first]
    steps.plot(
        x,
        expected,
        f"{look.marker}--",
        color=look.colour,
        markerfacecolor="white",
        label="expected, κ of each step",
    )
    for axis in (gradients, shares, steps):
        axis.set_yscale("log")
        axis.margins(y=0.15)  # room for the names of the roles
    pathways.set_ylim(bottom=1, top=1.15 * max(one.sums.num_blocks for one in memory))
    titles = (
        (gradients, "Squared gradient of a type's rows", "sum over steps, mean over types (nats²)"),
        (pathways, "Pathways in effect", "all tables / strongest table (1 to K)"),
        (shares, "Tables against the input embedding", "squared gradient, ratio"),
        (steps, f"Steps with a type, of {memory[0].sums.steps}, {memory[0].label}", "mean over types"),
    )
    for axis, title, y_label in titles:
        decile_axis(axis, "token")
        label(axis, title, axis.get_xlabel(), y_label)
        legend(axis, inside=2 if axis is steps or axis is shares else 0)
    return figure


def _generic(axis: Axes, form: str, text: str) -> None:
    """Add the meaning of a line style, whatever its colour, to the legend."""
    axis.plot([], [], form, color="black", markerfacecolor="white" if form == "o--" else None, label=text)


def _positive(value: float) -> float:
    return value if value > 0 else math.nan


PAPER = (
    "The expected squared gradient that a token's rows receive over τ steps, summed over the K tables, is at "
    "least "
    "K τ κ G²min: K times the bound of a single table. κ = 1 - (1 - f)^BT is the chance that a step has the "
    "token, and "
    "G²min the least squared gradient of a row whose token is in the step, assumed to be above 0."
)


def run(analysis: Analysis) -> Section:
    """Differentiate the loss of held-out microbatches by the rows they read; see `Section`."""
    memory = [measure(analysis, one) for one in analysis.with_memory]
    base = measure(analysis, analysis.base) if analysis.base is not None else None
    if not memory[0].deciles:
        raise SkippedError("it needs held-out text with token types of a frequency decile")
    findings = [sentence for one in memory for sentence in describe(one, base)]
    findings.append(describe_steps(memory[0]))
    return Section(
        paper=PAPER,
        findings=tuple(findings),
        tables={"deciles": decile_table(memory, base), "tables": table_table(memory)},
        figures={"gradients": draw(memory, base, analysis.looks)},
        notes=(
            f"Steps are held-out microbatches of whole sequences ({sizes_of(memory)}) through the trained "
            "model, which stays as it is; gradients are of a microbatch's mean loss, by rows before their "
            "norm.",
            "That the total is at least K times the least table's is arithmetic; how equal the tables are, "
            "and "
            "whether every row's gradient is above 0, is measured.",
            "κ is for tokens drawn one by one: real text repeats its words, so fewer steps have a type.",
            "The input embedding's gradient is of its path into the first layer; tied output weights have "
            "another. "
            "Rows of tables pass a norm and embedding rows do not, so their gradients have different scales, "
            "and Adam "
            "divides each by its own size: a K-fold squared gradient is not a K-fold update.",
            *apart(memory, base),
        ),
    )


def sizes_of(memory: Sequence[Measured]) -> str:
    """Say how many steps there are and how many tokens they have; by run if these differ."""
    said = {}
    for one in memory:
        tokens = one.sums.step_tokens
        size = " to ".join(f"{n:,}" for n in sorted({min(tokens, default=0), max(tokens, default=0)}))
        said[one.label] = f"{len(tokens)} of {size} tokens"
    return by_run(said)


def apart(memory: Sequence[Measured], base: Measured | None) -> list[str]:
    """Name the runs whose sums are over other steps than the baseline's."""
    names = [one.label for one in memory if base is not None and not one.sums.is_of_the_same_text(base.sums)]
    if base is None or not names:
        return []
    return [
        f"{', '.join(names)}: the steps have other tokens, or another number of them, than those of "
        f"{base.label}, so the sums are not compared with its embedding's."
    ]


def describe(one: Measured, base: Measured | None) -> list[str]:
    """Say whether the bound holds, whether gradients vanish, and how many effective pathways there are."""
    sums, num_blocks = one.sums, one.sums.num_blocks
    types, wrong = int((sums.steps_V > 0).sum()), sums.below_bound()
    holds = (
        f"for each of the {types:,} token types in the steps the total over the tables is at least K times "
        "that of "
        "the least table, and K x steps x G²min"
        if not wrong
        else f"for {wrong:,} of {types:,} token types the total is LESS than the bound: the sums are wrong"
    )
    rows = num_blocks * int(sums.steps_V.sum())
    zeros = int(sums.zeros_V.sum())
    vanished = (
        f"none of {rows:,} rows, one for each table, step and token type, had a gradient of 0"
        if not zeros
        else f"{zeros:,} of {rows:,} rows, one for each table, step and token type, had a gradient of "
        "exactly 0"
    )
    findings = [f"{one.label} (K = {num_blocks}): {holds}; {vanished}."]
    pathways = sums.pathways_V[sums.steps_V > 0].nanmedian()
    sentence = (
        f"{one.label}: the total is {float(pathways):.2f} times that of the strongest table (median; 1 if "
        "one table had "
        f"all, {num_blocks} if all had the same)"
    )
    if one.deciles:
        first, last = one.deciles[0], one.deciles[-1]
        sentence += (
            f", {first.pathways:.2f} in decile {first.decile} and {last.pathways:.2f} in decile {last.decile}"
        )
    findings.append(sentence + ".")
    findings.append(_against_embedding(one, base))
    return [finding for finding in findings if finding]


def describe_steps(one: Measured) -> str:
    """Compare how often types appeared with what their training frequency predicts."""
    rows = [row for row in one.deciles if row.steps_expected > 0]
    each = ", ".join(f"{row.decile}: {row.steps_seen:.2f} ({row.steps_expected:.2f})" for row in rows)
    return (
        f"Steps with a token, of {one.sums.steps}, mean by decile (expected from its count in training): "
        f"{each}."
    )


def decile_table(memory: Sequence[Measured], base: Measured | None) -> DataTable:
    """One row for each run and decile."""
    columns = (
        *("run", "decile", "token types seen", "squared gradient, all tables (nats²)"),
        *("K x least table (nats²)", "median pathways (1 to K)", "input embedding (nats²)"),
        *("all tables / own embedding", "all tables / baseline's embedding", "steps seen", "steps expected"),
    )
    rows = [
        (
            *(one.label, row.decile, row.types, row.total, row.smallest, row.pathways, row.embedding),
            *(ratio(row.total, row.embedding), ratio(row.total, before.get(row.decile))),
            *(row.steps_seen, row.steps_expected),
        )
        for one in memory
        for before in [embeddings_before(one, base)]
        for row in one.deciles
    ]
    return DataTable.of(columns, rows)


def table_table(memory: Sequence[Measured]) -> DataTable:
    """One row for each table: its share of the squared gradient."""
    rows = []
    for one in memory:
        of_tables = one.sums.tables_VK.sum(0)
        total = float(of_tables.sum())
        rows += [(one.label, k, float(of), ratio(100 * float(of), total)) for k, of in enumerate(of_tables)]
    return DataTable.of(("run", "table", "squared gradient, all types (nats²)", "share (%)"), rows)


def _against_embedding(one: Measured, base: Measured | None) -> str:
    parts = []
    for row, own, other in list(zip(one.deciles, *ratios(one, base), strict=True))[
        :: len(one.deciles) - 1 or 1
    ]:
        if math.isnan(own):
            continue
        part = f"decile {row.decile} {own:.3g} times its own"
        if base is not None and math.isfinite(other):
            part += f" and {other:.3g} times {base.label}'s"
        parts.append(part)
    return (
        f"{one.label}: all tables against the input embedding's squared gradient: {', '.join(parts)}."
        if parts
        else ""
    )
