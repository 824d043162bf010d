"""Prepares a dataset: text files in; tokenised shards, index, counts and deciles out.

The input is cut into units of work that are tokenised in parallel, each into shards of its own. A record on disk
marks a finished unit, so that a killed preparation continues with the unfinished ones. The finished units are
merged into one dataset: counts, deciles and, last, the index. A dataset that is prepared anew stays until the
new one is complete. The output depends on the input and the options, not on the number of workers.
"""

import logging
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tide_mega import files
from tide_mega.data.frequency import DecileTable
from tide_mega.data.index import SPLITS, DatasetIndex, SplitRecord, TokenizerRecord, Totals
from tide_mega.data.prepare.folder import clean_up, examine, finish_replacement, locked
from tide_mega.data.prepare.inputs import (
    Inputs,
    Unit,
    describe_ignored,
    describe_links,
    find_inputs,
    plan_units,
)
from tide_mega.data.prepare.options import PrepareOptions, identity, validate_options
from tide_mega.data.prepare.vocabulary import place_tokenizer, tokenizer_source
from tide_mega.data.prepare.worker import (
    LISTED,
    UNITS_FOLDER,
    Job,
    UnitResult,
    counts_path,
    dtype_for,
    process_unit,
)
from tide_mega.data.tokenizer import Tokenizer, load_tokenizer
from tide_mega.errors import DataError
from tide_mega.files import atomic_writer, fingerprint_of, sha256_of

_POLL_SECONDS = 0.25
_job: Job
_tokenizer: Tokenizer
_progress: "Synchronized[int]"


def run_units(
    units: list[tuple[Unit, str]],
    job: Job,
    tokenizer_path: Path,
    eos_token: str | None,
    workers: int,
    on_bytes: Callable[[int], None],
) -> None:
    """Process (unit, fingerprint) pairs in `workers` processes; a single worker is this process itself.

    Raises:
        DataError: an input is bad, or a worker was killed. Units finished by then stay finished.
    """
    if workers == 1 or len(units) <= 1:
        tokenizer = load_tokenizer(tokenizer_path, eos_token)
        for unit, fingerprint in units:
            process_unit(unit, job, tokenizer, fingerprint, on_bytes)
        return
    # spawn: the tokenizers library already has threads, which a fork would lose.
    context = multiprocessing.get_context("spawn")
    progress = context.Value("q", 0)
    executor = ProcessPoolExecutor(
        min(workers, len(units)), context, _initialise, (job, tokenizer_path, eos_token, progress)
    )
    try:
        pending = {executor.submit(_run, unit, fingerprint) for unit, fingerprint in units}
        reported = 0
        while pending:
            done, pending = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
            now = progress.value
            on_bytes(now - reported)
            reported = now
    except BrokenProcessPool as error:
        raise DataError(
            "a worker process was killed, for want of memory perhaps; run the same command again to "
            "continue, with fewer workers"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _initialise(job: Job, tokenizer_path: Path, eos_token: str | None, progress: "Synchronized[int]") -> None:
    global _job, _tokenizer, _progress
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # parallelism is over processes
    logging.getLogger(files.__name__).setLevel(
        logging.ERROR
    )  # the parent wrote to the same folder and has logged it
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _job, _progress = job, progress
    _tokenizer = load_tokenizer(tokenizer_path, eos_token, is_tried=True)  # tried by the parent


def _die_with_parent() -> None:
    """Let this process die with its parent, so that it does not write beside a resumed preparation."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def _run(unit: Unit, fingerprint: str) -> None:
    def on_bytes(count: int) -> None:
        with _progress.get_lock():
            _progress.value += count

    process_unit(unit, _job, _tokenizer, fingerprint, on_bytes)


def merge(
    inputs: Inputs,
    units: list[Unit],
    tokenizer: Tokenizer,
    tokenizer_file: str,
    options: dict[str, Any],
    out: Path,
) -> DatasetIndex:
    """Write `counts.npy`, the deciles and `index.json` to `out` from the records of its units.

    Raises:
        DataError: no document was found, or a unit's record is missing.
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
    """Return what of the input was not written, in words."""
    return (
        f"{totals.empty_documents:,} empty documents, {totals.empty_files:,} empty files, "
        f"{totals.bad:,} bad files or records, {describe_ignored(totals.ignored_files)}"
    )


def _join(results: list[UnitResult], split: str) -> SplitRecord:
    shards = [shard for result in results for shard in result.splits[split]]
    return SplitRecord(
        sum(shard.tokens for shard in shards), sum(shard.documents for shard in shards), shards
    )


Log = Callable[[str], None]


def prepare(options: PrepareOptions, *, log: Log = print, progress: bool = True) -> DatasetIndex:
    """Prepare the dataset `options.out`, or return at once if it is already complete.

    Starts processes unless `options.workers` is 1, so call it under `if __name__ == "__main__"`.

    Args:
        options: what to read, how, and where to write.
        log: receives a line for each phase.
        progress: show a progress bar (bytes of input) on standard error.

    Raises:
        ConfigError: an option cannot be satisfied.
        DataError: the input is bad, and `on_bad_file` is fail.
    """
    validate_options(options)
    source = tokenizer_source(options)
    inputs = find_inputs(options.inputs, options.suffixes, leave_out=Path(options.out))
    units = plan_units(inputs.files, options.unit_bytes)
    out = Path(options.out)
    identified = identity(options, None if source is None else sha256_of(source))
    with locked(out):
        folder, is_complete = examine(out, identified, _fingerprint(inputs, units), options.overwrite)
        if is_complete:
            index = DatasetIndex.load(out)
            _refuse_skipped(index, options)
            clean_up(out, index)
            log(f"{out} is already prepared from the same input with the same options: nothing to do")
            return index
        if inputs.links:
            log(describe_links(inputs.links))
        if folder != out:
            log(f"preparing anew in {folder}; what {out} holds stays until that is complete")
        tokenizer_path = place_tokenizer(source, options, units, folder, log)
        tokenizer = load_tokenizer(tokenizer_path, options.eos_token)
        dtype_for(tokenizer.vocab_size)  # refuses a vocabulary beyond uint32 before any work
        base = fingerprint_of({"options": identified, "tokenizer": tokenizer.fingerprint})
        pairs = [(unit, fingerprint_of([base, unit.describe()])) for unit in units]
        _tokenise(pairs, options, tokenizer_path, folder, log, progress)
        index = merge(inputs, units, tokenizer, tokenizer_path.name, identified, folder)
        clean_up(folder, index)
        if folder != out:
            finish_replacement(out)
        log(_summary(index, options))
        return index


def _fingerprint(inputs: Inputs, units: list[Unit]) -> str:
    return fingerprint_of([[unit.describe() for unit in units], inputs.empty, inputs.ignored])


def _refuse_skipped(index: DatasetIndex, options: PrepareOptions) -> None:
    if index.totals.bad > index.totals.tolerated and options.on_bad_file == "fail":
        raise DataError(
            f"{options.out} was prepared with on_bad_file=skip and left out {index.totals.bad} bad files or "
            "records, named in its index.json; pass on_bad_file=skip to accept that, or correct the input "
            "and pass overwrite=true"
        )


def _tokenise(
    pairs: list[tuple[Unit, str]],
    options: PrepareOptions,
    tokenizer_path: Path,
    out: Path,
    log: Log,
    progress: bool,
) -> None:
    (out / UNITS_FOLDER).mkdir(exist_ok=True)
    pending = [pair for pair in pairs if not _is_done(*pair, options, out)]
    if len(pending) < len(pairs):
        log(f"continuing: {len(pairs) - len(pending)} of {len(pairs)} units of work are done already")
    job = Job(
        out=str(out),
        text_key=options.text_key,
        max_document_bytes=options.max_document_bytes,
        validation_fraction=options.validation_fraction,
        seed=options.seed,
        sample_tokens=options.sample_tokens,
        shard_tokens=options.shard_tokens,
        skip_bad=options.on_bad_file == "skip",
    )
    workers = options.workers or len(os.sched_getaffinity(0))
    total = sum(unit.size for unit, _ in pairs)
    done = total - sum(unit.size for unit, _ in pending)
    with tqdm(
        total=total, initial=done, unit="B", unit_scale=True, desc="tokenising", disable=not progress
    ) as bar:
        run_units(pending, job, tokenizer_path, options.eos_token, workers, bar.update)


def _is_done(unit: Unit, fingerprint: str, options: PrepareOptions, out: Path) -> bool:
    """Return whether the unit has a record with this fingerprint and its shards are complete."""
    result = UnitResult.load(out, unit.number)
    if result is None or result.fingerprint != fingerprint:
        return False
    if result.bad_strict and options.on_bad_file == "fail":
        return False
    shards = [shard for split in result.splits.values() for shard in split]
    return counts_path(out, unit.number).is_file() and all(
        (out / shard.file).is_file() and (out / shard.file).stat().st_size == shard.bytes for shard in shards
    )


def _summary(index: DatasetIndex, options: PrepareOptions) -> str:
    train, validation = index.splits["train"], index.splits["validation"]
    lines = [
        f"{options.out}: {train.tokens:,} training tokens in {train.documents:,} documents, "
        f"{validation.tokens:,} held-out tokens in {validation.documents:,}; "
        f"vocabulary {index.tokenizer.vocab_size:,}",
        f"  left out: {describe_losses(index.totals)}",
        *(f"    {bad['source']} {bad['reason']}" for bad in index.bad[:10]),
    ]
    if len(index.bad) > 10:
        lines.append("    … more are named in index.json")
    if options.validation_fraction and not validation.documents:
        lines.append(
            f"  no document fell to the held-out split: validation_fraction={options.validation_fraction} is "
            "too small for so few documents"
        )
    return "\n".join(lines)
