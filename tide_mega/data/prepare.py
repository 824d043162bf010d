"""Preparing a dataset: text files in, tokenised shards with their index, counts and deciles out.

Units of work are cut from the input and tokenised side by side, each into shards of its own; a record on
disk says that a unit is done, so that a killed preparation goes on with the units it had not finished.
The index is written last. A dataset that is prepared anew stays until the new one is whole. The output depends
on the input and the options, not on the number of workers.
"""

import os
from collections.abc import Callable
from pathlib import Path

from tqdm import tqdm

from tide_mega.data.atomic import fingerprint_of, sha256_of
from tide_mega.data.errors import DataError
from tide_mega.data.index import DatasetIndex
from tide_mega.data.inputs import Inputs, describe_links, find_inputs
from tide_mega.data.merge import describe_losses, merge
from tide_mega.data.options import PrepareOptions, identity, validate_options
from tide_mega.data.packing import dtype_for
from tide_mega.data.pool import run_units
from tide_mega.data.state import clean_up, examine, finish_replacement, locked
from tide_mega.data.tokenizer import load_tokenizer
from tide_mega.data.units import Unit, plan_units
from tide_mega.data.vocabulary import place_tokenizer, tokenizer_source
from tide_mega.data.worker import UNITS_FOLDER, Job, UnitResult, counts_path

Log = Callable[[str], None]


def prepare(options: PrepareOptions, *, log: Log = print, progress: bool = True) -> DatasetIndex:
    """Prepares `options.out`, or returns at once when that is done already.

    Uses processes when `options.workers` is not 1: call it under `if __name__ == "__main__"`.

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
        dtype_for(tokenizer.vocab_size)  # refuse a vocabulary beyond uint32 before any work
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
    """Whether the unit's record, made the same way, stands and its shards are there whole."""
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
