"""Most resident memory of a training process on CPU; run as a module, it measures its own process."""

import json
import sys
from typing import Any

from tide_mega.bench.resident import forget_peak, in_fresh_process, resident
from tide_mega.bench.step_case import StepCase
from tide_mega.bench.timing import Stopwatch
from tide_mega.config.hydra_door import from_yaml, to_yaml
from tide_mega.config.schema import TideConfig
from tide_mega.parallel.device import choose_device, set_threads
from tide_mega.parallel.groups import World, start_distributed, stop_distributed

STEPS = 2
"""The first makes buffers that stay."""


def resident_peak(config: TideConfig, accumulation: int, threads: int) -> int:
    """Bytes above what is resident after the imports, of model, optimizer and steps in a fresh process (Linux).

    Raises:
        RuntimeError: the process failed.
    """
    task = {"config": to_yaml(config), "accumulation": accumulation, "threads": threads}
    return in_fresh_process("tide_mega.bench.step_peak", task, threads)["peak"]


def _measure(task: dict[str, Any]) -> int:
    set_threads(task["threads"], 1)
    device = choose_device("cpu", 0)
    start_distributed(device, World(0, 1, 0, 1), 10)
    before = resident("VmRSS")
    forget_peak()
    case = StepCase(from_yaml(task["config"]), device, task["accumulation"])
    for _ in range(STEPS):
        case.step(Stopwatch(device.torch_device))
    peak = resident("VmHWM") - before
    case.close()
    stop_distributed()
    return peak


if __name__ == "__main__":
    print(json.dumps({"peak": _measure(json.loads(sys.argv[1]))}))
