"""Frequency deciles of the training corpus (the paper's appendix B).

b(v) = min(floor(rank(v) / |V_clean| * 10), 9), where rank counts from 0 in ascending order of frequency over the
clean types that occur. Dimensions: V vocabulary.
"""

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tide_mega.data.tokenizer import Tokenizer
from tide_mega.errors import DataError
from tide_mega.files import atomic_writer, parse_json, write_json

NUM_BINS = 10
DROPPED = -1
UNSEEN = -2
BIN_GROUPS: dict[str, range] = {"rare": range(3), "mid": range(3, 7), "common": range(7, 10)}


@dataclass(frozen=True)
class DecileTable:
    """The decile of every token type."""

    bin_of_type: NDArray[np.int8]
    """[V]: 0 (rarest) to 9; `DROPPED` for special, whitespace and punctuation tokens; `UNSEEN` for types of any
    kind that do not occur."""
    count_ranges: list[tuple[int, int] | None]
    """Smallest and largest count in each bin; None for an empty bin."""
    types_per_bin: list[int]
    tokens_per_bin: list[int]
    dropped_types: int
    dropped_tokens: int
    unseen_types: int

    @classmethod
    def from_counts(cls, counts: NDArray[np.integer], tokenizer: Tokenizer) -> "DecileTable":
        """Bin the types of a corpus.

        Args:
            counts: [V] occurrences of each token in the training corpus.
            tokenizer: gives the special tokens and the text of each token.

        Raises:
            DataError: `counts` is not of length V.
        """
        if counts.shape != (tokenizer.vocab_size,):
            raise DataError(
                f"token counts have shape {counts.shape}, not ({tokenizer.vocab_size},) as the tokenizer's; "
                "they belong to another tokenizer"
            )
        return cls.from_filter(
            counts, lambda v: v not in tokenizer.special_ids and is_content(tokenizer.token_bytes(v))
        )

    @classmethod
    def from_filter(cls, counts: NDArray[np.integer], is_clean: Callable[[int], bool]) -> "DecileTable":
        """Bin the types of `counts` [V] that occur and for which `is_clean(id)` is true."""
        counts = counts.astype(np.int64)
        seen = np.flatnonzero(counts)
        clean = np.array([v for v in seen.tolist() if is_clean(v)], dtype=np.int64)
        # Stable sort: types of equal count stay in order of their ids.
        ranked = clean[np.argsort(counts[clean], kind="stable")]
        bins = np.minimum(np.arange(len(ranked)) * NUM_BINS // max(len(ranked), 1), NUM_BINS - 1)
        bin_of_type = np.full(len(counts), UNSEEN, np.int8)
        bin_of_type[seen] = DROPPED
        bin_of_type[ranked] = bins
        members = [counts[ranked[bins == b]] for b in range(NUM_BINS)]
        dropped = bin_of_type == DROPPED
        return cls(
            bin_of_type=bin_of_type,
            count_ranges=[(int(of_bin[0]), int(of_bin[-1])) if len(of_bin) else None for of_bin in members],
            types_per_bin=[len(of_bin) for of_bin in members],
            tokens_per_bin=[int(of_bin.sum()) for of_bin in members],
            dropped_types=int(dropped.sum()),
            dropped_tokens=int(counts[dropped].sum()),
            unseen_types=int((bin_of_type == UNSEEN).sum()),
        )

    def save(self, folder: Path | str) -> None:
        """Write `deciles.npy` (the bins) and `deciles.json` (the rest) to `folder`."""
        folder = Path(folder)
        with atomic_writer(folder / "deciles.npy") as file:
            np.save(file, self.bin_of_type, allow_pickle=False)
        summary = {name: value for name, value in self.__dict__.items() if name != "bin_of_type"}
        write_json(folder / "deciles.json", summary)

    @classmethod
    def load(cls, folder: Path | str) -> "DecileTable":
        """Read the files that `save` wrote.

        Raises:
            DataError: a file is missing or damaged.
        """
        folder = Path(folder)
        try:
            bin_of_type = _load_array(folder / "deciles.npy")
            if bin_of_type.size and not UNSEEN <= bin_of_type.min() <= bin_of_type.max() < NUM_BINS:
                raise ValueError("deciles.npy has values that are no deciles")
            summary = parse_json((folder / "deciles.json").read_text(encoding="utf-8"))
            summary["count_ranges"] = [
                None if bounds is None else (bounds[0], bounds[1]) for bounds in summary["count_ranges"]
            ]
            return cls(bin_of_type=bin_of_type, **summary)
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            raise DataError(
                f"{folder} has no readable decile table ({error}); run tools/prepare_data.py again"
            ) from error


def load_counts(folder: Path | str) -> NDArray[np.int64]:
    """Read the count of each type in the training text [V], which data preparation stores in `counts.npy`.

    Raises:
        DataError: the file is missing or damaged.
    """
    try:
        return _load_array(Path(folder) / "counts.npy")
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} has no readable counts ({error}); run tools/prepare_data.py again"
        ) from error


def _load_array(path: Path) -> NDArray[Any]:
    """Load a 1-D array of integers; raises ValueError or OSError for anything else."""
    try:
        array = np.load(path, allow_pickle=False)
    except (EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path.name} is damaged: {error}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{path.name} holds no vector of integers")
    return array


def is_content(token: bytes) -> bool:
    """Return whether a token counts as a word or part of one, that is has an alphanumeric character.

    Bytes that do not form whole characters are parts of one, neither whitespace nor punctuation by themselves, and
    count as content.
    """
    try:
        return any(character.isalnum() for character in token.decode("utf-8"))
    except UnicodeDecodeError:
        return True
