"""Measured peak memory of a training process: the plain approach against this system, beside the formulas.

    python tools/bench_memory.py
    python tools/bench_memory.py vocab=8192 blocks=4,16 micro_batch=8 out=peaks.json

Each line is a few optimizer steps in fp32 on fresh data-parallel processes with the same random tokens. `plain` is
the plain torch reference (every process has all tables, dense AdamW on them, M [B,T,K,D] of every token); `tensor`
and `tensor_data` are this system with that `memory.owners`. `start` is the peak resident memory while model and
optimizer were built, `steps` while they trained, both above what was resident after the imports. `memory` is what
K blocks add to the same approach's `steps` at K = 0, `computed` the figure of tide_mega.memory.traffic for it;
each `times less` compares the column before with plain's. Needs Linux.

Measured and computed need not agree: a peak occurs at one moment, when not all that the formula adds up exists
(the logits are gone when Adam's step has every gradient), and the formulas leave out temporaries.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tide_mega.config.command_line import tool_entry
from tide_mega.config.hydra_door import parse_tool_cli
from tide_mega.errors import ConfigError, refuse
from tide_mega.lab.bench.measure import EXACT_FREE
from tide_mega.lab.bench.tool import run_tool
from tide_mega.memory.traffic import Layout, Tables, Widths, owner_memory, plain_memory
from tide_mega.text_table import aligned

APPROACHES = ("plain", "tensor", "tensor_data")
FP32 = Widths(row=4, gradient=4, read=0)
"""In fp32 the layers read the normalised rows themselves, no copy."""
MEGA = 10**6
_WORKER = Path(__file__).with_name("bench_memory_worker.py")


@dataclass
class BenchOptions:
    """Options of `tools/bench_memory.py`."""

    vocab: int = 32_768
    width: int = 256
    blocks: list[int] = field(default_factory=lambda: [8])
    """Values of K besides 0."""
    layers: int = 2
    micro_batch: int = 2
    """Sequences of a step of one process, all in one microbatch."""
    seq_length: int = 512
    steps: int = 3
    processes: int = 2
    """Data-parallel processes."""
    threads: int = 1
    """CPU threads of each process."""
    out: str | None = None
    """JSON file to write with all the figures in bytes."""


def bench(options: BenchOptions) -> list[dict[str, Any]]:
    """Measure every approach at K = 0 and each of `blocks`; return the lines of the table, plain first.

    Raises:
        ConfigError: an option is wrong.
        RuntimeError: a process failed.
    """
    _validate(options)
    # Without memory, both owners give the same run.
    runs = [("plain", 0), ("tensor", 0), *((a, k) for k in options.blocks for a in APPROACHES)]
    lines: dict[tuple[str, int], dict[str, Any]] = {}
    for approach, blocks in runs:
        print(f"measuring {approach} with K={blocks}", file=sys.stderr)
        line: dict[str, Any] = {"approach": approach, "blocks": blocks, **measure(options, approach, blocks)}
        lines[approach, blocks] = line
        plain = lines["plain", blocks]
        line["times_less"] = plain["steps"] / line["steps"]
        if blocks:
            without = lines["plain" if approach == "plain" else "tensor", 0]
            line["memory"] = line["steps"] - without["steps"]
            line["computed"] = computed(options, approach, blocks, line["distinct"])
            line["memory_times_less"] = plain["memory"] / line["memory"]
            line["computed_times_less"] = plain["computed"] / line["computed"]
    return list(lines.values())


def measure(options: BenchOptions, approach: str, blocks: int) -> dict[str, int]:
    """`start`, `steps` and `distinct` of the fullest process, in bytes and ids.

    Raises:
        RuntimeError: a process failed; its last words are shown.
    """
    with tempfile.TemporaryDirectory(prefix="tide-bench-") as folder:
        outputs = [Path(folder) / str(rank) for rank in range(options.processes)]
        workers = []
        for rank, output in enumerate(outputs):
            task = {**asdict(options), "approach": approach, "blocks": blocks, "rank": rank}
            task["store"] = f"{folder}/store"
            del task["out"]
            threads = {"OMP_NUM_THREADS": str(options.threads), "LOCAL_RANK": str(rank)}
            with output.open("w") as stream:
                workers.append(
                    subprocess.Popen(
                        [sys.executable, "-W", "ignore", str(_WORKER), json.dumps(task)],
                        stdout=stream,
                        stderr=subprocess.STDOUT,
                        env={**os.environ, **EXACT_FREE, **threads},
                    )
                )
        statuses = _wait(workers)
        said = [output.read_text().splitlines() for output in outputs]
    failed = [rank for rank, status in enumerate(statuses) if status]
    if failed:
        # Report a process that failed by itself rather than one that was ended because of it.
        rank = max(failed, key=lambda r: statuses[r])
        last = "\n".join(said[rank][-15:])
        raise RuntimeError(
            f"{approach} with K={blocks}: process {rank} ended with status {statuses[rank]}\n{last}"
        )
    peaks = [json.loads(lines[-1]) for lines in said]
    return {key: max(peak[key] for peak in peaks) for key in peaks[0]}


def _wait(workers: list[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for all; end those that would wait forever for a failed one."""
    try:
        while any(worker.poll() is None for worker in workers):
            if any(worker.poll() for worker in workers):
                break
            time.sleep(0.1)
    finally:
        for worker in workers:
            if worker.poll() is None:
                worker.kill()
    return [worker.wait() for worker in workers]


def computed(options: BenchOptions, approach: str, blocks: int, distinct: int) -> float:
    """Return the bytes that the formulas give for the memory's share of a process, in fp32.

    Plain torch keeps no master copy of its weights, so the optimizer has two of the three states.
    """
    tables = Tables(options.vocab, blocks, options.width)
    if approach == "plain":
        kinds = plain_memory(tables, Layout(), options.micro_batch * options.seq_length, FP32)
        return sum(kinds.values()) - kinds["optimizer state"] / 3
    layout = Layout(data=options.processes)
    owned = owner_memory(tables, layout, distinct, FP32)
    if approach == "tensor_data":
        return sum(owned.values())
    return sum(plain_memory(tables, layout, 0, FP32).values()) + owned["rows"] + owned["gradient of rows"]


def _validate(options: BenchOptions) -> None:
    for key in ("vocab", "width", "layers", "micro_batch", "seq_length", "steps", "processes", "threads"):
        if getattr(options, key) < 1:
            refuse(key, getattr(options, key), "is too small", "give 1 or more")
    if any(k < 1 for k in options.blocks):
        refuse("blocks", options.blocks, "has a K below 1", "leave it out, K=0 is always measured")
    if options.width % 8:
        refuse("width", options.width, "does not divide into 4 heads of an even size", "use a multiple of 8")
    if options.out is not None and not Path(options.out).absolute().parent.is_dir():
        refuse("out", options.out, "lies in a folder that does not exist", "make the folder first")
    if not Path("/proc/self/clear_refs").exists():
        raise ConfigError("/proc/self/clear_refs does not exist: peaks are measured with it, on Linux.")


def show(lines: list[dict[str, Any]]) -> str:
    """Return the table, in MB of 10^6 bytes."""
    ratio_of = {"steps": "times_less", "memory": "memory_times_less", "computed": "computed_times_less"}
    head = ["K", "approach", "start"]
    for key in ratio_of:
        head += [key, "times less"]
    cells = []
    for line in lines:
        row = [str(line["blocks"]), line["approach"], f"{line['start'] / MEGA:,.0f}"]
        for key, ratio in ratio_of.items():
            row += [f"{line[key] / MEGA:,.0f}", f"{line[ratio]:.2f}"] if key in line else ["-", "-"]
        cells.append(row)
    return aligned([head], cells)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status: 0, 1 where a process failed, 2 for a bad option."""
    options = parse_tool_cli(BenchOptions, argv, doc=__doc__ or "")
    title = (
        f"Peak resident MB of a process: V = {options.vocab:,}, d = {options.width:,}, {options.layers} layers, "
        f"{options.processes} data-parallel processes of {options.micro_batch} x {options.seq_length:,} tokens"
    )

    def measure() -> dict[str, Any]:
        return {"options": asdict(options), "lines": bench(options)}

    return run_tool(
        measure,
        lambda found: f"{title}\n{show(found['lines'])}",
        options.out,
        failures=(RuntimeError,),
    )


if __name__ == "__main__":
    tool_entry(main)
