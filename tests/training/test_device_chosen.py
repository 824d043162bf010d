"""A training on the CPU of a machine that has a GPU: the device chosen decides, for DeepSpeed and megatron too."""

import json
import subprocess
import sys
from pathlib import Path

from tests.support.runs import TINY

ROOT = Path(__file__).parents[2]
TRAIN_ON_CPU = """
import json, sys, torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1

class Stream:
    is_capturing = staticmethod(lambda: False)

# From torch 2.14 on an optimizer asks whether the machine's GPU, whatever computes, records a graph.
torch.accelerator.current_stream = lambda *_: Stream

from tide_mega.errors import ConfigError
from tide_mega.config.hydra_door import compose
from tide_mega.parallel.device import Device
from tide_mega.parallel.engine import load_deepspeed
from tide_mega.training.trainer import train

imported_early = "deepspeed" in sys.modules
folder = train(compose(sys.argv[1:]))
accelerator = sys.modules["deepspeed"].accelerator.get_accelerator()
try:
    load_deepspeed(Device(torch.device("cuda", 0), "nccl", "a GPU"))
    refused = ""
except ConfigError as error:
    refused = str(error)
print(json.dumps([imported_early, accelerator.device_name(), torch.cuda.is_initialized(), refused]))
"""


def test_the_cpu_is_used_where_it_was_chosen_and_there_is_a_gpu(tiny_data, tmp_path):
    words = [*TINY, f"data.path={tiny_data}", f"run.root={tmp_path}", "run.name=tiny", "trainer.max_steps=3"]
    done = subprocess.run(
        [sys.executable, "-c", TRAIN_ON_CPU, *words, "cluster.device=cpu", "parallel.recompute=full"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    imported_early, accelerator, is_initialized, refused = json.loads(done.stdout.splitlines()[-1])
    assert not imported_early
    assert accelerator == "cpu"
    assert not is_initialized
    assert "loaded DeepSpeed for cpu" in refused and "a process of its own" in refused
