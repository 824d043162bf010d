#!/bin/bash
# deepspeed 0.19.8, torch 2.13.0 (CPU), one process, ZeRO-1, ZeRO-2 and ZeRO-3, bf16.
#
# Behaviour: with contiguous gradients, which are the default, a buffer of reduce_bucket_size elements is allocated however
# few weights the model has: by ZeRO-1 and ZeRO-2 within a step, by ZeRO-3 at the start. With buckets of 20,000,000 elements
# a model of 128 weights gets one of 40 MB; without contiguous gradients no tensor has more than 512 bytes.
#
# Output seen:
#   by default: buckets of 500,000,000, contiguous True
#   128 weights, buckets of 20,000,000, largest tensor in bytes:
#   ZeRO-1 at the start        512, in a step 40,000,000; not contiguous        512,        512
#   ZeRO-2 at the start        512, in a step 40,000,000; not contiguous        512,        512
#   ZeRO-3 at the start 40,000,000, in a step        512; not contiguous        512,        512
#
# Why it matters here: the default is 1 GB in bf16 on every rank, which a plan of memory has to count, and which a model
# of fewer weights pays for nothing. reduce_bucket_size should never be more than the weights that a rank has.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.13.0" "deepspeed==0.19.8" "numpy==2.4.6" >/dev/null
cat >"$work/bucket.py" <<'PYTHON'
import os

os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT="29872", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
os.environ["GLOO_SOCKET_IFNAME"] = "lo"
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import deepspeed
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

BUCKET = 20_000_000


class Largest(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation makes."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.bytes = max(self.bytes, tensor.nbytes)
        return result


def largest_tensors(stage, contiguous):
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    config = {
        "train_batch_size": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET, "contiguous_gradients": contiguous},
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.AdamW(model.parameters())
    with Largest() as at_the_start:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    with Largest() as in_a_step:
        engine.backward(engine(torch.ones(1, 8, dtype=torch.bfloat16)).float().square().sum())
        engine.step()
    return at_the_start.bytes, in_a_step.bytes


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
measured = {stage: largest_tensors(stage, True) + largest_tensors(stage, False) for stage in (1, 2, 3)}
default = DeepSpeedZeroConfig()
print(f"by default: buckets of {default.reduce_bucket_size:,}, contiguous {default.contiguous_gradients}")
print(f"128 weights, buckets of {BUCKET:,}, largest tensor in bytes:")
for stage, (start, step, *without) in measured.items():
    print(
        f"ZeRO-{stage} at the start {start:10,}, in a step {step:10,}; "
        f"not contiguous {without[0]:10,}, {without[1]:10,}"
    )
assert default.reduce_bucket_size == 500_000_000 and default.contiguous_gradients, "the defaults are others by now"
for stage, (start, step, *without) in measured.items():
    whole, other = (start, step) if stage == 3 else (step, start)
    assert whole == 2 * BUCKET, f"ZeRO-{stage}: the buffer no longer has the size of the whole bucket"
    assert max(other, *without) <= 512, f"ZeRO-{stage}: a large tensor is made elsewhere too"
dist.destroy_process_group()
PYTHON
"$work/venv/bin/python" "$work/bucket.py" 2>"$work/errors" | tail -n 5 || { cat "$work/errors" >&2; exit 1; }
