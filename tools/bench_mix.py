"""The mix alone, forward and backward with all gradients: each version against plain autograd and the byte floor.

    python tools/bench_mix.py
    python tools/bench_mix.py tokens=16384 width=2048 blocks=2,8,24 layers=1,8 dtype=bf16 out=mix.json plot=mix.png

`autograd` materialises [N, K, D] in each layer and lets autograd carry the gradient to fp32 rows; `cpu` or
`triton` is what training runs on this device. Versions take turns in one process; times are medians, with half the
interquartile range after ±. `peak` is the most memory held above the inputs: on CPU resident memory of a fresh
process per version (Linux), on a GPU allocated memory. The floor is the byte count of tide_mega.lab.bench.mix over
the bandwidth measured here with a copy and a triad of large tensors. `of floor` is floor over time; above 100 %
the caches have helped. `error` is the largest difference of outputs and gradients from autograd in fp32 on the
same inputs, over the largest value of each.
"""

import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tide_mega.config.command_line import tool_entry
from tide_mega.config.hydra_door import parse_tool_cli
from tide_mega.errors import refuse
from tide_mega.lab.bench.tool import run_tool


@dataclass
class MixOptions:
    """Options of `tools/bench_mix.py`."""

    tokens: int = 4096
    width: int = 1024
    blocks: list[int] = field(default_factory=lambda: [8])
    """Values of K."""
    layers: list[int] = field(default_factory=lambda: [1, 8])
    """Layers that add to one row gradient, which is summed after the last."""
    dtype: str = "auto"
    """bf16, fp32, or auto: bf16 on a GPU, fp32 on CPU."""
    distribution: str = "zipf"
    """Of token ids: zipf, uniform, or one (a single type)."""
    vocab: int = 128_256
    versions: list[str] | None = None
    """Beside autograd: naive, cpu, triton; null takes the one training would run."""
    device: str = "auto"
    threads: int | None = None
    """CPU threads; null means all cores."""
    repeats: int = 9
    """Timed turns of each version."""
    peaks: bool = True
    """Whether to measure memory too."""
    bandwidth_mb: int | None = None
    """10^6 bytes of each tensor of the bandwidth's measurement; null chooses by device."""
    out: str | None = None
    """JSON file to write."""
    plot: str | None = None
    """PNG file to write."""


def bench(options: MixOptions) -> dict[str, Any]:
    """Measure every K and number of layers; return what `out` receives.

    Raises:
        ConfigError: an option is wrong.
        RuntimeError: a process that measures memory failed.
    """
    _validate(options)
    import torch

    from tide_mega.config.schema import KernelConfig
    from tide_mega.kernels.choice import choose_kernels
    from tide_mega.lab.bench.measure import measure_bandwidth
    from tide_mega.lab.bench.mix import BASELINE, MixCase, measure_mix
    from tide_mega.parallel.device import choose_device, set_threads

    device = choose_device(options.device, 0)
    threads = set_threads(options.threads, 1)
    dtype = options.dtype if options.dtype != "auto" else "bf16" if device.is_cuda else "fp32"
    print(f"measuring the bandwidth of {device.name}", file=sys.stderr)
    size = None if options.bandwidth_mb is None else options.bandwidth_mb * 10**6
    bandwidth = measure_bandwidth(device.torch_device, size=size)
    lines: list[dict[str, Any]] = []
    left_out: list[str] = []
    for blocks in options.blocks:
        wanted = options.versions or ["auto"]
        chosen = [choose_kernels(KernelConfig(mix=v), device.torch_device, blocks).mix for v in wanted]
        for layers in options.layers:
            print(f"measuring K={blocks}, {layers} layers", file=sys.stderr)
            case = MixCase(
                options.tokens, options.width, blocks, layers, dtype, options.distribution, options.vocab
            )
            try:
                lines += measure_mix(
                    case,
                    [BASELINE, *chosen],
                    device.torch_device,
                    repeats=options.repeats,
                    bandwidth=bandwidth,
                    peak_threads=threads if options.peaks else None,
                )
            except torch.OutOfMemoryError:
                left_out.append(f"K={blocks} with {layers} layers is left out: autograd runs out of memory")
    return {
        "options": {**asdict(options), "dtype": dtype, "threads": threads, "device": device.name},
        "bandwidth": bandwidth,
        "lines": lines,
        "left_out": left_out,
    }


def _validate(options: MixOptions) -> None:
    from tide_mega.lab.bench.text import DISTRIBUTIONS

    for key in ("tokens", "width", "vocab", "repeats", "threads", "bandwidth_mb"):
        value = getattr(options, key)
        if value is not None and value < 1:
            refuse(key, value, "is too small", "give 1 or more")
    for key in ("blocks", "layers"):
        values = getattr(options, key)
        if not values or min(values) < 1:
            refuse(key, values, "is not a list of numbers from 1", "give one or more, as in 2,8")
    for key, choices in {"dtype": ("auto", "bf16", "fp32"), "distribution": DISTRIBUTIONS}.items():
        if getattr(options, key) not in choices:
            refuse(key, getattr(options, key), "is unknown", f"use {', '.join(choices)}")
    for version in options.versions or []:
        if version not in ("naive", "cpu", "triton"):
            refuse("versions", version, "is unknown", "use naive, cpu, triton")
    if options.device not in ("auto", "cpu", "cuda"):
        refuse("device", options.device, "is unknown", "use auto, cpu, cuda")
    for key in ("out", "plot"):
        path = getattr(options, key)
        if path is not None and not Path(path).parent.is_dir():
            refuse(key, path, "lies in a folder that does not exist", "make the folder first")


def show(found: dict[str, Any]) -> str:
    """The table, as text; times are those of one layer."""
    from tide_mega.lab.bench.show import megabytes, milliseconds
    from tide_mega.text_table import aligned

    head = [
        "K",
        "layers",
        "types",
        "version",
        "forward ms",
        "backward ms",
        "rows' grad ms",
        "total ms",
        "x faster",
    ]
    head += ["floor ms", "of floor", "fwd", "bwd", "rows", "peak MB", "x less", "error"]
    rows = []
    for line in found["lines"]:
        layers, seconds = line["layers"], line["seconds"]
        row = [str(line["blocks"]), str(layers), f"{line['rows']:,}", line["version"]]
        for region in ("forward", "backward", "row gradient"):
            part = seconds.get(region)
            row.append("(in bwd)" if part is None else milliseconds(part["median"] / layers))
        half = (seconds["total"]["high"] - seconds["total"]["low"]) / 2 / layers
        row.append(f"{milliseconds(seconds['total']['median'] / layers)} ±{milliseconds(half)}")
        row += [f"{line['times_faster']:.2f}", milliseconds(sum(line["floor_seconds"].values()) / layers)]
        parts = [line["of_floor"].get(region) for region in ("total", "forward", "backward", "row gradient")]
        row += ["-" if part is None else f"{part:.0%}" for part in parts]
        row += [megabytes(line["peak"]), f"{line['times_less']:.2f}"] if "peak" in line else ["-", "-"]
        row.append(f"{line['error']:.0e}")
        rows.append(row)
    options = found["options"]
    return (
        f"The mix of one layer: N = {options['tokens']:,}, D = {options['width']:,}, {options['dtype']}, "
        f"{options['distribution']} ids, on {options['device']}"
        + (f" with {options['threads']} threads" if options["device"] == "cpu" else "")
        + f"; measured bandwidth {found['bandwidth'] / 1e9:,.1f} GB/s\n"
        + "\n".join([aligned([head], rows), *found["left_out"]])
    )


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status: 0, 1 where a measurement failed, 2 for a bad option."""
    options = parse_tool_cli(MixOptions, argv, doc=__doc__ or "")

    def plot(found: dict[str, Any]) -> None:
        from tide_mega.lab.bench.mix import plot_mix

        if options.plot is not None:
            plot_mix(found, Path(options.plot))

    return run_tool(lambda: bench(options), show, options.out, plot=plot, failures=(RuntimeError,))


if __name__ == "__main__":
    tool_entry(main)
