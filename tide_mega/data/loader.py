"""Batches of training and validation sequences, in a global order that does not depend on the number of ranks.

The order of the training windows is a keyed pseudo-random permutation of 0 … n-1 that is computed and not stored
(`Permutation`): a Feistel network permutes the smallest power of four that holds n, and values outside the range
are sent through it again until they are inside (cycle walking), fewer than four times on average.

Dimensions: B sequences, T tokens.
"""

import logging
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tide_mega.data.stream import TokenStream
from tide_mega.errors import ConfigError, DataError, UnreadableShardError

log = logging.getLogger(__name__)


IGNORE_LABEL = -1
"""The label of a position with nothing to predict (padding)."""

_ROUNDS = 8
_FEEDER = "QueueFeederThread"
_JOIN_SECONDS = 5.0
_MOST_DRAWS = 1000
"""Maximum number of windows tried in place of one that cannot be read."""


class TokenBatch(NamedTuple):
    """One micro-batch of a data-parallel rank."""

    tokens_BT: Tensor
    """int64 token ids."""
    labels_BT: Tensor
    """int64 ids of the next tokens, or IGNORE_LABEL."""


class Permutation:
    """A pseudo-random bijection of range(n), keyed by `seed` and `epoch`."""

    def __init__(self, n: int, seed: int, epoch: int) -> None:
        if not 1 <= n <= 2**60:
            raise ValueError(f"a permutation of {n} values: it must be within 1 to 2^60")
        self._n = np.uint64(n)
        self._half_bits = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
        self._mask = np.uint64((1 << int(self._half_bits)) - 1)
        digest = blake2b(f"{seed}/{epoch}".encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def __call__(self, positions: NDArray[np.integer]) -> NDArray[np.int64]:
        """Return the values at `positions` (each in range(n)), of the same shape."""
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
    """Mix 64 bits bijectively, by multiplications modulo 2^64 and shifts (MurmurHash3's finaliser)."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


_OTHER_SEED = 2**32
"""Offset between the seeds of successive replacement draws."""


@dataclass(frozen=True)
class _Loaded:
    """What a loader process returns."""

    batch: TokenBatch
    left_out: dict[str, int]
    """Unreadable windows that were replaced, by shard."""


class TrainBatches(Iterator[TokenBatch]):
    """The endless micro-batches of one rank; `close` ends its loader processes."""

    def __init__(self, dataset: "_TrainDataset", sampler: "_MicroBatchSampler", num_workers: int) -> None:
        loader: DataLoader[_Loaded | DataError] = DataLoader(
            dataset,
            batch_size=None,  # the sampler's items are whole micro-batches
            sampler=sampler,
            num_workers=num_workers,
            prefetch_factor=4 if num_workers else None,
            worker_init_fn=_ignore_signals if num_workers else None,
            generator=torch.Generator(),  # its own: opening a loader, as each resume does, draws a number
        )
        before = set(threading.enumerate())
        self._batches: Iterator[_Loaded | DataError] | None = iter(loader)
        self._left_out: Counter[str] = Counter()
        # Each queue to a loader process has a feeder thread, which cannot be joined through torch.
        self._feeders = [
            thread for thread in threading.enumerate() if thread not in before and thread.name == _FEEDER
        ]

    def __next__(self) -> TokenBatch:
        """Return the next micro-batch.

        Raises:
            StopIteration: `close` was called.
            DataError: a shard can no longer be read and `on_bad_shard` is fail, or hardly any window can be read.
        """
        if self._batches is None:
            raise StopIteration
        loaded = next(self._batches)
        if isinstance(loaded, DataError):
            raise loaded
        self._left_out.update(loaded.left_out)
        return loaded.batch

    def take_left_out(self) -> dict[str, int]:
        """Return the unreadable windows of the batches since the last call, by shard."""
        taken, self._left_out = self._left_out, Counter()
        return dict(taken)

    def close(self) -> None:
        """Stop the loader processes and their queues; nothing is left running."""
        batches, self._batches = self._batches, None
        shut_down = getattr(batches, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()
        for thread in self._feeders:
            thread.join(_JOIN_SECONDS)
        self._feeders = []

    def __enter__(self) -> "TrainBatches":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def train_batches(
    stream: TokenStream,
    *,
    seed: int,
    first_sample: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp_size: int,
    num_workers: int,
) -> TrainBatches:
    """Return the endless training micro-batches of rank `dp_rank`.

    Optimizer step t takes the samples first_sample + [t G, (t + 1) G), whatever `dp_size` is; rank r takes the
    r-th contiguous part of them, G / dp_size / micro_batch_size micro-batches.

    Args:
        stream: the training split.
        seed: chooses the order of the windows, a new one each epoch.
        first_sample: samples consumed so far, over all ranks.
        global_batch_size: G, sequences in an optimizer step over all ranks.
        micro_batch_size: B.
        dp_rank: this data-parallel rank.
        dp_size: data-parallel ranks.
        num_workers: loader processes; 0 reads in this one.

    Raises:
        ConfigError: G is not a multiple of B times `dp_size`, or a number is out of range.
        DataError: the stream is shorter than one window.
    """
    _check_rank(dp_rank, dp_size, micro_batch_size)
    if global_batch_size < 1 or global_batch_size % (micro_batch_size * dp_size):
        raise ConfigError(
            f"trainer.global_batch_size={global_batch_size} is no multiple of micro_batch_size "
            f"{micro_batch_size} x {dp_size} data-parallel ranks"
        )
    if first_sample < 0:
        raise ConfigError(f"first_sample={first_sample} must not be negative")
    if len(stream) < 1:
        raise DataError(
            f"the {stream.split} split holds {stream.num_tokens:,} tokens, fewer than one sequence of "
            f"data.seq_length={stream.seq_length} and its last label; prepare more text or lower seq_length"
        )
    sampler = _MicroBatchSampler(first_sample, global_batch_size, micro_batch_size, dp_rank, dp_size)
    return TrainBatches(_TrainDataset(stream, seed), sampler, num_workers)


def validation_batches(
    stream: TokenStream, *, seed: int, sequences: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> Iterator[TokenBatch]:
    """Return the validation micro-batches of rank `dp_rank`: the same windows in every evaluation.

    Every rank gets the same number of full micro-batches; rows and tails without a token to predict are padded
    with EOS and `IGNORE_LABEL`. Over all ranks each window occurs exactly once.

    Args:
        stream: the held-out split, including its last, shorter window.
        seed: chooses which windows come first.
        sequences: number of windows over all ranks; 0 means all.
        micro_batch_size: B.
        dp_rank: this data-parallel rank.
        dp_size: data-parallel ranks.

    Raises:
        ConfigError: a number is out of range.
    """
    _check_rank(dp_rank, dp_size, micro_batch_size)
    if sequences < 0:
        raise ConfigError(f"trainer.eval_sequences={sequences} must be 0 (all) or positive")
    return _validation_batches(stream, seed, sequences, micro_batch_size, dp_rank, dp_size)


def _validation_batches(
    stream: TokenStream, seed: int, sequences: int, micro_batch_size: int, dp_rank: int, dp_size: int
) -> Iterator[TokenBatch]:
    available = -(-(stream.num_tokens - 1) // stream.seq_length)
    count = min(sequences, available) if sequences else available
    order = Permutation(available, seed, epoch=0)
    rows = dp_size * micro_batch_size
    for step in range(-(-count // rows)):
        first = step * rows + dp_rank * micro_batch_size
        chosen = order(np.arange(first, max(first, min(first + micro_batch_size, count))))
        yield _batch(stream, chosen, micro_batch_size)


def _batch(stream: TokenStream, windows: np.ndarray, rows: int) -> TokenBatch:
    tokens_BT = torch.full((rows, stream.seq_length), stream.eos_id, dtype=torch.int64)
    labels_BT = torch.full((rows, stream.seq_length), IGNORE_LABEL, dtype=torch.int64)
    for row, i in enumerate(windows.tolist()):
        try:
            window = torch.from_numpy(stream.window(i))
        except UnreadableShardError as error:
            if not stream.skips_bad:
                raise
            _say_once(f"{error}: its held-out windows are left out")
            continue  # the row keeps no labels, so it has no weight
        tokens_BT[row, : len(window) - 1] = window[:-1]
        labels_BT[row, : len(window) - 1] = window[1:]
    return TokenBatch(tokens_BT, labels_BT)


class _TrainDataset(Dataset["_Loaded | DataError"]):
    """Maps an array of sample numbers to their batch, or to a `DataError`.

    The error is returned and not raised: torch would replace its message with the loader process's traceback.
    """

    def __init__(self, stream: TokenStream, seed: int) -> None:
        self._stream = stream
        self._seed = seed

    def __getitem__(self, samples: np.ndarray) -> _Loaded | DataError:
        left_out: Counter[str] = Counter()
        try:
            windows = [self._window(sample, left_out) for sample in samples.tolist()]
        except DataError as error:
            return error
        windows_BT1 = torch.from_numpy(np.stack(windows))
        batch = TokenBatch(windows_BT1[:, :-1].contiguous(), windows_BT1[:, 1:].contiguous())
        return _Loaded(batch, dict(left_out))

    def _window(self, sample: int, left_out: Counter[str]) -> NDArray[np.int64]:
        """Return the tokens [T + 1] of a sample; if its window had to be replaced, it is counted in `left_out`."""
        n = len(self._stream)
        epoch, place = divmod(sample, n)
        for draw in range(_MOST_DRAWS):
            order = _permutation(n, self._seed + draw * _OTHER_SEED, epoch)
            try:
                return self._stream.window(order(np.array([place])).item())
            except UnreadableShardError as error:
                if not self._stream.skips_bad:
                    raise
                _say_once(f"{error}: other windows take the place of its own")
                if draw == 0:
                    left_out[error.shard] += 1
        raise DataError(
            f"of {_MOST_DRAWS} windows of the {self._stream.split} split drawn at random none can be read: bring "
            "the shards back that the log names, and start again"
        )


@lru_cache(maxsize=4096)
def _say_once(problem: str) -> None:
    log.warning("%s", problem)


@lru_cache(maxsize=16)
def _permutation(n: int, seed: int, epoch: int) -> Permutation:
    return Permutation(n, seed, epoch)


class _MicroBatchSampler(Sampler[np.ndarray]):
    """Yields the sample numbers of each micro-batch of a rank, endlessly."""

    def __init__(
        self, first_sample: int, global_batch: int, micro_batch: int, dp_rank: int, dp_size: int
    ) -> None:
        self._first_sample = first_sample
        self._global_batch = global_batch
        self._micro_batch = micro_batch
        share = global_batch // dp_size
        self._share = range(dp_rank * share, (dp_rank + 1) * share, micro_batch)

    def __iter__(self) -> Iterator[np.ndarray]:
        step_start = self._first_sample
        while True:
            for offset in self._share:
                yield np.arange(step_start + offset, step_start + offset + self._micro_batch)
            step_start += self._global_batch


def _ignore_signals(_: int) -> None:
    """Ignore a job's signals: the training process handles them and stops its loader processes itself."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _check_rank(dp_rank: int, dp_size: int, micro_batch_size: int) -> None:
    if not 0 <= dp_rank < dp_size:
        raise ConfigError(f"data-parallel rank {dp_rank} is not below the data-parallel size {dp_size}")
    if micro_batch_size < 1:
        raise ConfigError(f"trainer.micro_batch_size={micro_batch_size} must be at least 1")
