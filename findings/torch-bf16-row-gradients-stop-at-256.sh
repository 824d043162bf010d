#!/bin/bash
# torch 2.13.0 (CPU), megatron-core 0.16.1, one process.
#
# Behaviour: in bf16 the CPU adds the gradients of a row that was looked up many times into bf16, one after the other. 1
# has no effect on 256 there, so a row that gets a gradient of 1 from each of 3,000 tokens ends at 256. So do
# F.embedding, weight[ids] and megatron-core's VocabParallelEmbedding, and torch.segment_reduce over the same gradients;
# index_select, index_add_ and embedding_bag sum more exactly and give 3,008, the bf16 nearest to 3,000.
#
# Output seen:
#   F.embedding              bf16   256  fp32 3,000
#   weight[ids]              bf16   256  fp32 3,000
#   VocabParallelEmbedding   bf16   256  fp32 3,000
#   segment_reduce           bf16   256  fp32 3,000
#   index_select             bf16 3,008  fp32 3,000
#   index_add_               bf16 3,008  fp32 3,000
#   embedding_bag            bf16 3,008  fp32 3,000
#
# Why it matters here: on a CPU a bf16 run loses most of the gradient of its most frequent tokens and none of the rare
# ones', which bends exactly the comparison by token frequency that the memory is about. Rows' gradients have to be
# summed by an operation of the second kind, or in fp32.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.13.0" "megatron-core==0.16.1" "numpy==2.4.6" >/dev/null
cat >"$work/rows.py" <<'PYTHON'
import os

os.environ["GLOO_SOCKET_IFNAME"] = "lo"
import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import ModelParallelConfig, parallel_state
from megatron.core.tensor_parallel import VocabParallelEmbedding

TIMES = 3000
IDS = torch.zeros(TIMES, dtype=torch.long)


def gradient_of(look_up):
    """The gradient of the row that every id asks for, from a loss that is the sum of all rows looked up."""

    def measure(dtype):
        weight = torch.zeros(8, 4, dtype=dtype, requires_grad=True)
        look_up(weight).sum().backward()
        return weight.grad[0]

    return measure


def megatron(dtype):
    config = ModelParallelConfig(use_cpu_initialization=True, params_dtype=dtype)
    embedding = VocabParallelEmbedding(8, 4, init_method=torch.nn.init.zeros_, config=config)
    embedding(IDS[None]).sum().backward()
    return embedding.weight.grad[0]


def ones(dtype):
    return torch.ones(TIMES, 4, dtype=dtype)


STOPS = {
    "F.embedding": gradient_of(lambda weight: F.embedding(IDS, weight)),
    "weight[ids]": gradient_of(lambda weight: weight[IDS]),
    "VocabParallelEmbedding": megatron,
    "segment_reduce": lambda dtype: torch.segment_reduce(ones(dtype), "sum", lengths=torch.tensor([TIMES]))[0],
}
GOES_ON = {
    "index_select": gradient_of(lambda weight: weight.index_select(0, IDS)),
    "index_add_": lambda dtype: torch.zeros(8, 4, dtype=dtype).index_add_(0, IDS, ones(dtype))[0],
    "embedding_bag": lambda dtype: F.embedding_bag(torch.arange(TIMES), ones(dtype), torch.tensor([0]), mode="sum")[0],
}
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
parallel_state.initialize_model_parallel()
for name, measure in {**STOPS, **GOES_ON}.items():
    bf16, fp32 = (measure(dtype).unique().tolist() for dtype in (torch.bfloat16, torch.float32))
    print(f"{name:24} bf16 {bf16[0]:5,.0f}  fp32 {fp32[0]:5,.0f}")
    assert fp32 == [TIMES], f"{name}: the right sum is {TIMES}, and fp32 gave {fp32}"
    assert bf16 == ([256.0] if name in STOPS else [3008.0]), f"{name}: the sum in bf16 is another by now: {bf16}"
dist.destroy_process_group()
PYTHON
"$work/venv/bin/python" "$work/rows.py" 2>"$work/errors" || { cat "$work/errors" >&2; exit 1; }
