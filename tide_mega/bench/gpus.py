"""Memory bandwidth of GPUs by name, for predictions."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuSpeed:
    """A GPU from its data sheet."""

    name: str
    """As torch.cuda.get_device_name contains it; its peak is in tide_mega.training.peak."""
    bandwidth: float
    """Bytes per second."""


GPUS = {
    "h100": GpuSpeed("H100", 3.35e12),
    "h200": GpuSpeed("H200", 4.8e12),
    "b200": GpuSpeed("B200", 8.0e12),
}
