"""Compiles the GPU kernels ahead of time, without a GPU, and shows what they need of a multiprocessor.

    python tools/compile_kernels.py
    python tools/compile_kernels.py arch=sm_90 kernel=mix_forward blocks=8,24 out=kernels.json

Prints a line for each kernel, architecture, K, D and dtype, with the tiles of tide_mega/kernels/tuning.json:
registers and spilled bytes per thread, shared memory per program, occupancy (the share of a multiprocessor's warps
that fit at once, computed from these three), and the bits of the widest load from global memory. The exit status
is 1 if a kernel spills, fits nowhere, or reads rows in less than 128 bits at a time. Needs triton; compiled
kernels are kept in TRITON_CACHE_DIR.
"""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tide_mega.config.command_line import tool_entry
from tide_mega.config.hydra_door import parse_tool_cli
from tide_mega.errors import ConfigError, refuse
from tide_mega.files import write_json
from tide_mega.kernels.tuning import KERNELS, find
from tide_mega.text_table import aligned

ARCHITECTURES = ("sm_90", "sm_100")
DTYPES = ("bf16", "fp32")


@dataclass
class CompileOptions:
    """Options of `tools/compile_kernels.py`; lists may be given as a,b,c."""

    arch: list[str] = field(default_factory=lambda: list(ARCHITECTURES))
    kernel: list[str] = field(default_factory=lambda: list(KERNELS))
    blocks: list[int] = field(default_factory=lambda: [2, 4, 8, 16, 24])
    """K."""
    width: list[int] = field(default_factory=lambda: [1024, 1536, 2048, 3072])
    """D: those of the paper's models."""
    dtype: list[str] = field(default_factory=lambda: list(DTYPES))
    """Of activations, rows and gains."""
    out: str | None = None
    """JSON file to write with all the figures."""


def compile_all(options: CompileOptions, done: Callable[[int, int], None]) -> list[Any]:
    """Compile every combination; `done(n, total)` is called after each.

    Returns:
        `tide_mega.kernels.aot.Report`s.

    Raises:
        ConfigError: an option is wrong, or triton is not installed.
    """
    _validate(options)
    # Imported here so that --help needs no triton.
    from tide_mega.kernels.aot import report

    cases = [
        (kernel, arch, blocks, width, dtype)
        for kernel in options.kernel
        for arch in options.arch
        for width in options.width
        for blocks in options.blocks
        for dtype in options.dtype
    ]
    reports = []
    for number, (kernel, arch, blocks, width, dtype) in enumerate(cases, start=1):
        reports.append(report(kernel, arch, blocks, width, dtype, find(kernel, arch, blocks, width).tile))
        done(number, len(cases))
    return reports


def _validate(options: CompileOptions) -> None:
    allowed = {"arch": ARCHITECTURES, "kernel": KERNELS, "dtype": DTYPES}
    for key, known in allowed.items():
        for name in getattr(options, key):
            if name not in known:
                refuse(key, name, "is unknown", f"use {', '.join(known)}")
    for key in ("blocks", "width"):
        for size in getattr(options, key):
            if size < 1:
                refuse(key, size, "is too small", "give 1 or more")
    if options.out is not None and not Path(options.out).absolute().parent.is_dir():
        refuse("out", options.out, "lies in a folder that does not exist", "make the folder first")
    if importlib.util.find_spec("triton") is None:
        raise ConfigError("triton is not installed, and it compiles the kernels: pip install triton.")


def show(reports: list[Any]) -> str:
    """The table of the reports."""
    head = [
        "kernel",
        "arch",
        "K",
        "D",
        "dtype",
        "registers",
        "spills",
        "shared",
        "occupancy",
        "widest load",
        "fault",
    ]
    cells = []
    for r in reports:
        sizes = [str(x) for x in (r.blocks, r.width, r.dtype, r.registers, r.spill_bytes, r.shared_bytes)]
        cells.append(
            [r.kernel, r.arch, *sizes, f"{r.occupancy:.0%}", str(r.widest_load), "; ".join(r.faults) or "-"]
        )
    return aligned([head], cells)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status: 0, 1 where a kernel has a fault, 2 for a bad option."""
    options = parse_tool_cli(CompileOptions, argv, doc=__doc__ or "")

    def done(number: int, total: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{number} of {total} kernels", end="\n" if number == total else "", file=sys.stderr)

    try:
        reports = compile_all(options, done)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(show(reports))
    faulty = [r for r in reports if r.faults]
    print(f"\n{len(reports)} kernels compiled, {len(faulty)} with a fault")
    if options.out is not None:
        lines = [{**asdict(r), "faults": r.faults} for r in reports]
        write_json(Path(options.out), {"options": asdict(options), "kernels": lines})
    return 1 if faulty else 0


if __name__ == "__main__":
    tool_entry(main)
