"""Distances between hidden states of two tokens in the same place, layer by layer (Figures 2 and 6).

Shapes: L layers, W words, D width, P pairs, S tokens up to and including the slot, R sequences.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tide_mega.diagnostics.separation.pairs import ChosenPairs

TOKENS_PER_SEQUENCE = 128
"""What one of the sequences of a forward pass may hold, in short ones laid side by side."""


@dataclass(frozen=True)
class Separation:
    """Distances in one category and one model."""

    distance_PL: NDArray[np.float64]
    """Mean |h_u - h_v| over the templates."""
    norm_L: NDArray[np.float64]
    """Mean |h| over words and templates."""
    templates: int

    @property
    def mean_L(self) -> NDArray[np.float64]:
        """Mean over the pairs."""
        return self.distance_PL.mean(0)

    @property
    def relative_L(self) -> NDArray[np.float64]:
        """The same as a part of the mean norm of that layer's states, which differs between models."""
        return self.mean_L / np.maximum(self.norm_L, np.finfo(np.float64).tiny)


def measure_separation(states: Iterable[Tensor], pairs: list[tuple[int, int]]) -> Separation:
    """Average over templates.

    Args:
        states: of each template, the hidden states h [L, W, D] of the words in the slot.
        pairs: which two of the W words each.

    Raises:
        ValueError: there is no template or no pair.
    """
    index_2P = torch.tensor(pairs).T
    distances, norms = [], []
    for h_LWD in states:
        h_LWD = h_LWD.double()
        first_P, second_P = index_2P.to(h_LWD.device)
        distances.append((h_LWD[:, first_P] - h_LWD[:, second_P]).norm(dim=-1).T.cpu())
        norms.append(h_LWD.norm(dim=-1).mean(1).cpu())
    if not distances or not pairs:
        raise ValueError(f"{len(pairs)} pairs in {len(distances)} templates: there is nothing to average")
    return Separation(
        torch.stack(distances).mean(0).numpy(), torch.stack(norms).mean(0).numpy(), len(distances)
    )


def slot_states(
    look: Callable[[Tensor], Tensor], chosen: ChosenPairs, templates: int, start_id: int, sequences: int
) -> Iterator[Tensor]:
    """Yield the states [L, W, D] of the category's words in the slot of each template.

    Sentences end at the slot: no layer sees what follows. Each begins with `start_id`, as a document does.

    Args:
        look: from tokens [R, S] to the hidden states [L, R, S, D].
        chosen: words and contexts.
        templates: how many of them.
        start_id: the end-of-document token.
        sequences: of `TOKENS_PER_SEQUENCE`, whose tokens a forward pass may hold.
    """
    words = torch.from_numpy(chosen.ids_W)
    by_length: dict[int, list[NDArray[np.int64]]] = {}
    for context in chosen.contexts[:templates]:
        by_length.setdefault(len(context), []).append(context)
    for length, contexts in by_length.items():
        rows = max(1, sequences * TOKENS_PER_SEQUENCE // (length + 2))
        together = max(1, rows // len(words))
        for first in range(0, len(contexts), together):
            few = torch.from_numpy(np.stack(contexts[first : first + together]))
            tokens_RS = torch.cat(
                [
                    torch.full((len(few) * len(words), 1), start_id),
                    few.repeat_interleave(len(words), 0),
                    words.repeat(len(few))[:, None],
                ],
                dim=1,
            )
            last_LRD = torch.cat([look(part)[:, :, -1].cpu() for part in tokens_RS.split(rows)], dim=1)
            yield from last_LRD.split(len(words), dim=1)
