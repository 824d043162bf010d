"""Running units of work over processes."""

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

from tide_mega.data import atomic
from tide_mega.data.errors import DataError
from tide_mega.data.tokenizer import Tokenizer, load_tokenizer
from tide_mega.data.units import Unit
from tide_mega.data.worker import Job, process_unit

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
    """Processes (unit, fingerprint) pairs in `workers` processes; one worker is this process itself.

    Raises:
        DataError: a bad input, or a worker that was killed. Units finished by then stay finished.
    """
    if workers == 1 or len(units) <= 1:
        tokenizer = load_tokenizer(tokenizer_path, eos_token)
        for unit, fingerprint in units:
            process_unit(unit, job, tokenizer, fingerprint, on_bytes)
        return
    # spawn: tokenizers has threads of its own by now, which a fork would not carry over.
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
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process is one worker
    logging.getLogger(atomic.__name__).setLevel(
        logging.ERROR
    )  # the parent wrote to the same folder and said it
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _job, _progress = job, progress
    _tokenizer = load_tokenizer(tokenizer_path, eos_token, is_tried=True)  # by the parent


def _die_with_parent() -> None:
    """Ends this process when its parent is killed, so that it does not write beside a resumed run."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait_for([parent.sentinel])
        os._exit(1)


def _run(unit: Unit, fingerprint: str) -> None:
    def on_bytes(count: int) -> None:
        with _progress.get_lock():
            _progress.value += count

    process_unit(unit, _job, _tokenizer, fingerprint, on_bytes)
