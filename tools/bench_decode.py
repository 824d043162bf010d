"""Time per decoded token by K, side by side: tables in memory and on disk, and other Llamas without memory.

    python tools/bench_decode.py
    python tools/bench_decode.py dtype=bf16 blocks=8,24 batches=1 turns=40 out=decode.json
    python tools/bench_decode.py peers=[] disk=false

All decoders of a batch size share one base model of random weights and take turns, a token each, in an order that
rotates; tokens are drawn by Zipf's law. `cpu` is the CPU time of a step, summed over threads, `wall` its duration;
both are medians over the turns. `x K=0` is the median of the ratios to K = 0 within a turn, followed by the
quartiles. On a shared machine, compare CPU times and ratios. A table in memory has `rows` rows, more than any
processor cache holds. `int8 weights` are K = 0 with weights=int8.

`disk` is a file of int4 rows for the whole vocabulary, with a cache of 5 % that earlier tokens have filled. `cold`
is a prompt of distinct tokens, after the file was dropped from the page cache; `resident` is what a fresh process
holds after some tokens, against K = 0 plus the most its cache may hold. Both need Linux.

Peers are used if installed: transformers' Llama, which takes part in the turns, and llama.cpp (xllamacpp and
gguf), which decodes blocks of tokens after the turns, since it runs its own loop.
"""

import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tide_mega.config.command_line import tool_entry, use_huge_pages
from tide_mega.config.hydra_door import parse_tool_cli
from tide_mega.errors import refuse
from tide_mega.lab.bench.tool import run_tool

DISK_KIND = "int4"


@dataclass
class DecodeOptions:
    """Options of `tools/bench_decode.py`."""

    layers: int = 12
    width: int = 1024
    ffn_width: int = 2048
    heads: int = 16
    groups: int = 8
    vocab: int = 128_256
    blocks: list[int] = field(default_factory=lambda: [2, 4, 8, 16, 24])
    """Values of K beside 0."""
    kinds: list[str] = field(default_factory=lambda: ["bf16", "int8", "int4"])
    """Formats of rows in memory; the first for every K, the others for those of `kinds_blocks`."""
    kinds_blocks: list[int] = field(default_factory=lambda: [8, 24])
    batches: list[int] = field(default_factory=lambda: [1, 8])
    dtype: str = "fp32"
    """fp32 or bf16, of weights and computation."""
    rows: int = 16_384
    """Of a table in memory."""
    context: int = 32
    """Tokens before the first step."""
    turns: int = 21
    disk: bool = True
    """Whether to measure rows on disk."""
    disk_blocks: int = 8
    """K of them."""
    cache: float = 0.05
    prompt: int = 1024
    """Tokens of the cold prompt."""
    int8: bool = True
    """Whether to measure weights=int8."""
    peers: list[str] = field(default_factory=lambda: ["transformers", "llama.cpp"])
    huge_pages: bool = True
    """Whether torch asks for them, as `tide_mega.generate` does; for transformers' tensors too."""
    folder: str | None = None
    """Folder for temporary files; null means the system's."""
    device: str = "cpu"
    threads: int = 1
    out: str | None = None
    """JSON file to write."""


def bench(options: DecodeOptions) -> dict[str, Any]:
    """Measure everything; return what `out` receives.

    Raises:
        ConfigError: an option is wrong.
        RuntimeError: a process or a peer failed.
    """
    if options.huge_pages:
        use_huge_pages()
    _validate(options)
    import torch

    from tide_mega.inference.model_config import ModelShape
    from tide_mega.parallel.device import choose_device, set_threads

    device = choose_device(options.device, 0)
    set_threads(options.threads, 1)
    torch.manual_seed(0)
    shape = ModelShape(
        num_layers=options.layers,
        hidden_size=options.width,
        ffn_hidden_size=options.ffn_width,
        num_heads=options.heads,
        num_groups=options.groups,
        head_size=options.width // options.heads,
        vocab_size=options.vocab,
        max_positions=max(512, options.context + 2 * options.turns),
    )
    found: dict[str, Any] = {"options": asdict(options), "device": device.name, "lines": []}
    with tempfile.TemporaryDirectory(prefix="tide-decode-", dir=options.folder) as folder:
        root = Path(folder)
        for batch in options.batches:
            print(f"measuring batch {batch}", file=sys.stderr)
            found["lines"] += _measure_batch(options, shape, batch, device, root)
        if options.disk:
            print("measuring a cold prompt and resident memory", file=sys.stderr)
            found |= _measure_disk(options, shape, root)
    if "llama.cpp" in options.peers:
        found["llama_cpp"] = _measure_llama_cpp(options, shape)
    return found


def _measure_batch(
    options: DecodeOptions, shape: Any, batch: int, device: Any, root: Path
) -> list[dict[str, Any]]:
    import torch

    from tide_mega.hf.memory_tide import open_store
    from tide_mega.hf.rows_tide import RowFormat
    from tide_mega.lab.bench.decode import DecodeCase, SharedBase, table_in_memory, take_turns
    from tide_mega.lab.bench.decode_disk import write_random_sidecar
    from tide_mega.lab.bench.text import draw_ids

    at = device.torch_device
    case = DecodeCase(shape, options.dtype, batch, shape.max_positions, at)
    base = SharedBase(case)
    decoders = {"K=0": base.decoder()}
    for blocks in options.blocks:
        for kind in options.kinds:
            if kind == options.kinds[0] or blocks in options.kinds_blocks:
                table = table_in_memory(kind, blocks, shape.hidden_size, options.rows, at)
                decoders[f"K={blocks} {kind}"] = base.decoder(blocks, table)
    rows = options.rows
    ids_TB = draw_ids("zipf", (3 + options.turns) * batch, rows, seed=1).view(-1, batch)
    if options.disk:
        path, row_format = root / "memory.tide", RowFormat(DISK_KIND, options.disk_blocks, shape.hidden_size)
        if not path.exists():
            write_random_sidecar(path, row_format, shape.vocab_size)
        store = open_store(
            path, row_format, rows=shape.vocab_size, fingerprint=None, place="disk", cache=options.cache
        )
        store.rows(draw_ids("zipf", 65_536, rows, seed=2).to(at), torch.float32)
        store.stats.hits = store.stats.misses = 0
        decoders[f"K={options.disk_blocks} disk"] = base.decoder(options.disk_blocks, store)
    if options.int8 and not device.is_cuda:
        decoders["int8 weights"] = SharedBase(case, int8=True).decoder()
    prompt = [[0] * options.context] * batch
    for decoder in decoders.values():
        decoder.prefill(prompt)
    steps: dict[str, Any] = {name: decoder.step for name, decoder in decoders.items()}
    if "transformers" in options.peers and _installed("transformers"):
        from tide_mega.lab.bench.decode_peers import transformers_step

        steps["transformers"] = transformers_step(case, options.context)
    turns = take_turns(steps, ids_TB, options.turns, warmup=3, is_cuda=device.is_cuda)
    lines = []
    for name, times in turns.items():
        line: dict[str, Any] = {"batch": batch, "name": name}
        for clock in ("cpu", "wall"):
            line[clock] = times.median(clock)
            line[f"{clock}_ratio"] = asdict(times.ratio(turns["K=0"], clock))
        lines.append(line)
    if options.disk:
        stats = store.stats
        lines[list(turns).index(f"K={options.disk_blocks} disk")]["hits"] = stats.hits / (
            stats.hits + stats.misses
        )
        store.close()
    return lines


def _measure_disk(options: DecodeOptions, shape: Any, root: Path) -> dict[str, Any]:
    from tide_mega.hf.rows_tide import RowFormat
    from tide_mega.lab.bench.decode_disk import cold_prompt_seconds, resident_bytes, write_folders

    row_format = RowFormat(DISK_KIND, options.disk_blocks, shape.hidden_size)
    cold = cold_prompt_seconds(root / "memory.tide", row_format, shape.vocab_size, options.prompt, repeats=5)
    (root / "memory.tide").unlink()
    folders = write_folders(root, shape, options.disk_blocks, DISK_KIND, options.dtype)
    held = [resident_bytes(folder, options.dtype, options.cache, tokens=64) for folder in folders]
    return {
        "cold": {"tokens": options.prompt, "median": statistics.median(cold), "seconds": cold},
        "resident": {"base": held[0]["resident"], "tide": held[1]["resident"], "cache": held[1]["cache"]},
    }


def _measure_llama_cpp(options: DecodeOptions, shape: Any) -> dict[str, Any]:
    if not _installed("xllamacpp", "gguf"):
        return {}
    from tide_mega.lab.bench.decode_peers import llama_cpp

    found = {}
    for kind in ("f32", "q8_0"):
        print(f"measuring llama.cpp {kind}", file=sys.stderr)
        times = llama_cpp(shape, kind, options.context, blocks=5, tokens=16)
        found[kind] = {
            "cpu": statistics.median(t[0] for t in times),
            "wall": statistics.median(t[1] for t in times),
        }
    return found


def _installed(*modules: str) -> bool:
    from tide_mega.lab.bench.decode_peers import installed

    return installed(*modules)


def _validate(options: DecodeOptions) -> None:
    from tide_mega.hf.rows_tide import KINDS

    for key in (
        "layers",
        "width",
        "ffn_width",
        "heads",
        "groups",
        "vocab",
        "rows",
        "context",
        "turns",
        "threads",
        "disk_blocks",
        "prompt",
    ):
        if getattr(options, key) < 1:
            refuse(key, getattr(options, key), "is too small", "give 1 or more")
    if options.width % options.heads or options.heads % options.groups:
        refuse("heads", options.heads, "divides no width, or is no multiple of groups", "give others")
    for key in ("blocks", "batches"):
        if any(value < 1 for value in getattr(options, key)) or (key == "batches" and not options.batches):
            refuse(
                key, getattr(options, key), "is not a list of numbers from 1", "give one or more, as in 1,8"
            )
    if options.rows > options.vocab or options.prompt > options.vocab:
        refuse("vocab", options.vocab, "is smaller than rows or prompt", "give fewer of these")
    if options.dtype not in ("fp32", "bf16"):
        refuse("dtype", options.dtype, "is unknown", "use fp32 or bf16")
    if not options.kinds or not set(options.kinds) <= set(KINDS) - {"rank"}:
        refuse(
            "kinds",
            options.kinds,
            "are not formats of rows",
            f"use {', '.join(k for k in KINDS if k != 'rank')}",
        )
    if not set(options.peers) <= {"transformers", "llama.cpp"}:
        refuse("peers", options.peers, "are not known", "use transformers and llama.cpp, or []")
    if options.device not in ("auto", "cpu", "cuda"):
        refuse("device", options.device, "is unknown", "use auto, cpu, cuda")
    if not 0 < options.cache <= 1:
        refuse("cache", options.cache, "is no part of the rows", "use more than 0, at most 1")
    if options.out is not None and not Path(options.out).parent.is_dir():
        refuse("out", options.out, "lies in a folder that does not exist", "make the folder first")


def show(found: dict[str, Any]) -> str:
    """The tables, as text."""
    from tide_mega.lab.bench.show import megabytes, milliseconds
    from tide_mega.text_table import aligned

    options = found["options"]
    parameters = "{layers} layers, D = {width:,}, V = {vocab:,}, {dtype}, {threads} thread(s)".format(
        **options
    )
    rows = []
    for line in found["lines"]:
        row = [str(line["batch"]), line["name"]]
        for clock in ("cpu", "wall"):
            ratio = line[f"{clock}_ratio"]
            row += [
                milliseconds(line[clock]),
                f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})",
            ]
        row.append(f"{line['hits']:.0%}" if "hits" in line else "")
        rows.append(row)
    head = ["batch", "decoder", "cpu ms", "x K=0, cpu", "wall ms", "x K=0, wall", "hits"]
    parts = [f"A step on {found['device']}: {parameters}", aligned([head], rows)]
    for kind, times in found.get("llama_cpp", {}).items():
        parts.append(
            f"llama.cpp {kind}: {milliseconds(times['cpu'])} ms cpu, {milliseconds(times['wall'])} ms wall"
        )
    if "cold" in found:
        cold, held = found["cold"], found["resident"]
        parts.append(
            f"cold prompt of {cold['tokens']:,} different tokens from disk: {milliseconds(cold['median'])} ms "
            f"(median of {len(cold['seconds'])})"
        )
        more = held["tide"] / (held["base"] + held["cache"]) - 1
        parts.append(
            f"resident: K=0 {megabytes(held['base'])} MB, K={options['disk_blocks']} on disk "
            f"{megabytes(held['tide'])} MB, of which at most {megabytes(held['cache'])} MB are cache: {more:+.1%}"
        )
    return "\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status: 0, 1 where a measurement failed, 2 for a bad option."""
    options = parse_tool_cli(DecodeOptions, argv, doc=__doc__ or "")
    return run_tool(lambda: bench(options), show, options.out, failures=(RuntimeError,))


if __name__ == "__main__":
    tool_entry(main)
