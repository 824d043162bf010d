"""Most memory one version of the mix holds above its inputs; run as a module, it measures its own process."""

import json
import sys
from dataclasses import asdict

import torch

from tide_mega.bench.mix_case import MixCase, make_inputs, run_mix
from tide_mega.bench.resident import forget_peak, in_fresh_process, resident
from tide_mega.bench.timing import Stopwatch


def mix_peak(case: MixCase, version: str, device: torch.device, threads: int) -> int:
    """Bytes above inputs, results included: of CUDA's allocator, or resident in a fresh process (Linux).

    Raises:
        RuntimeError: the process failed.
    """
    if device.type == "cuda":
        return _allocated_peak(case, version, device)
    task = {"case": asdict(case), "version": version, "threads": threads}
    return in_fresh_process("tide_mega.bench.mix_peak", task, threads)["peak"]


def _allocated_peak(case: MixCase, version: str, device: torch.device) -> int:
    inputs = make_inputs(case, version, device)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run_mix(inputs, version, Stopwatch(device))
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del results
    return peak


def _resident_peak(case: MixCase, version: str, threads: int) -> int:
    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    # What a first call leaves for good (threads' stacks, libraries' buffers) is not the mix's.
    tiny = MixCase(**{**asdict(case), "tokens": 64, "layers": 1})
    run_mix(make_inputs(tiny, version, cpu), version, Stopwatch(cpu))
    inputs = make_inputs(case, version, cpu)
    before = resident("VmRSS")
    forget_peak()
    run_mix(inputs, version, Stopwatch(cpu))
    return resident("VmHWM") - before


if __name__ == "__main__":
    task = json.loads(sys.argv[1])
    print(json.dumps({"peak": _resident_peak(MixCase(**task["case"]), task["version"], task["threads"])}))
