"""A keyed pseudo-random permutation of 0 … n-1 that is computed, not stored.

A Feistel network permutes the smallest power of four that holds n; values that leave the range are sent
through it again until they are back (cycle walking), fewer than four times on average.
"""

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 8


class Permutation:
    """A bijection of range(n), chosen by `seed` and `epoch`."""

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        if not 1 <= n <= 2**60:
            raise ValueError(f"a permutation of {n} values: it must be within 1 to 2^60")
        self._n = np.uint64(n)
        self._half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        digest = blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, positions: NDArray[np.integer]) -> NDArray[np.int64]:
        """The values at `positions` (each in range(n)), of the same shape."""
        values = self._shuffle(positions.astype(np.uint64))
        while (outside := values >= self._n).any():
            values[outside] = self._shuffle(values[outside])
        return values.astype(np.int64)

    def _shuffle(self, values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = values >> self._half_bits, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return (left << self._half_bits) | right


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijective scrambling of 64 bits: multiplications modulo 2^64 and shifts (MurmurHash3's finaliser)."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))
