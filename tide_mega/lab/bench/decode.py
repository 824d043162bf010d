"""Decoders of several K that share one base model of random weights and take turns, a token each, for timing.

CPU and wall time per token are measured, and both as ratios within a turn.

Shapes: T turns, B sequences, V vocabulary, D width, K memory blocks, J = K + 1, G heads of keys and values, S
places of the cache, C head size, U rows of a table held, R bytes of a record.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from tide_mega.hf.memory_tide import MemoryStore, TensorStore
from tide_mega.hf.rows_tide import RowFormat
from tide_mega.inference.decoder import Decoder, Weights
from tide_mega.inference.layers import Layer
from tide_mega.inference.matrices import Matrix, make_matrix
from tide_mega.inference.model_config import ModelShape
from tide_mega.lab.bench.measure import Spread
from tide_mega.parallel.device import DTYPES

_STD = 0.02
_CHUNK_ROWS = 512


@dataclass(frozen=True)
class DecodeCase:
    """The settings shared by all decoders of a comparison."""

    shape: ModelShape
    """Of the base, K = 0."""
    dtype: str
    batch: int
    max_length: int
    device: torch.device


class SharedBase:
    """A base model and its cache, shared by any number of decoders; only one decodes at a time."""

    def __init__(self, case: DecodeCase, *, int8: bool = False) -> None:
        """Draw the weights."""
        self.case, self._int8 = case, int8
        shape = case.shape
        D, F = shape.hidden_size, shape.ffn_hidden_size
        queries, keys = shape.num_heads * shape.head_size, shape.num_groups * shape.head_size
        matrix: Callable[..., Matrix] = partial(make_matrix, rows=case.batch, int8=int8, for_compiler=False)
        cache = (case.batch, shape.num_groups, case.max_length, shape.head_size)
        embedding_VD = self._random(shape.vocab_size, D)
        layers = [
            Layer(
                attention_gain_D=self._ones(D),
                query_key_value=matrix(self._random(queries + 2 * keys, D)),
                output=matrix(self._random(D, queries)),
                ffn_gain_D=self._ones(D),
                gate_up=matrix(self._random(2 * F, D)),
                down=matrix(self._random(D, F)),
                router_JD=None,
                keys_BGSC=torch.zeros(cache, dtype=self._dtype, device=case.device),
                values_BGSC=torch.zeros(cache, dtype=self._dtype, device=case.device),
            )
            for _ in range(shape.num_layers)
        ]
        self._weights = Weights(
            shape=shape,
            embedding_VD=embedding_VD,
            layers=layers,
            final_gain_D=self._ones(D),
            head=matrix(embedding_VD, is_shared=True),
            memory=None,
        )

    def decoder(self, num_blocks: int = 0, memory: MemoryStore | None = None) -> Decoder:
        """Return a decoder with routers for `num_blocks` and a store of their rows."""
        weights = self._weights
        if num_blocks:
            D = weights.shape.hidden_size
            weights = replace(
                weights,
                shape=replace(weights.shape, num_blocks=num_blocks),
                layers=[
                    replace(layer, router_JD=self._random(num_blocks + 1, D).float())
                    for layer in weights.layers
                ],
                memory=memory,
            )
        case = self.case
        return Decoder(weights, case.device, batch=case.batch, max_length=case.max_length)

    @property
    def _dtype(self) -> torch.dtype:
        return DTYPES[self.case.dtype]

    def _random(self, *size: int) -> Tensor:
        return torch.empty(size, device=self.case.device).normal_(0, _STD).to(self._dtype)

    def _ones(self, *size: int) -> Tensor:
        return torch.ones(size, device=self.case.device, dtype=self._dtype)


def random_records(row_format: RowFormat, rows: int) -> Tensor:
    """Return records [rows, R] of rows with mean norm 1; a few hundred distinct ones, repeated."""
    some = min(rows, _CHUNK_ROWS)
    records_UR = row_format.encode(torch.randn(some, row_format.num_blocks, row_format.width))
    return records_UR.repeat(-(-rows // some), 1)[:rows].contiguous()


def table_in_memory(kind: str, num_blocks: int, width: int, rows: int, device: torch.device) -> TensorStore:
    """Return a store of random rows on the device."""
    row_format = RowFormat(kind, num_blocks, width)
    return TensorStore(random_records(row_format, rows).to(device), row_format)


Step = Callable[[Tensor], object]
"""Takes one token per sequence [B]."""


@dataclass
class Turns:
    """Seconds of each turn."""

    cpu: list[float] = field(default_factory=list)
    """CPU seconds of all threads of the process."""
    wall: list[float] = field(default_factory=list)

    def ratio(self, base: "Turns", clock: str) -> Spread:
        """Return the spread, over the turns, of the ratio of this time to the base's in the same turn."""
        pairs = zip(getattr(self, clock), getattr(base, clock), strict=True)
        return Spread.of([own / other for own, other in pairs])

    def median(self, clock: str) -> float:
        """Return the median seconds."""
        return statistics.median(getattr(self, clock))


def take_turns(
    steps: Mapping[str, Step], ids_TB: Tensor, turns: int, warmup: int, is_cuda: bool
) -> dict[str, Turns]:
    """Let every step take one token per turn; the order rotates from turn to turn.

    Args:
        steps: by name.
        ids_TB: tokens, one row per turn, reused cyclically.
        turns: timed turns.
        warmup: untimed turns before.
        is_cuda: whether to synchronise with the device.
    """
    names = list(steps)
    found = {name: Turns() for name in names}
    for turn in range(warmup + turns):
        ids_B = ids_TB[turn % len(ids_TB)]
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            cpu, wall = time.process_time(), time.perf_counter()
            steps[name](ids_B)
            if is_cuda:
                torch.cuda.synchronize()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if turn >= warmup:
                found[name].cpu.append(cpu)
                found[name].wall.append(wall)
    return found
