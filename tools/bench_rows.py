"""The memory's rows outside training: time of a look-up by format, of reads from disk, and cache hits.

    python tools/bench_rows.py
    python tools/bench_rows.py width=768 blocks=2,8,24 batch=1,8 folder=/mnt/ssd tokens=held_out.npy out=rows.json

Look-ups: CPU time to gather and decode the K rows of `batch` random ids, formats taking turns in one process; `x`
is the time over the first format's. `trained` needs no export: bf16 tables, normalised at every look-up.

Disk: wall time, from a file of random rows that is made in `folder` and removed afterwards. Cold: the system was
asked to drop the file from the page cache first; a virtual disk may still have it in the host's. Prompts of
distinct ids are read by several numbers of threads in turn.

Cache: of the ids in `tokens`, one after another, the share whose row was among those used last. `tokens` is a .npy
file of whole numbers; null draws 100,000 by Zipf's law, as in text.
"""

import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tide_mega.config.command_line import tool_entry
from tide_mega.config.hydra_door import parse_tool_cli
from tide_mega.errors import refuse
from tide_mega.lab.bench.tool import run_tool


@dataclass
class RowsOptions:
    """Options of `tools/bench_rows.py`."""

    formats: list[str] = field(default_factory=lambda: ["bf16", "trained", "int8", "int4", "nf4"])
    blocks: list[int] = field(default_factory=lambda: [8])
    """Values of K."""
    width: int = 1024
    batch: list[int] = field(default_factory=lambda: [1, 8])
    """Ids of a look-up."""
    rows: int = 8_192
    """Of the tables in memory."""
    dtype: str = "fp32"
    """Of the rows handed out: fp32 or bf16."""
    threads: int = 1
    """CPU threads."""
    repeats: int = 60
    """Timed turns of each format."""
    disk_format: str = "int4"
    """Of the file, with the first K of `blocks`."""
    disk_rows: int = 65_536
    reads: int = 300
    """Single rows read cold."""
    prompt: int = 1_024
    """Different ids of a prompt."""
    readers: list[int] = field(default_factory=lambda: [1, 4, 16])
    """Threads that read a prompt's rows."""
    prompts: int = 5
    """Prompts read with each number of threads."""
    folder: str | None = None
    """Where the file is made; null means the system's temporary folder."""
    tokens: str | None = None
    """A .npy file of token ids."""
    vocab: int = 128_256
    cache: list[float] = field(default_factory=lambda: [0.01, 0.05, 0.1])
    """Parts of the rows that the cache holds."""
    out: str | None = None
    """JSON file to write."""


def bench(options: RowsOptions) -> dict[str, Any]:
    """Measure everything; return what `out` receives.

    Raises:
        ConfigError: an option is wrong.
    """
    _validate(options)
    import torch

    from tide_mega.lab.bench.rows_measure import (
        RowFormat,
        measure_hits,
        measure_lookups,
        measure_prompts,
        measure_single_reads,
        write_random,
    )
    from tide_mega.parallel.device import DTYPES

    torch.set_num_threads(options.threads)
    dtype = DTYPES[options.dtype]
    ids_N = _tokens(options)
    lookups: list[dict[str, Any]] = []
    for blocks in options.blocks:
        for batch in options.batch:
            print(f"measuring look-ups, K={blocks}, batch {batch}", file=sys.stderr)
            lookups += measure_lookups(
                options.formats, blocks, options.width, batch, options.rows, dtype, options.repeats
            )
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        path = Path(name) / "rows.tide"
        format = RowFormat(options.disk_format, options.blocks[0], options.width)
        print("writing the file", file=sys.stderr)
        write_random(path, format, options.disk_rows)
        size = path.stat().st_size
        print("measuring reads", file=sys.stderr)
        single = measure_single_reads(path, options.reads, dtype)
        prompts = measure_prompts(path, options.prompt, options.readers, options.prompts, dtype)
        path.unlink()
        print("measuring hits", file=sys.stderr)
        hits = measure_hits(Path(name), ids_N, options.vocab, options.cache)
    return {
        "options": asdict(options),
        "lookups": lookups,
        "file_bytes": size,
        "record_bytes": format.record_bytes,
        "single_reads": {state: asdict(found) for state, found in single.items()},
        "prompts": {str(threads): asdict(found) for threads, found in prompts.items()},
        "tokens": len(ids_N),
        "hits": {str(part): share for part, share in hits.items()},
    }


def _tokens(options: RowsOptions) -> Any:
    """Return the ids [N], int64, that the cache is asked for."""
    import numpy as np
    import torch

    from tide_mega.lab.bench.text import draw_ids

    if options.tokens is None:
        return draw_ids("zipf", 100_000, options.vocab, seed=0)
    try:
        ids = np.load(options.tokens, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        refuse("tokens", options.tokens, f"cannot be read: {error}", "give a .npy file of whole numbers")
    if ids.dtype.kind not in "iu" or not ids.size or ids.min() < 0 or ids.max() >= options.vocab:
        refuse(
            "tokens",
            options.tokens,
            f"does not hold ids of vocab={options.vocab}",
            "give the vocabulary's size",
        )
    return torch.from_numpy(ids.ravel().astype(np.int64))


def _validate(options: RowsOptions) -> None:
    from tide_mega.hf.rows_tide import KINDS

    quantised = [kind for kind in KINDS if kind != "rank"]
    for key in ("width", "rows", "threads", "disk_rows", "prompt", "vocab"):
        if getattr(options, key) < 1:
            refuse(key, getattr(options, key), "is too small", "give 1 or more")
    for key in ("repeats", "reads", "prompts"):
        if getattr(options, key) < 2:
            refuse(key, getattr(options, key), "is too small", "give 2 or more")
    for key in ("blocks", "batch", "readers"):
        values = getattr(options, key)
        if not values or min(values) < 1:
            refuse(key, values, "is not a list of numbers from 1", "give one or more, as in 1,8")
    if not options.cache or not all(0 <= part <= 1 for part in options.cache):
        refuse(
            "cache", options.cache, "is not a list of parts of the rows", "give some from 0 to 1, as in 0.05"
        )
    if not options.formats or not set(options.formats) <= {*quantised, "trained"}:
        refuse("formats", options.formats, "has an unknown format", f"use trained, {', '.join(quantised)}")
    for key, choices in {"disk_format": quantised, "dtype": ["fp32", "bf16"]}.items():
        if getattr(options, key) not in choices:
            refuse(key, getattr(options, key), "is unknown", f"use {', '.join(choices)}")
    for key in ("reads", "prompt"):
        if getattr(options, key) > options.disk_rows:
            refuse(key, getattr(options, key), "is more than disk_rows", "give a longer file")
    if options.folder is not None and not Path(options.folder).is_dir():
        refuse("folder", options.folder, "does not exist", "make the folder first")
    if options.out is not None and not Path(options.out).parent.is_dir():
        refuse("out", options.out, "lies in a folder that does not exist", "make the folder first")


def show(found: dict[str, Any]) -> str:
    """The three tables, as text."""
    from tide_mega.lab.bench.show import megabytes, milliseconds
    from tide_mega.text_table import aligned

    options = found["options"]
    lookups = [
        [
            str(line["blocks"]),
            str(line["batch"]),
            line["kind"],
            f"{line['record_bytes']:,}",
            milliseconds(line["p10"]),
            milliseconds(line["p50"]),
            f"{line['ratio']:.2f}",
        ]
        for line in found["lookups"]
    ]
    reads = [
        [f"one row, {state}", *(milliseconds(line[key]) for key in ("p10", "p50", "p95"))]
        for state, line in found["single_reads"].items()
    ] + [
        [
            f"{options['prompt']:,} rows cold, threads: {threads}",
            *(milliseconds(line[key]) for key in ("p10", "p50", "p95")),
        ]
        for threads, line in found["prompts"].items()
    ]
    hits = [[f"{float(part):.1%}", f"{share:.1%}"] for part, share in found["hits"].items()]
    return "\n\n".join(
        [
            f"Look-ups in memory, D = {options['width']:,}, {options['dtype']}, CPU time\n"
            + aligned([["K", "batch", "format", "bytes a token", "p10 ms", "p50 ms", "x"]], lookups),
            f"From a file of {options['disk_rows']:,} records of {found['record_bytes']:,} bytes "
            f"({megabytes(found['file_bytes'])} MB), wall time\n"
            + aligned([["read", "p10 ms", "p50 ms", "p95 ms"]], reads),
            f"Cache of the rows used last, {found['tokens']:,} tokens of a vocabulary of {options['vocab']:,}\n"
            + aligned([["rows kept", "tokens that hit"]], hits),
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status: 0, or 2 for a bad option."""
    options = parse_tool_cli(RowsOptions, argv, doc=__doc__ or "")
    return run_tool(lambda: bench(options), show, options.out)


if __name__ == "__main__":
    tool_entry(main)
