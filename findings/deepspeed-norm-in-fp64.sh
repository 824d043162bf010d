#!/bin/bash
# deepspeed 0.19.8, torch 2.13.0 (CPU), one process, ZeRO-1, bf16.
#
# Behaviour: for the gradient norm of a step each reduced gradient is copied to fp64 as a whole, and so needs four times
# its own memory beside it. The largest parameter decides: a bf16 gradient of 32,768 x 256 elements (17 MB) is followed by
# an fp64 copy of 67 MB. The norm is taken once a step whether or not the gradient is clipped.
#
# Output seen:
#   largest gradient 16,777,216 bytes, largest fp64 tensor of the step 67,108,864 bytes
#
# Why it matters here: with tied embeddings of 128,256 x 2,048 the copy is 2.1 GB at the moment of the step, which a plan of
# memory has to count, and its bytes are most of what the norm costs. Tables with owners of their own (memory.owners=
# tensor_data) are measured row by row instead, in fp32 sums that are widened to fp64 once a row.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.13.0" "deepspeed==0.19.8" numpy >/dev/null
cat >"$work/norm.py" <<'PYTHON'
import os

os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT="29871", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import deepspeed


class Widest(TorchDispatchMode):
    """Remembers the largest fp64 tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                self.largest = max(self.largest, tensor.nbytes)
        return result


dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
model = torch.nn.Embedding(32768, 256)
config = {
    "train_batch_size": 1,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
}
engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
engine.backward(engine(torch.arange(8)).float().square().sum())
with Widest() as widest:
    engine.step()
gradient = 32768 * 256 * 2
print(f"largest gradient {gradient:,} bytes, largest fp64 tensor of the step {widest.largest:,} bytes")
assert widest.largest == 4 * gradient, "the norm no longer copies a gradient to fp64"
PYTHON
"$work/venv/bin/python" "$work/norm.py" 2>/dev/null | tail -n 1 | tee "$work/said"
grep -q "fp64 tensor of the step 67,108,864 bytes" "$work/said"
