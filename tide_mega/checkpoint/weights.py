"""A model's weights from a checkpoint, without its optimizer and at any topology."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from tide_mega.checkpoint.planners import Stored, read
from tide_mega.config.schema import ModelConfig
from tide_mega.model.canonical import Box, local_weights
from tide_mega.model.stage import TideStage

PIECE_ELEMENTS = 2**26
"""Read at a time: beside the model itself no more than 256 MB are needed."""


@torch.no_grad()
def load_weights(stage: TideStage, config: ModelConfig, folder: Path) -> None:
    """Fill this process's part of a model with the master weights of a checkpoint, rounded to the model's dtype.

    Tables must be among the model's parameters (`memory.owners=tensor`). Processes read by themselves.

    Raises:
        CheckpointError: a tensor is not there, has another shape, or a file cannot be read.
        ValueError: tables owned outside the model.
    """
    if stage.owned is not None:
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
