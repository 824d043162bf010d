"""trainer.precision=auto."""

import pytest
import torch

from tests.support.runs import tiny
from tide_mega.parallel import device as device_module
from tide_mega.parallel.device import Device
from tide_mega.run.folder import open_run_folder
from tide_mega.training.setup import resolve_precision

CPU = Device(torch.device("cpu"), "gloo", "cpu")


@pytest.fixture
def flags(monkeypatch):
    """Set the processor's flags; a world of one needs no process group."""
    monkeypatch.setattr("tide_mega.training.setup.dist.all_reduce", lambda tensor, op: None)

    def set_flags(*names):
        monkeypatch.setattr(device_module, "_cpu_flags", lambda: set(names))

    return set_flags


@pytest.mark.parametrize(
    ("names", "precision"),
    [(("avx512f",), "fp32"), (("avx512f", "avx512_bf16"), "bf16"), (("amx_bf16",), "bf16"), ((), "fp32")],
)
def test_auto_takes_bf16_where_the_processor_multiplies_in_it(tmp_path, flags, names, precision):
    flags(*names)
    config = tiny(tmp_path, tmp_path, "trainer.precision=auto")
    assert resolve_precision(config, CPU).trainer.precision == precision
    assert config.trainer.precision == "auto"


def test_a_choice_stays(tmp_path, flags):
    flags("amx_bf16")
    assert resolve_precision(tiny(tmp_path, tmp_path), CPU).trainer.precision == "fp32"


def test_a_run_keeps_what_it_began_with_on_another_machine(tmp_path, flags):
    config = tiny(tmp_path, tmp_path, "trainer.precision=auto")
    flags("amx_bf16")
    open_run_folder(resolve_precision(config, CPU), world_size=1, device=CPU.torch_device, writes=True)
    flags()
    assert resolve_precision(config, CPU).trainer.precision == "bf16"
