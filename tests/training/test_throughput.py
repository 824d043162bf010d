from collections.abc import Callable

import pytest
import torch

from tide_mega.config.hydra_door import compose
from tide_mega.parallel.device import Device
from tide_mega.training.goodput import Ledger
from tide_mega.training.setup import device_peak
from tide_mega.training.throughput import Throughput, describe_peak, measured_cpu_tflops, peak_tflops


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def meter(clock: Callable[[], float], peak: float | None = 2e-9, **values: int) -> Throughput:
    options = {"devices": 2, "total_steps": 20, **values}
    return Throughput(flops_per_token=10.0, peak_tflops=peak, clock=clock, **options)  # type: ignore[arg-type]


def test_speed_mfu_and_eta_of_a_window() -> None:
    clock = Clock()
    throughput = meter(clock)
    throughput.start(4, 200)
    clock.now += 8
    reading = throughput.read(8, 400)
    assert reading.tokens_per_second == 25.0
    # 12.5 tokens/s a device at 10 FLOPs each, of 2000 FLOP/s.
    assert reading.mfu == pytest.approx(125 / 2000)
    assert reading.step_seconds == 2.0
    assert reading.eta_seconds == 24.0


def test_evaluation_and_checkpoints_do_not_count_by_the_ledgers_clock() -> None:
    clock = Clock()
    ledger = Ledger(clock=clock, born=clock.now)
    throughput = meter(ledger.training_seconds)
    ledger.enter("compute")
    throughput.start(0, 0)
    clock.now += 1
    with ledger.spend("evaluation"):
        clock.now += 1000
    with ledger.spend("data wait"):
        clock.now += 1
    with pytest.raises(RuntimeError), ledger.spend("checkpoint"):
        clock.now += 1000
        raise RuntimeError
    assert throughput.read(2, 100).step_seconds == 1.0
    clock.now += 3
    assert throughput.read(3, 150).step_seconds == 3.0


def test_eta_follows_the_last_windows_only() -> None:
    clock = Clock()
    throughput = meter(clock, eta_windows=2, total_steps=100)
    throughput.start(0, 0)
    for step, seconds in ((10, 1000.0), (20, 10.0), (30, 30.0)):
        clock.now += seconds
        reading = throughput.read(step, 50 * step)
    assert reading.eta_seconds == 70 * 2.0
    clock.now += 1
    assert throughput.read(101, 5050).eta_seconds == 0.0


def test_speed_counts_the_tokens_that_were_read_whatever_the_batch() -> None:
    clock = Clock()
    throughput = meter(clock)
    throughput.start(0, 0)
    clock.now += 2
    assert throughput.read(2, 60).tokens_per_second == 30.0


def test_without_a_peak_there_is_no_mfu() -> None:
    clock = Clock()
    throughput = meter(clock, peak=None)
    throughput.start(0, 0)
    clock.now += 1
    assert throughput.read(1, 50).mfu is None


def test_misuse_is_named() -> None:
    throughput = meter(Clock())
    with pytest.raises(ValueError, match="not started"):
        throughput.read(1, 50)
    throughput.start(3, 0)
    with pytest.raises(ValueError, match="no step since the last reading: 3 steps then, 3 now"):
        throughput.read(3, 0)


@pytest.mark.parametrize(
    ("name", "bf16"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA H100 NVL", 835.0),
        ("NVIDIA H200", 989.0),
        ("NVIDIA H200 NVL", 835.0),
        ("NVIDIA GH200 480GB", 989.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA B300 SXM6 AC", 2250.0),
        ("NVIDIA GB300", 2500.0),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_peaks_of_known_devices(name: str, bf16: float | None) -> None:
    assert peak_tflops(name, "bf16") == bf16
    fp32 = peak_tflops(name, "fp32")
    assert (fp32 is None) == (bf16 is None)
    assert bf16 is None or fp32 is None or fp32 < bf16 / 8


@pytest.mark.parametrize("profile", ["h100", "h200", "b200", "gb200", "b300", "gb300"])
@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [("NVIDIA H100 PCIe", "bf16", 756.0), ("NVIDIA H100 NVL", "bf16", 835.0), ("NVIDIA GB200", "fp32", 80.0)],
)
def test_no_profile_stands_above_what_the_device_is(
    profile: str, name: str, precision: str, tflops: float
) -> None:
    config = compose([f"cluster={profile}", f"trainer.precision={precision}"])
    device = Device(torch.device("cuda", 0), "nccl", name)
    assert device_peak(config, device, is_quiet=True) == tflops
    own = compose([f"cluster={profile}", "cluster.peak_tflops=123"])
    assert device_peak(own, device, is_quiet=True) == 123.0
    assert config.cluster.memory_gb


def test_peak_of_an_unknown_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="'fp16'"):
        peak_tflops("NVIDIA H100", "fp16")


def test_cpu_peak_is_measured_and_plausible() -> None:
    tflops = measured_cpu_tflops(torch.float32, seconds=0.02, size=256)
    assert 1e-4 < tflops < 100


def test_the_log_says_where_the_peak_is_from() -> None:
    assert "set cluster.peak_tflops" in describe_peak("GTX", None)
    assert "measured" in describe_peak("cpu", 0.1)
    assert "(cluster.peak_tflops)" in describe_peak("cpu", 0.1, configured=True)
    assert "989 TFLOP/s" in describe_peak("NVIDIA H100", 989.0)
