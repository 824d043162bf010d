"""What layers really keep for their backward pass, against the estimate behind `cluster.memory_gb`."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tide_mega.config.device_memory import layer_bytes
from tide_mega.config.hydra_door import compose
from tide_mega.config.schema import TideConfig
from tide_mega.kernels.row_gradient import RowGradient
from tide_mega.memory.plan import plan_rows
from tide_mega.model.chunk import Targets
from tide_mega.model.stage import TideStage
from tide_mega.model.weights import initialise
from tide_mega.parallel.device import choose_device
from tide_mega.parallel.groups import World, make_groups, start_distributed, stop_distributed
from tide_mega.parallel.megatron_cpu import cuda_means_cpu

SEQUENCES, TOKENS = 2, 64
SMALL = (
    *("model.hidden_size=64", "model.ffn_hidden_size=96", "model.num_attention_heads=4"),
    *("model.num_query_groups=2", "model.vocab_size=640", f"data.seq_length={TOKENS}"),
    *(f"trainer.micro_batch_size={SEQUENCES}", f"trainer.global_batch_size={SEQUENCES}"),
    *("memory=none", "memory.owners=tensor", "kernels.compile=false"),
)


def small(layers: int, words: tuple[str, ...], world: int) -> TideConfig:
    return compose(["experiment=demo_tide", *SMALL, f"model.num_layers={layers}", *words], world_size=world)


class NormOfGPUs(torch.autograd.Function):
    """torch's fused RMSNorm keeps its input and a scale a token; on CPUs torch composes it, and keeps more."""

    @staticmethod
    def forward(ctx, x: Tensor, shape, gain: Tensor, eps: float) -> Tensor:
        scale = x.float().square().mean(-1, keepdim=True).add(eps).rsqrt()
        ctx.save_for_backward(x, gain, scale)
        return (x * scale * gain).to(x.dtype)


def kept_bytes(layers: int, words: tuple[str, ...], world: int) -> int:
    """Bytes of distinct memory that a microbatch's forward pass keeps, weights and memory rows left out."""
    config = small(layers, words, world)
    stage = TideStage(config, make_groups(config.parallel, 1), torch.device("cpu"))
    initialise(stage, config.model, config.memory, seed=1)
    stage.to(stage.dtype).train()
    tokens_BT = torch.arange(SEQUENCES * TOKENS).view(SEQUENCES, TOKENS) * 7 % config.model.vocab_size
    index_BT, memory, shared = None, stage.memory, list(stage.parameters())
    if stage.num_blocks:
        memory.kernels = replace(memory.kernels, mix="triton", norm_router="triton")
        plan = plan_rows([tokens_BT])
        memory.rows_UKD, index_BT = memory.blocks(plan.ids_U).detach(), plan.index_MBT[0]
        memory.sink = RowGradient(memory.rows_UKD.shape, memory.rows_UKD.device, "triton", layers)
        shared.append(memory.rows_UKD)
    known = {tensor.untyped_storage().data_ptr() for tensor in shared}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in known:
            kept[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), cuda_means_cpu():
        loss = stage(0, tokens_BT, Targets(tokens_BT, 1e-6), index_BT)
    assert loss is not None
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def kept_by_a_layer(words: tuple[str, ...], world: int = 1) -> float:
    """Bytes of a token."""
    composed, F.rms_norm = F.rms_norm, NormOfGPUs.apply
    try:
        return (kept_bytes(2, words, world) - kept_bytes(1, words, world)) / (SEQUENCES * TOKENS)
    finally:
        F.rms_norm = composed


def alone(words: tuple[str, ...]) -> float:
    start_distributed(choose_device("cpu", 0), World(0, 1, 0, 1), timeout_minutes=5)
    try:
        return kept_by_a_layer(words)
    finally:
        stop_distributed()


RECOMPUTE = ("none", "selective", "full")


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_a_layer_of_tide_keeps_what_is_counted(interpreted, recompute, precision):
    words = ("memory.num_blocks=3", f"parallel.recompute={recompute}", f"trainer.precision={precision}")
    kept = interpreted(alone, words)
    # Selective recompute keeps a flag besides.
    assert kept == pytest.approx(layer_bytes(small(1, words, 1)), abs=0.1)


@pytest.mark.parametrize("sequence", ["false", "true"])
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_a_tensor_parallel_layer_keeps_what_is_counted(pools, recompute, sequence):
    words = (
        *("parallel.tensor=2", f"parallel.sequence_parallel={sequence}"),
        *(f"parallel.recompute={recompute}", "trainer.precision=bf16"),
    )
    counted = layer_bytes(small(1, words, 2))
    assert pools(2).run(kept_by_a_layer, words, 2) == [pytest.approx(counted, abs=0.1)] * 2
