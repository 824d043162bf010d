"""Files of rows written for a run, to compare their lengths with what was computed.

Shapes: K memory blocks, D width, r rank.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tide_mega.diagnostics.storage.sizes import format_of, sizes_of
from tide_mega.hf.rows_tide import KINDS, finished
from tide_mega.hf.sidecar_tide import write_sidecar
from tide_mega.model.canonical import GAINS, TABLES
from tide_mega.trained.run import TrainedRun

MOST_ELEMENTS = 2**26
"""Of tables for which files are written: 256 MB in fp32."""


@dataclass(frozen=True)
class Written:
    """A file that was written, and what was computed for it."""

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
        # Any orthonormal basis has the length of the best one.
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
