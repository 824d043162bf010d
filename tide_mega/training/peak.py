"""Peak arithmetic rate of a device, the denominator of MFU."""

import time

import torch

# Dense TFLOP/s (bf16 tensor cores, fp32 without TF32) from NVIDIA's data sheets, which print the bf16
# figure with sparsity, twice this. The first name contained in the device's name counts.
_PEAK_TFLOPS: tuple[tuple[str, dict[str, float]], ...] = (
    ("GB300", {"bf16": 2500.0, "fp32": 80.0}),
    ("B300", {"bf16": 2250.0, "fp32": 75.0}),
    ("GB200", {"bf16": 2500.0, "fp32": 80.0}),
    ("B200", {"bf16": 2250.0, "fp32": 75.0}),
    ("H200 NVL", {"bf16": 835.0, "fp32": 60.0}),
    ("H200", {"bf16": 989.0, "fp32": 67.0}),
    ("H100 NVL", {"bf16": 835.0, "fp32": 60.0}),
    ("H100 PCIe", {"bf16": 756.0, "fp32": 51.0}),
    ("H100", {"bf16": 989.0, "fp32": 67.0}),
    ("A100", {"bf16": 312.0, "fp32": 19.5}),
)
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def peak_tflops(device_name: str, precision: str) -> float | None:
    """Peak TFLOP/s of one device for dense matrix products; None where the device is not known.

    `device_name` is what torch.cuda.get_device_name says, or "cpu". For "cpu" the rate is measured, by
    matrix products for about 0.3 s on the threads torch has now: an attainable rate, not a data sheet's.

    Raises:
        ValueError: if `precision` is not bf16 or fp32.
    """
    if precision not in _DTYPES:
        raise ValueError(f"precision is {precision!r}: must be one of {', '.join(_DTYPES)}")
    if device_name == "cpu":
        return measured_cpu_tflops(_DTYPES[precision])
    for name, peaks in _PEAK_TFLOPS:
        if name.lower() in device_name.lower():
            return peaks[precision]
    return None


def describe_peak(device_name: str, tflops: float | None, *, configured: bool = False) -> str:
    """One line for the start-up log: the peak that MFU is a part of, and where it is from.

    `configured` says that it is the user's own cluster.peak_tflops.
    """
    if tflops is None:
        return f"MFU is left out: no peak known for {device_name!r}; set cluster.peak_tflops"
    source = "measured with matrix products for 0.3 s" if device_name == "cpu" else "data sheet, dense"
    source = "cluster.peak_tflops" if configured else source
    return f"MFU against {tflops:.4g} TFLOP/s a device ({source})"


def measured_cpu_tflops(dtype: torch.dtype, seconds: float = 0.3, size: int = 1024) -> float:
    """Best TFLOP/s of a [size, size] product within `seconds`, after one to warm up."""
    a = torch.ones(size, size, dtype=dtype)
    b = torch.ones(size, size, dtype=dtype)
    torch.mm(a, b)
    best = float("inf")
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end or best == float("inf"):
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12
