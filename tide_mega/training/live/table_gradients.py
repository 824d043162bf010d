"""The gradient norm of each memory table, wherever its gradient is kept.

Shapes: K blocks, W rows kept here, D width.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from tide_mega.memory.ranges import row_squares, sum_by_block
from tide_mega.model.stage import TideStage
from tide_mega.parallel.engine import Engine
from tide_mega.training.optimizer import TABLES


def table_square_norms(engine: Engine, device: torch.device) -> Tensor:
    """Return the squared L2 norm of each table's whole reduced gradient [K], fp64; collective over the world.

    After `accumulate` and before `step`, so before clipping. Every element has one process that counts it: its
    owner, or the data-parallel rank in whose ZeRO range it lies. Not finite where the gradient is not.
    """
    stage: TideStage = engine.module
    blocks, width = stage.block_shape
    squares_K = torch.zeros(blocks, dtype=torch.float64, device=device)
    if stage.owned is not None:
        squares_K += stage.owned.square_norms()
    elif stage.memory is not None:
        for part in engine.gradient_ranges(TABLES):
            squares_K += sum_by_block(*row_squares(part.values, part.start, width), blocks)
    dist.all_reduce(squares_K)
    return squares_K
