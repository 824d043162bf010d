"""Texts scored by a model, also where it reads other rows than those of its memory.

Shapes: U distinct token types, N of a chunk of them, K blocks, D width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from tide_mega.data.batch import TokenBatch
from tide_mega.diagnostics.analysis import Analysis, SkippedError
from tide_mega.diagnostics.perplexity.scores import score
from tide_mega.hf.rows_tide import RowError, RowFormat
from tide_mega.metrics.records import TextResult
from tide_mega.trained.model import TrainedModel
from tide_mega.trained.run import CHUNK_ELEMENTS, TrainedRun

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

    Some 128 MB at a time, so that what `change` needs on its way stays small.
    """

    @torch.no_grad()
    def rows_of(ids_U: Tensor) -> Tensor:
        K, D = model.stage.block_shape
        memory_UKD = torch.empty(len(ids_U), K, D, dtype=model.stage.dtype, device=ids_U.device)
        size = max(1, chunk_elements // (K * D))
        for ids_N, memory_NKD in zip(ids_U.split(size), memory_UKD.split(size), strict=True):
            memory_NKD.copy_(change(model.table_rows(ids_N).float()))
        return memory_UKD

    return rows_of


def as_stored(model: TrainedModel, form: RowFormat, basis_rC: Tensor | None = None) -> RowsOf:
    """Return a reader of the model's rows as an export in a format hands them out: finished, encoded, decoded.

    `basis_rC` [r, K D] is that of a joint low rank, on the model's device.
    """

    def change(rows_NKD: Tensor) -> Tensor:
        records_NR = form.encode(model.normalised(rows_NKD), basis_rC)
        return form.decode(records_NR, model.stage.dtype, basis_rC)

    return changed_rows(model, change)


@contextmanager
def finite_rows(run: TrainedRun) -> Iterator[None]:
    """Within it rows that no format can store leave the diagnostic out.

    Raises:
        SkippedError: it names the run.
    """
    try:
        yield
    except RowError as error:
        raise SkippedError(f"it needs finite rows, and of {run.label} {error}") from error


def rise(loss: float, other: float) -> float:
    """Return how much higher, in per cent, the perplexity of another loss is."""
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
    """Say how other texts than the held-out split are added, where there are none."""
    return [] if analysis.options.texts else ["Only the held-out split: texts=[file,...] adds other texts."]
