"""Joining the finished units into one dataset: counts, deciles and, last, the index."""

from pathlib import Path
from typing import Any

import numpy as np

from tide_mega.data.atomic import atomic_writer
from tide_mega.data.errors import DataError
from tide_mega.data.frequency import DecileTable
from tide_mega.data.index import SPLITS, DatasetIndex, SplitRecord, TokenizerRecord, Totals
from tide_mega.data.inputs import Inputs, describe_ignored
from tide_mega.data.packing import dtype_for
from tide_mega.data.tokenizer import Tokenizer
from tide_mega.data.units import Unit
from tide_mega.data.worker import LISTED, UnitResult, counts_path


def merge(
    inputs: Inputs,
    units: list[Unit],
    tokenizer: Tokenizer,
    tokenizer_file: str,
    options: dict[str, Any],
    out: Path,
) -> DatasetIndex:
    """Writes `counts.npy`, the deciles and `index.json` of `out` from the records of its units.

    Raises:
        DataError: no document was found, or a unit's record is gone.
    """
    counts = np.zeros(tokenizer.vocab_size, np.uint64)
    results: list[UnitResult] = []
    for unit in units:
        result = UnitResult.load(out, unit.number)
        if result is None:
            raise DataError(f"{out} lost the record of unit {unit.number} while it was written; run it again")
        ids, unit_counts = np.load(counts_path(out, unit.number), allow_pickle=False)
        counts[ids.astype(np.int64)] += unit_counts
        results.append(result)
    splits = {name: _join(results, name) for name in SPLITS}
    bad = [named for result in results for named in result.bad]
    empty_files = inputs.empty + [name for result in results for name in result.empty_files]
    totals = Totals(
        documents=sum(split.documents for split in splits.values()),
        tokens=sum(split.tokens for split in splits.values()),
        empty_documents=sum(result.empty_documents for result in results),
        empty_files=len(empty_files),
        bad=sum(result.bad_count for result in results),
        tolerated=sum(result.bad_count - result.bad_strict for result in results),
        ignored_files=inputs.ignored,
    )
    if not totals.documents:
        first = "; the first bad one: {source} {reason}".format(**bad[0]) if bad else ""
        raise DataError(f"the input has no document: {describe_losses(totals)}{first}")
    with atomic_writer(out / "counts.npy") as file:
        np.save(file, counts, allow_pickle=False)
    DecileTable.from_counts(counts, tokenizer).save(out)
    index = DatasetIndex(
        tokenizer=TokenizerRecord(
            tokenizer_file, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eos_id
        ),
        dtype=dtype_for(tokenizer.vocab_size).name,
        splits=splits,
        totals=totals,
        bad=bad[:LISTED],
        empty_files=empty_files[:LISTED],
        options=options,
    )
    index.save(out)
    return index


def describe_losses(totals: Totals) -> str:
    """What of the input was not written, in words."""
    return (
        f"{totals.empty_documents:,} empty documents, {totals.empty_files:,} empty files, "
        f"{totals.bad:,} bad files or records, {describe_ignored(totals.ignored_files)}"
    )


def _join(results: list[UnitResult], split: str) -> SplitRecord:
    shards = [shard for result in results for shard in result.splits[split]]
    return SplitRecord(
        sum(shard.tokens for shard in shards), sum(shard.documents for shard in shards), shards
    )
