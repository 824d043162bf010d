"""A checkpoint's tensors in one process, whatever the topology that saved it."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from tide_mega.checkpoint.errors import CheckpointError
from tide_mega.checkpoint.planners import Stored, read
from tide_mega.checkpoint.storage import INDEX_FILE
from tide_mega.config.stored import read_json
from tide_mega.model.canonical import Box


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
    """Read rows first..last of one tensor.

    Args:
        folder: the checkpoint.
        name: of the stored tensor.
        shape: of the whole tensor.
        first: the first row.
        last: one past the last.

    Raises:
        CheckpointError: it is not there with this shape, or its file cannot be read.
    """
    values = torch.empty(last - first, *shape[1:])
    box = Box(name, shape, (first, *(0,) * (len(shape) - 1)), tuple(values.shape))
    read([Stored(box, values)], folder, None)
    return values


def whole_tensor(folder: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    """Read one tensor; see `rows`."""
    return rows(folder, name, shape, 0, shape[0])


def whole_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Read tensor after tensor, by name."""
    for name, shape in shapes(folder).items():
        yield name, whole_tensor(folder, name, shape)
