"""Training steps with K memory blocks against the step without: time, MFU, memory, and a breakdown by operation.

    python tools/bench_step.py                                     # the demo's model, on this machine
    python tools/bench_step.py model=auto device=cuda micro_batch=8 plot=step.png out=step.json
    python tools/bench_step.py predict=true gpu=h100 model=1b      # from byte counts alone, no GPU needed

Steps run through the trainer's own stage, engine and optimizer, on random ids distributed as in text. All K take
turns in one process if their state fits the GPU together; otherwise each takes turns with K = 0 alone or, if even
that does not fit, runs between two runs of K = 0. A K that does not fit alone is named and left out. Times are
medians, with half the interquartile range after ±; `peak` is the peak memory of a step (GPU: allocated; CPU:
resident in a fresh process, above the imports). The breakdown times each operation by itself at the step's shapes,
multiplied by layers and microbatches, beside its floor: tide_mega.lab.bench.step_bytes over the bandwidth measured
here. MFU is relative to the data sheet's peak, on CPU to what matrix products reach here.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tide_mega.config.command_line import tool_entry
from tide_mega.config.hydra_door import parse_tool_cli
from tide_mega.errors import ConfigError, refuse
from tide_mega.lab.bench.step_case import StepOptions
from tide_mega.lab.bench.tool import run_tool

LARGEST_FIRST = ("3b", "1b", "750m", "350m")


def bench(options: StepOptions) -> dict[str, Any]:
    """Measure all K; return what `out` receives.

    Raises:
        ConfigError: an option is wrong, or nothing fits.
        RuntimeError: a process that measures memory failed.
    """
    from tide_mega.lab.bench.measure import measure_bandwidth
    from tide_mega.lab.bench.step_measure import measure_rounds
    from tide_mega.parallel.device import choose_device, set_threads
    from tide_mega.parallel.groups import World, start_distributed, stop_distributed
    from tide_mega.training.setup import device_peak

    device = choose_device(options.device, 0)
    threads = set_threads(options.threads, 1)
    fastest = "bf16" if device.has_fast_bf16() else "fp32"
    precision = fastest if options.precision == "auto" else options.precision
    room = _gpu_memory() if device.is_cuda else None
    model = options.model if options.model != "auto" else largest_model(options, precision, room)
    configs = {k: options.configuration(model, k, precision) for k in sorted({0, *options.blocks})}
    print(f"measuring the bandwidth of {device.name}", file=sys.stderr)
    size = None if options.bandwidth_mb is None else options.bandwidth_mb * 10**6
    bandwidth = measure_bandwidth(device.torch_device, size=size)
    deterministic = configs[0].trainer.deterministic
    start_distributed(device, World(0, 1, 0, 1), 30.0, deterministic=deterministic)
    peak = device_peak(configs[0], device, is_quiet=True)
    try:
        lines, left_out = measure_rounds(
            configs,
            device,
            room,
            accumulation=options.accumulation,
            steps=options.steps,
            warmup=options.warmup,
            op_repeats=options.op_repeats,
            bandwidth=bandwidth,
            peak_tflops=peak,
            peak_threads=threads if options.peaks else None,
        )
    finally:
        stop_distributed()
    ran = {"model": model, "precision": precision, "device": device.name, "threads": threads}
    ran |= {"seq_length": configs[0].data.seq_length, "layers": configs[0].model.num_layers}
    return {
        "options": {**asdict(options), **ran},
        "bandwidth": bandwidth,
        "peak_tflops": peak,
        "lines": lines,
        "left_out": left_out,
    }


def largest_model(options: StepOptions, precision: str, room: int | None) -> str:
    """Return the largest paper model whose state leaves room for activations at every K.

    Raises:
        ConfigError: none does, or there is no GPU.
    """
    from tide_mega.lab.bench.step_measure import fits

    if room is None:
        refuse("model", "auto", "needs a GPU to fit", "name a model")
    for model in LARGEST_FIRST:
        if fits([options.configuration(model, max(options.blocks), precision)], room):
            return model
    raise ConfigError(
        f"No paper model with K={max(options.blocks)} fits {room / 1e9:.1f} GB: give a smaller K or layers."
    )


def _gpu_memory() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory


def prediction(options: StepOptions) -> dict[str, Any]:
    """Predict every K but 0 at every accumulation, in bf16; return what `out` receives.

    Raises:
        ConfigError: an option is wrong.
    """
    from tide_mega.config.gpus import find_gpu
    from tide_mega.lab.bench.step_bytes import StepShape, predict

    gpu = find_gpu(options.gpu)
    assert gpu is not None
    config = options.configuration("1b" if options.model == "auto" else options.model, 0, "bf16")
    tokens = options.micro_batch * config.data.seq_length
    lines = []
    for accumulation in options.accumulations:
        for blocks in sorted({*options.blocks} - {0}):
            shape = StepShape.expected(config.model, blocks, tokens, accumulation)
            found = predict(
                shape,
                seq_length=config.data.seq_length,
                bandwidth=gpu.bandwidth,
                tflops=gpu.bf16_tflops,
                mfu=options.mfu,
                share=options.bandwidth_share,
                replicas=options.replicas,
            )
            lines.append(
                {
                    **{"blocks": blocks, "accumulation": accumulation, "tokens": tokens},
                    **{"micro_types": shape.micro_types, "step_types": shape.step_types},
                    **{"base_seconds": found.base_seconds, "seconds": found.seconds},
                    **{"overhead": found.overhead, "dominating": found.dominating},
                }
            )
    ran = {"model": config.model.name, "seq_length": config.data.seq_length, "tflops": gpu.bf16_tflops}
    return {"options": {**asdict(options), **ran}, "bandwidth": gpu.bandwidth, "lines": lines}


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return its exit status: 0, 1 where a measurement failed, 2 for a bad option."""
    from tide_mega.lab.bench.step_show import plot_measured, plot_predicted, show_measured, show_predicted

    options = parse_tool_cli(StepOptions, argv, doc=__doc__ or "")

    def measure() -> dict[str, Any]:
        options.validate()
        return prediction(options) if options.predict else bench(options)

    def plot(found: dict[str, Any]) -> None:
        if options.plot is not None:
            (plot_predicted if options.predict else plot_measured)(found, Path(options.plot))

    show = show_predicted if options.predict else show_measured
    return run_tool(measure, show, options.out, plot=plot, failures=(RuntimeError,))


if __name__ == "__main__":
    tool_entry(main)
