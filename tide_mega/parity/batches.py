"""The tokens of a parity run, the same for the topology and its reference.

Shapes: B sequences, T tokens.
"""

import torch

from tide_mega.data.batch import TokenBatch
from tide_mega.parity.case import MICRO_BATCH, SEQUENCE, Case


def batches_of_step(case: Case, step: int) -> list[TokenBatch]:
    """Return the whole step's microbatches [B, T], those of data-parallel rank 0 first."""
    generator = torch.Generator().manual_seed(1000 + step)
    # Few types and an uneven distribution: repeated ids, ids at shard edges, most rows untouched.
    draws = torch.rand(case.data * case.accumulation, MICRO_BATCH, SEQUENCE + 1, generator=generator)
    tokens = (draws.pow(2) * case.vocab_size).long().to(case.device)
    return [TokenBatch(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in tokens]


def batches_of_rank(case: Case, data_rank: int, step: int) -> list[TokenBatch]:
    """Return the microbatches of one data-parallel rank."""
    return batches_of_step(case, step)[data_rank * case.accumulation :][: case.accumulation]
