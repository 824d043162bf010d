"""The bandwidth of this machine's memory, measured: what byte counts are divided by to give a floor."""

import torch

from tide_mega.bench.timing import Stopwatch, take_turns

GPU_BYTES, CPU_BYTES = 1 << 30, 1 << 28
"""Of one tensor, so that caches (50 MB on an H100, tens to hundreds on a server's CPU) hold little of it."""


def measure_bandwidth(device: torch.device, repeats: int = 7, size: int | None = None) -> float:
    """Bytes per second, read plus written, of the better of a copy and a triad (c = a + 3 b) of large tensors.

    The best of the repeats: other work on the machine can only slow it down. On a CPU a store also reads the
    line it writes unless it goes past the caches, which is not counted, so a floor made of this may be beaten
    by work that mostly reads.

    Args:
        device: to measure.
        repeats: of each.
        size: bytes of each tensor.
    """
    values = (size or (GPU_BYTES if device.type == "cuda" else CPU_BYTES)) // 4
    a, b, c = (torch.ones(values, device=device) for _ in range(3))

    def copy(watch: Stopwatch) -> None:
        c.copy_(a)
        watch.mark("copy")

    def triad(watch: Stopwatch) -> None:
        torch.add(a, b, alpha=3.0, out=c)
        watch.mark("triad")

    found = take_turns({"copy": copy, "triad": triad}, repeats, device)
    moved = {"copy": 8 * values, "triad": 12 * values}
    return max(moved[name] / min(found[name]["total"]) for name in moved)
