#!/bin/bash
# deepspeed 0.19.8, torch 2.13.0 (CPU), two processes (gloo on the loopback device), ZeRO-2, bf16.
#
# Behaviour: inside engine.coalesce_grad_reduction() each rank keeps the whole gradients of all its parameters from the
# first backward pass until the block ends, as ZeRO-1 would. Without the block a backward pass leaves a rank with the
# gradients of its own partition. After the block it has those alone again.
#
# Output seen:
#   all gradients 1,048,576 bytes, held by a rank: after a backward pass 524,288, inside the block 1,048,576, after it 524,288
#
# Why it matters here: gradient accumulation that reduces once a step goes through this block, so what ZeRO-2 is chosen
# for, a rank's gradients divided by the number of replicas, is not to be had while microbatches are summed. A plan of
# memory has to count whole gradients for ZeRO-2 as for ZeRO-1.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.13.0" "deepspeed==0.19.8" "numpy==2.4.6" >/dev/null
cat >"$work/coalesce.py" <<'PYTHON'
import os
import sys

os.environ.update(DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", MASTER_PORT="29873", WORLD_SIZE="2", GLOO_SOCKET_IFNAME="lo")
import torch
import torch.distributed as dist
import torch.multiprocessing

import deepspeed

LAYERS, WIDTH = 8, 256
GRADIENTS = LAYERS * WIDTH * WIDTH * 2


def held(engine):
    """Bytes of this rank's gradients: the parameters' own and the partition's that the optimizer has, each once."""
    optimizer = engine.optimizer
    tensors = [optimizer.grads_in_partition]
    for parameter in engine.module.parameters():
        tensors += [parameter.grad, getattr(parameter, "grad_accum", None)]
    for partition in optimizer.averaged_gradients.values():
        tensors += partition or []
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def make_engine():
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": WIDTH * WIDTH},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
    return engine


def backward(engine):
    engine.backward(engine(torch.ones(1, WIDTH, dtype=torch.bfloat16)).float().square().sum())


def measure(rank, folder):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    engine = make_engine()
    backward(engine)
    plain = held(engine)
    engine = make_engine()
    with engine.coalesce_grad_reduction():
        for _ in range(2):
            backward(engine)
        inside = held(engine)
    after = held(engine)
    if rank == 0:
        print(
            f"all gradients {GRADIENTS:,} bytes, held by a rank: after a backward pass {plain:,}, "
            f"inside the block {inside:,}, after it {after:,}",
            flush=True,
        )
    assert plain == after == GRADIENTS // 2, "outside the block a rank no longer has its partition alone"
    assert inside == GRADIENTS, "inside the block a rank no longer has all gradients"
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(measure, args=(sys.argv[1],), nprocs=2)
PYTHON
"$work/venv/bin/python" "$work/coalesce.py" "$work" 2>"$work/errors" | grep "^all gradients" ||
    { cat "$work/errors" >&2; exit 1; }
