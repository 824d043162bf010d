"""One process of tools/bench_memory.py: trains a few steps of one approach and prints its peaks as JSON.

Its one argument is a `Task` as JSON. All imports precede the first measurement.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from tide_mega.config.schema import MemoryConfig, ModelConfig, OptimConfig, TideConfig
from tide_mega.data.loader import TokenBatch
from tide_mega.lab.bench.measure import forget_peak, resident
from tide_mega.model.reference import ReferenceShape, ReferenceTide
from tide_mega.model.stage import TideStage
from tide_mega.model.steps import compute_gradients
from tide_mega.model.weights import initialise
from tide_mega.parallel.device import choose_device
from tide_mega.parallel.engine import Engine
from tide_mega.parallel.engine_settings import EngineOptions
from tide_mega.parallel.groups import World, make_groups, start_distributed, stop_distributed
from tide_mega.training.optimizer import parameter_groups


@dataclass(frozen=True)
class Task:
    """The task of one benchmark process."""

    approach: str
    """plain, or `memory.owners` of the system: tensor or tensor_data."""
    blocks: int
    vocab: int
    width: int
    layers: int
    micro_batch: int
    seq_length: int
    steps: int
    threads: int
    processes: int
    rank: int
    store: str
    """File for the rendezvous of the processes."""


def token_ids(task: Task, step: int) -> Tensor:
    """Draw ids [B, T + 1]; id v has probability ~ 1 / (v + 10), roughly the distribution of token types."""
    weights_V = 1 / (torch.arange(task.vocab) + 10.0)
    generator = torch.Generator().manual_seed(1000 * step + task.rank)
    shape = task.micro_batch, task.seq_length + 1
    return torch.multinomial(weights_V, shape[0] * shape[1], True, generator=generator).view(shape)


def batch(task: Task, step: int) -> TokenBatch:
    """The microbatch of this process in a step."""
    ids = token_ids(task, step)
    return TokenBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def model_of(task: Task) -> ModelConfig:
    """The base model, alike for all approaches."""
    return ModelConfig(
        name="bench",
        num_layers=task.layers,
        hidden_size=task.width,
        ffn_hidden_size=task.width * 5 // 2,
        num_attention_heads=4,
        num_query_groups=4,
        vocab_size=task.vocab,
    )


def build_plain(task: Task) -> Callable[[int], None]:
    """Build the reference and AdamW; return a function that runs a step."""
    model, optim = model_of(task), OptimConfig()
    reference = ReferenceTide(ReferenceShape.of(model, task.blocks))
    with torch.no_grad():
        for parameter in reference.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, model.init_std)
    optimizer = torch.optim.AdamW(reference.parameters(), lr=optim.lr, fused=True)

    def step(number: int) -> None:
        reference(*batch(task, number), 1e-6).loss.backward()
        for parameter in reference.parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= task.processes
        torch.nn.utils.clip_grad_norm_(reference.parameters(), optim.clip_grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


def build_system(task: Task) -> Callable[[int], None]:
    """Build a stage and its engine; return a function that runs a step."""
    config = TideConfig(model=model_of(task), memory=MemoryConfig(task.blocks, owners=task.approach))
    config.data.seq_length, config.trainer.precision = task.seq_length, "fp32"
    device = choose_device("cpu", 0)
    groups = make_groups(config.parallel, 1, config.memory.owners)
    stage = TideStage(config, groups, device.torch_device)
    initialise(stage, config.model, config.memory, 1)
    options = EngineOptions(
        zero_stage=1,
        precision="fp32",
        clip_grad=config.optim.clip_grad,
        micro_batch_size=task.micro_batch,
        accumulation=1,
        shares_norm=stage.memory.owned is not None,
    )
    parameters = parameter_groups(stage, config.optim)
    engine = Engine(stage, parameters, config.optim, options, groups, device, stage.memory.owned)

    def step(number: int) -> None:
        compute_gradients(engine, [batch(task, number)], config.trainer.z_loss)
        engine.step(config.optim.lr)

    return step


def work(task: Task) -> dict[str, int]:
    """Train; return peaks above the initial resident size, in bytes, and the most distinct ids of a step."""
    torch.set_num_threads(task.threads)
    dist.init_process_group(
        "gloo", init_method=f"file://{task.store}", rank=task.rank, world_size=task.processes
    )
    start_distributed(
        choose_device("cpu", 0), World(task.rank, task.processes, task.rank, task.processes), 10
    )
    distinct = max(batch(task, number).tokens_BT.unique().numel() for number in range(task.steps))
    before = resident("VmRSS")
    forget_peak()
    step = build_plain(task) if task.approach == "plain" else build_system(task)
    start = resident("VmHWM") - before
    forget_peak()
    for number in range(task.steps):
        step(number)
    peaks = {"start": start, "steps": resident("VmHWM") - before, "distinct": distinct}
    stop_distributed()
    return peaks


if __name__ == "__main__":
    print(json.dumps(work(Task(**json.loads(sys.argv[1])))))
