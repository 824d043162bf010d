"""Reads the weights of a checkpoint saved at any topology: whole tensors in one process, or a model's own part.

Optimizer state is not needed to load a model (`load_weights`).
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from tide_mega.checkpoint.contents import Stored, read
from tide_mega.checkpoint.storage import INDEX_FILE
from tide_mega.config.schema import ModelConfig
from tide_mega.errors import CheckpointError
from tide_mega.files import read_json
from tide_mega.model.canonical import Box, local_weights
from tide_mega.model.stage import TideStage


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return the shape of every stored tensor by name, such as `exp_avg/memory.tables`.

    Raises:
        CheckpointError: the index cannot be read.
    """
    path = folder / INDEX_FILE
    try:
        index = read_json(folder, INDEX_FILE)["tensors"]
        return {name: tuple(entry["shape"]) for name, entry in sorted(index.items())}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error})") from error


def rows(folder: Path, name: str, shape: tuple[int, ...], first: int, last: int) -> Tensor:
    """Read rows [first, last) of one tensor.

    Args:
        folder: the checkpoint.
        name: of the stored tensor.
        shape: of the whole tensor.
        first: the first row.
        last: one past the last row.

    Raises:
        CheckpointError: there is no tensor of this name and shape, or its file cannot be read.
    """
    values = torch.empty(last - first, *shape[1:])
    box = Box(name, shape, (first, *(0,) * (len(shape) - 1)), tuple(values.shape))
    read([Stored(box, values)], folder, None)
    return values


def whole_tensor(folder: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    """Read a whole tensor; see `rows`."""
    return rows(folder, name, shape, 0, shape[0])


def whole_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of every stored tensor, in order of names."""
    for name, shape in shapes(folder).items():
        yield name, whole_tensor(folder, name, shape)


PIECE_ELEMENTS = 2**26
"""Elements read at a time, so that at most 256 MB are needed beside the model."""


@torch.no_grad()
def load_weights(stage: TideStage, config: ModelConfig, folder: Path) -> None:
    """Fill this process's part of a model with the master weights of a checkpoint, rounded to the model's dtype.

    Tables must be parameters of the model (`memory.owners=tensor`). Not collective: each process reads by itself.

    Raises:
        CheckpointError: a tensor is missing or has another shape, or a file cannot be read.
        ValueError: tables are owned outside the model.
    """
    if stage.memory.owned is not None:
        raise ValueError("tables owned outside the model are not loaded here: use memory.owners=tensor")
    for weight in local_weights(stage, config):
        first = 0
        for box in weight.boxes:
            for piece in pieces(box):
                values = torch.empty(piece.size)
                read([Stored(replace(piece, name=f"master/{piece.name}"), values)], folder, None)
                weight.tensor[first : first + piece.size[0]].copy_(values)
                first += piece.size[0]


def pieces(box: Box) -> Iterator[Box]:
    """Cut a box along its first dimension into boxes of at most `PIECE_ELEMENTS` (or of one row)."""
    columns = 1
    for size in box.size[1:]:
        columns *= size
    rows = max(1, PIECE_ELEMENTS // columns)
    for first in range(0, box.size[0], rows):
        size = min(rows, box.size[0] - first)
        yield replace(box, offset=(box.offset[0] + first, *box.offset[1:]), size=(size, *box.size[1:]))
