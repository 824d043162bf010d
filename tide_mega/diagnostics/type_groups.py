"""Token types by frequency: those of each decile, of rare, mid and common, and those outside, never mixed.

Shapes: V vocabulary.
"""

import numpy as np
from numpy.typing import NDArray

from tide_mega.data.frequency import BIN_GROUPS, DROPPED, NUM_BINS, UNSEEN
from tide_mega.metrics.slots import SLOTS

Ids = NDArray[np.intp]

DECILE_SLOTS = SLOTS[:NUM_BINS]
ROLE_OF = {str(decile): role for role, deciles in BIN_GROUPS.items() for decile in deciles}
"""rare, mid or common, of a decile's slot."""


def by_slot(bins_V: NDArray[np.integer]) -> dict[str, Ids]:
    """Return the ids of each of `SLOTS`: the deciles, dropped, unseen; every type is in exactly one."""
    bins = [*range(NUM_BINS), DROPPED, UNSEEN]
    return {slot: np.flatnonzero(bins_V == b) for slot, b in zip(SLOTS, bins, strict=True)}


def by_role(bins_V: NDArray[np.integer]) -> dict[str, Ids]:
    """Return the ids of the rare, mid and common types."""
    return {role: np.flatnonzero(np.isin(bins_V, list(bins))) for role, bins in BIN_GROUPS.items()}


def occurring(bins_V: NDArray[np.integer]) -> NDArray[np.bool_]:
    """Return which types occur in the training text, those of no decile included [V]."""
    return bins_V != UNSEEN
