"""Data-sheet figures of GPUs: what MFU is a part of, and what byte counts are divided by.

Dense rates (bf16 on tensor cores, fp32 without TF32) and memory bandwidth from NVIDIA's data sheets, which print
the bf16 rate with sparsity, twice the dense one.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One model of GPU."""

    name: str
    """As `torch.cuda.get_device_name` contains it, in any case of letters."""
    bf16_tflops: float
    fp32_tflops: float
    bandwidth: float
    """Of its memory, in bytes per second."""

    def tflops(self, precision: str) -> float:
        """Return the dense peak of "bf16" or "fp32"."""
        return {"bf16": self.bf16_tflops, "fp32": self.fp32_tflops}[precision]


GPUS = (
    Gpu("GB300", 2500.0, 80.0, 8.0e12),
    Gpu("B300", 2250.0, 75.0, 8.0e12),
    Gpu("GB200", 2500.0, 80.0, 8.0e12),
    Gpu("B200", 2250.0, 75.0, 8.0e12),
    Gpu("H200 NVL", 835.0, 60.0, 4.8e12),
    Gpu("H200", 989.0, 67.0, 4.8e12),
    Gpu("H100 NVL", 835.0, 60.0, 3.9e12),
    Gpu("H100 PCIe", 756.0, 51.0, 2.0e12),
    Gpu("H100", 989.0, 67.0, 3.35e12),
    Gpu("A100", 312.0, 19.5, 1.555e12),
)
"""The first whose name a device's name contains is the device's model; the A100's bandwidth is that of 40 GB."""


def find_gpu(device_name: str) -> Gpu | None:
    """Return the model of a device by what `torch.cuda.get_device_name` says; None for an unknown one."""
    return next((gpu for gpu in GPUS if gpu.name.lower() in device_name.lower()), None)
