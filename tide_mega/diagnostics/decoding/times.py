"""Steps of several models taken by turns, and what their times come to.

Shapes: V vocabulary.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

BURST = 8
"""Tokens that a model decodes before the next one's turn: what slows the machine meets them all alike."""


LEAST_LENGTH = 4
"""Of a text: half of it is two bursts."""


class Decodes(Protocol):
    """What is timed of a decoder (`tide_mega.inference.decoder.Decoder`)."""

    def prefill(self, ids: Sequence[Sequence[int]], /) -> Tensor:
        """Begin anew with prompts; return logits [1, V]."""

    def step(self, ids_B: Tensor, /) -> Tensor:
        """Add a token; return logits [1, V]."""

    def close(self) -> None:
        """Let go of files."""


@dataclass(frozen=True)
class Contestant:
    """A model that is timed."""

    label: str
    num_blocks: int
    """K."""
    place: str
    """Where its rows lie; "" at K = 0."""
    open: Callable[[], Decodes]

    @property
    def name(self) -> str:
        """Label and place."""
        return f"{self.label}, {self.place}" if self.place else self.label


@dataclass(frozen=True)
class Times:
    """Milliseconds of single steps, by burst."""

    label: str
    num_blocks: int
    place: str
    by_burst: tuple[tuple[float, ...], ...]

    @property
    def name(self) -> str:
        """Label and place."""
        return f"{self.label}, {self.place}" if self.place else self.label

    @property
    def all(self) -> list[float]:
        """Of every burst."""
        return [ms for burst in self.by_burst for ms in burst]

    @property
    def median(self) -> float:
        """Over all steps."""
        return statistics.median(self.all)

    def percentile(self, percent: float) -> float:
        """Return what so many per cent of the steps took at most."""
        return float(np.percentile(self.all, percent))

    def ratios(self, base: "Times") -> "Ratios":
        """Compare with the baseline, burst by burst of the same tokens at about the same time."""
        each = [
            statistics.median(mine) / statistics.median(theirs)
            for mine, theirs in zip(self.by_burst, base.by_burst, strict=True)
        ]
        return Ratios(*(float(np.percentile(each, percent)) for percent in (25, 50, 75)))


@dataclass(frozen=True)
class Ratios:
    """Of the medians of bursts to the baseline's."""

    quarter: float
    """A quarter of them are smaller."""
    median: float
    three_quarters: float


def take_turns(
    contestants: Sequence[Contestant],
    texts: Sequence[Sequence[int]],
    tokens: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Times]:
    """Let every model decode at least `tokens` tokens of texts, a burst at a time, in an order that rotates.

    All models are open together. Each reads the first half of a text and then its tokens one by one, as a step
    has to wait for the token before it; the token it would choose itself is found too. The first burst of a text
    is not counted: it fills caches.

    Args:
        contestants: the models.
        texts: ids of text, as many in each, `LEAST_LENGTH` or more; taken in order, and again from the first.
        tokens: timed steps of each.
        clock: seconds.
    """
    half = len(texts[0]) // 2
    burst = min(BURST, half // 2)
    bursts = -(-tokens // burst)
    found: list[list[tuple[float, ...]]] = [[] for _ in contestants]
    with ExitStack() as opened:
        decoders = [opened.enter_context(closing(contestant.open())) for contestant in contestants]
        for text in itertools.cycle(texts):
            for decoder in decoders:
                decoder.prefill([text[:half]])
            for number, first in enumerate(range(half, len(text) - burst + 1, burst)):
                for turn in range(len(decoders)):
                    which = (number + turn) % len(decoders)
                    taken = _timed(decoders[which], text[first : first + burst], clock)
                    if number:
                        found[which].append(taken)
                if len(found[0]) == bursts:
                    return [
                        Times(one.label, one.num_blocks, one.place, tuple(by_burst))
                        for one, by_burst in zip(contestants, found, strict=True)
                    ]
    raise AssertionError("texts are taken again until there are enough tokens")


def _timed(decoder: Decodes, ids: Sequence[int], clock: Callable[[], float]) -> tuple[float, ...]:
    taken = []
    for token in ids:
        ids_1 = torch.tensor([token])
        start = clock()
        int(decoder.step(ids_1).argmax())  # waits for the device
        taken.append(1e3 * (clock() - start))
    return tuple(taken)
