"""What a plan assumes of a cluster, each number with its source; every one can be given on the command line."""

from dataclasses import dataclass, fields, replace
from typing import Any

from tide_mega.config.gpus import GPUS, Gpu
from tide_mega.errors import refuse

GPUS_IN_A_NODE = 8
PRODUCT_SHARES = ((1024, 0.70), (512, 0.60), (256, 0.45), (128, 0.30), (0, 0.15))
"""Smallest dimension of a matrix product -> share of the peak that it reaches; the first that it is not below.

Assumed, not measured: large bf16 products stay below an H100's peak because of its power limit, and small ones
leave some of its 132 multiprocessors idle."""
ATTENTION_SHARE = 0.34
"""Share of the peak that attention reaches: 335 of 989 TFLOP/s, FlashAttention-2 on an H100 (arXiv 2307.08691)."""


@dataclass(frozen=True)
class Rates:
    """Of one GPU and its links; seconds, and bytes or operations per second."""

    gpu: str
    bf16_tflops: float
    """Dense peak (data sheet)."""
    fp32_tflops: float
    """Peak without TF32 (data sheet)."""
    memory_gbs: float
    """Memory bandwidth (data sheet)."""
    memory_share: float = 0.80
    """Of the bandwidth that elementwise kernels reach; assumed."""
    kernel_us: float = 2.0
    """Shortest kernel, its start included; assumed."""
    launch_us: float = 5.0
    """Time of the host for one operation of PyTorch in eager mode; assumed."""
    wait_us: float = 15.0
    """A host wait: the copy back, and the queue that has run dry; assumed."""
    nvlink_gbs: float = 450.0
    """Of one GPU within a node, one direction (data sheet: 900 GB/s both ways for NVLink 4)."""
    network_gbs: float = 50.0
    """Of one GPU across nodes, one direction: one 400 Gbit/s adapter each."""
    link_share: float = 0.75
    """Of a link's bandwidth that NCCL reaches with large messages; assumed."""
    nvlink_us: float = 10.0
    """Latency of a collective within a node; assumed."""
    network_us: float = 25.0
    """Latency of one hop across nodes; assumed."""
    disk_gbs: float = 2.0
    """What one node writes to shared storage; assumed, ask the site."""

    def peak(self, width: int) -> float:
        """Return the peak rate of products of elements of `width` bytes."""
        return 1e12 * (self.bf16_tflops if width == 2 else self.fp32_tflops)


NVLINK = {"B": 900.0, "H": 450.0, "A": 300.0}
"""GB/s one way by the generation's first letter (NVLink 5, 4 and 3)."""


def rates_of(name: str, **given: Any) -> Rates:
    """Return the rates of a model of GPU, with those that are given in place of its own.

    Raises:
        ConfigError: the model is not known, or a rate is not positive.
    """
    gpu = _find(name)
    letter = gpu.name.removeprefix("G")[0]
    rates = Rates(
        gpu=gpu.name,
        bf16_tflops=gpu.bf16_tflops,
        fp32_tflops=gpu.fp32_tflops,
        memory_gbs=gpu.bandwidth / 1e9,
        nvlink_gbs=NVLINK.get(letter, 300.0),
    )
    for key, value in given.items():
        if value is not None and not value > 0:
            refuse(key, value, "is no rate or time", "give a number above 0")
    return replace(rates, **{key: value for key, value in given.items() if value is not None})


def _find(name: str) -> Gpu:
    for gpu in GPUS:
        if gpu.name.lower() == name.lower():
            return gpu
    known = ", ".join(gpu.name.lower() for gpu in GPUS)
    return refuse("gpu", name, "is not known", f"use one of {known}")


def describe(rates: Rates) -> list[tuple[str, str]]:
    """Return each assumption as (key, value)."""
    return [(field.name, f"{getattr(rates, field.name)}") for field in fields(rates)]
