"""Shared by several figures: groups of token types, stored tables, scored texts, cautions about runs.

Runs with different base models differ by more than their memory, which a caution states. Token types are grouped
by frequency: those of each decile, of rare, mid and common, and those outside the deciles, which are never mixed
in. Tables are read in chunks of rows, the input embedding beside the memory's tables. Texts can be scored with
other rows in place of the memory's own.

Shapes: V vocabulary, N rows or token types of a chunk, U distinct token types, D width, K blocks, A = K + 1 tables
(the input embedding E first), R bytes of a record, r rank, C = K D.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tide_mega.data.frequency import BIN_GROUPS, DROPPED, NUM_BINS, UNSEEN
from tide_mega.data.loader import TokenBatch
from tide_mega.hf.rows_tide import RowError, RowFormat
from tide_mega.lab.figures.analysis import Analysis, SkippedError
from tide_mega.lab.figures.perplexity_curves import score
from tide_mega.metrics.deciles import SLOTS
from tide_mega.metrics.records import TextResult
from tide_mega.model.canonical import GAINS, TABLES
from tide_mega.trained.model import TrainedModel
from tide_mega.trained.run import CHUNK_ELEMENTS, StoredWeights, TrainedRun


def difference(run: TrainedRun, first: TrainedRun) -> str:
    """Return how a run's base model differs from the first's, `num_layers 3 instead of 2, ...`; "" if equal."""
    mine, other = run.config.model, first.config.model
    return ", ".join(
        f"{field.name} {getattr(mine, field.name)} instead of {getattr(other, field.name)}"
        for field in fields(mine)
        if field.name != "name" and getattr(mine, field.name) != getattr(other, field.name)
    )


def unlike(runs: Sequence[TrainedRun]) -> dict[str, str]:
    """Return by label the `difference` of runs from the first one, which is the baseline where there is one."""
    differences = {run.label: difference(run, runs[0]) for run in runs}
    return {label: what for label, what in differences.items() if what}


def caution(runs: Sequence[TrainedRun]) -> list[str]:
    """Return a caution if runs do not have the first one's base model."""
    found = unlike(runs)
    if not found:
        return []
    each = "; ".join(f"{label} has {what}" for label, what in found.items())
    return [
        f"CAUTION: the runs do not all have the base model of {runs[0].label}, so they differ by more than their "
        f"memory: {each}."
    ]


Ids = NDArray[np.intp]

DECILE_SLOTS = SLOTS[:NUM_BINS]
ROLE_OF = {str(decile): role for role, deciles in BIN_GROUPS.items() for decile in deciles}
"""rare, mid or common, of a decile's slot."""


def by_slot(bins_V: NDArray[np.integer]) -> dict[str, Ids]:
    """Return the ids of each of `SLOTS`: the deciles, dropped, unseen; every type is in exactly one."""
    bins = [*range(NUM_BINS), DROPPED, UNSEEN]
    return {slot: np.flatnonzero(bins_V == b) for slot, b in zip(SLOTS, bins, strict=True)}


def by_role(bins_V: NDArray[np.integer]) -> dict[str, Ids]:
    """Return the ids of the rare, mid and common types."""
    return {role: np.flatnonzero(np.isin(bins_V, list(bins))) for role, bins in BIN_GROUPS.items()}


def occurring(bins_V: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Return which types occur in the training text, those of no decile included [V]."""
    return bins_V != UNSEEN


def by_run(said: Mapping[str, str]) -> str:
    """Merge a text given by run label: once if all are equal, else run by run."""
    if len(set(said.values())) == 1:
        return next(iter(said.values()))
    return ", ".join(f"{label} {each}" for label, each in said.items())


EMBEDDING = "embedding.weight"

Chunks = Iterable[tuple[int, Tensor]]
"""(first row, rows) of a table, from the first row on."""


def table_names(num_blocks: int) -> list[str]:
    """Return E, E_1, ..., E_K."""
    return ["E", *(f"E_{k + 1}" for k in range(num_blocks))]


def side_by_side(weights: StoredWeights) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, rows [N, A, D]) of E and the memory's tables, some 150 MB at a time."""
    for first, tables_NKD in weights.chunks(TABLES):
        N, K, D = tables_NKD.shape
        rows_NAD = torch.empty(N, K + 1, D)
        rows_NAD[:, 1:] = tables_NKD
        del tables_NKD
        rows_NAD[:, 0] = weights.rows(EMBEDDING, first, first + N)
        yield first, rows_NAD


def to_unit(rows_NAD: Tensor, ids_N: Sequence[int]) -> Tensor:
    """Divide rows by their norms, in place; zero rows stay zero.

    Raises:
        SkippedError: a row is not finite; `ids_N` are the token types that rows belong to.
    """
    # First by the largest element: squares of very small or large elements leave the range of fp32.
    for order in (float("inf"), 2.0):
        norm_NA = torch.linalg.vector_norm(rows_NAD, order, dim=-1, keepdim=True)
        if not norm_NA.isfinite().all():
            v, a, _ = (~norm_NA.isfinite()).nonzero()[0].tolist()
            name = table_names(a)[-1]
            raise SkippedError(f"row {ids_N[v]} of {name} is not finite: look at an earlier checkpoint")
        rows_NAD /= torch.where(norm_NA > 0, norm_NA, 1.0)
    return rows_NAD


def row_norms(chunks: Chunks) -> NDArray[np.float32]:
    """Return the l2 norm of every row: [V] of [N, D] chunks, [V, K] of [N, K, D] chunks."""
    return np.concatenate([torch.linalg.vector_norm(rows, dim=-1).numpy() for _, rows in chunks])


def gains_note(run: TrainedRun) -> str:
    """Say that E_k is compared, not M_k, and how much the norm's gains could matter."""
    gains_KD = run.weights.tensor(GAINS)
    spread = float((gains_KD.std(1, correction=0) / gains_KD.abs().mean(1).clamp_min(1e-30)).max())
    return (
        f"{run.label}: rows of the tables E_k are compared. In M_k = RMSNorm(E_k) each column is also "
        "multiplied by a gain, the same for all rows; over columns the gains vary by at most "
        f"{100 * spread:.1f} % of their mean (standard deviation), so directions differ little where that is "
        "small."
    )


def file_names(labels: Iterable[str]) -> dict[str, str]:
    """Return a different name for each label, of characters that any file system takes."""
    names: dict[str, str] = {}
    for label in labels:
        plain = name = re.sub(r"[^A-Za-z0-9._-]+", "-", label) or "run"
        number = 2
        while name in names.values():
            name, number = f"{plain}-{number}", number + 1
        names[label] = name
    return names


RowsOf = Callable[[Tensor], Tensor]
"""What `TrainedModel.reading` takes: M [U, K, D] of distinct ids [U]."""


def score_texts(
    model: TrainedModel, texts: Mapping[str, Sequence[TokenBatch]], rows_of: RowsOf | None = None
) -> dict[str, TextResult]:
    """Score every text, with other rows in place of the memory's if they are given."""
    if rows_of is None:
        return {name: score(model, batches, 0) for name, batches in texts.items()}
    with model.reading(rows_of):
        return {name: score(model, batches, 0) for name, batches in texts.items()}


def changed_rows(
    model: TrainedModel, change: Callable[[Tensor], Tensor], *, chunk_elements: int = CHUNK_ELEMENTS
) -> RowsOf:
    """Return a reader of the model's tables that makes rows M [N, K, D] of rows E [N, K, D], fp32, by `change`.

    Some 128 MB at a time, which bounds the temporaries of `change`.
    """

    @torch.no_grad()
    def rows_of(ids_U: Tensor) -> Tensor:
        K, D = model.stage.memory.block_shape
        memory_UKD = torch.empty(len(ids_U), K, D, dtype=model.stage.dtype, device=ids_U.device)
        size = max(1, chunk_elements // (K * D))
        for ids_N, memory_NKD in zip(ids_U.split(size), memory_UKD.split(size), strict=True):
            memory_NKD.copy_(change(model.table_rows(ids_N).float()))
        return memory_UKD

    return rows_of


def as_stored(model: TrainedModel, form: RowFormat, basis_rC: Tensor | None = None) -> RowsOf:
    """Return a reader of the model's rows as exported in a format: finished, encoded and decoded.

    `basis_rC` [r, K D] is that of a joint low rank, on the model's device.
    """

    def change(rows_NKD: Tensor) -> Tensor:
        records_NR = form.encode(model.normalised(rows_NKD), basis_rC)
        return form.decode(records_NR, model.stage.dtype, basis_rC)

    return changed_rows(model, change)


@contextmanager
def finite_rows(run: TrainedRun) -> Iterator[None]:
    """Context that turns rows which no format can store into a skipped diagnostic.

    Raises:
        SkippedError: a row cannot be stored; the message names the run.
    """
    try:
        yield
    except RowError as error:
        raise SkippedError(f"it needs finite rows, and of {run.label} {error}") from error


def rise(loss: float, other: float) -> float:
    """Return the rise of the perplexity from `loss` to `other`, in per cent."""
    with np.errstate(over="ignore"):
        return float(100 * np.expm1(other - loss))


def scored_note(tokens: Mapping[tuple[str, str], int]) -> str:
    """Say how many tokens were scored, given by run and text."""
    by_run: dict[str, list[str]] = {}
    for (label, name), number in tokens.items():
        by_run.setdefault(label, []).append(f"{number:,} of {name}")
    each = {label: ", ".join(of_texts) for label, of_texts in by_run.items()}
    if len(set(each.values())) == 1:
        return f"Tokens scored: {next(iter(each.values()))}."
    return f"Tokens scored: {'; '.join(f'{label} {of_texts}' for label, of_texts in each.items())}."


def missing_texts(analysis: Analysis) -> list[str]:
    """Say how to add texts if there is only the held-out split."""
    return [] if analysis.options.texts else ["Only the held-out split: texts=[file,...] adds other texts."]
