"""Tokenizers are tried in a process of their own first: on some files the libraries end the process they run in.

A file that takes too much memory or time, or that ends the child, is refused; the process that asked goes on.
"""

import contextlib
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import tide_mega
from tide_mega.config.errors import ConfigError

MOST_BYTES = 4 * 2**30
"""Address space of the child; a tokenizer of 256k tokens takes less than 1 GiB."""
MOST_SECONDS = 60
"""CPU time of the child; that tokenizer takes some 3 s."""
_PATIENCE = 10 * MOST_SECONDS
"""Seconds on the clock, where a file system or other processes keep the child waiting."""
_SAID, _MEMORY = 3, 4
"""Exit statuses: the loader refuses the file in a sentence; there was too little memory."""
_PROGRAM = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from tide_mega.data.trial import try_here
try_here(*json.loads(sys.argv[2]))
"""
_ALONE = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
_ALONE |= {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
"""Of the child: threads reserve address space each."""

_passed: set[str] = set()
"""SHA-256 of the content and EOS of what this process has tried."""


def try_tokenizer(path: Path, eos_token: str | None) -> None:
    """Load a tokenizer's file in a child process, unless this process has done so with the same content.

    What the loader itself refuses passes: whoever loads it next says why.

    Raises:
        ConfigError: the child was ended by the file, or by the limits of memory and time.
        OSError: the file cannot be read.
    """
    content = hashlib.sha256(path.read_bytes() + f"|eos={eos_token}".encode()).hexdigest()
    if content in _passed:
        return
    words = [sys.executable, "-I", "-S", "-c", _PROGRAM]
    words += [
        json.dumps(_import_path()),
        json.dumps([str(path.resolve()), eos_token, MOST_BYTES, MOST_SECONDS]),
    ]
    try:
        done = subprocess.run(
            words,
            env=os.environ | _ALONE,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_PATIENCE,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _refusal(path, f"was not loaded within {_PATIENCE} s") from None
    if done.returncode not in (0, _SAID):
        raise _refusal(path, _ending(done.returncode, done.stderr.decode(errors="replace")))
    _passed.add(content)


def _import_path() -> list[str]:
    """Return where the child finds modules: this process's path, and this package.

    An editable installation may be found by a hook of `site`, which the child does not run, and not by the path.
    """
    return [*sys.path, str(Path(tide_mega.__file__).resolve().parents[1])]


def _ending(status: int, said: str) -> str:
    if status == _MEMORY:
        return f"takes more than {MOST_BYTES // 2**30} GiB of memory to load"
    if status in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"takes more than {MOST_SECONDS} s to load"
    why = f"signal {-status}" if status < 0 else f"status {status}"
    last = (said.strip().splitlines() or ["nothing said"])[-1]
    return f"ends the process that loads it ({why}: {last[:200]})"


def _refusal(path: Path, why: str) -> ConfigError:
    return ConfigError(f"tokenizer={path} {why}: it is damaged, or made to do harm; take it from its source.")


def try_here(path: str, eos_token: str | None, most_bytes: int, most_seconds: int) -> None:
    """Be the child: load the file under limits, and encode a little with it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (most_seconds, most_seconds + 5))
    from tide_mega.data.tokenizer import load_untried  # which imports this module

    try:
        tokenizer = load_untried(Path(path), eos_token)
        # What is raised at a text that it has no tokens for, tiktoken's panic too, ends nothing.
        with contextlib.suppress(BaseException):
            tokenizer.encode_batch(["A few words, 12 of them.\n"])
    except ConfigError as error:
        sys.exit(_MEMORY if isinstance(error.__cause__, MemoryError) else _SAID)
    except MemoryError:
        sys.exit(_MEMORY)
