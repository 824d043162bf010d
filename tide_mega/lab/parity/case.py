"""A parity case: its parameters, its whole configuration, its tokens, and the grid of topologies to check.

The topology and its reference get the same tokens.

Shapes: B sequences, T tokens.
"""

from dataclasses import dataclass

import torch

from tide_mega.config.schema import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    MemoryConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RunConfig,
    TideConfig,
    TrainerConfig,
)
from tide_mega.config.validate import validate
from tide_mega.data.loader import TokenBatch
from tide_mega.errors import refuse

SEQUENCE, MICRO_BATCH, STEPS, Z_LOSS = 24, 2, 5, 1e-3
MOST_PROCESSES = 16


@dataclass(frozen=True)
class Case:
    """One topology with its numerics; the defaults are a single process with K = 3."""

    tensor: int = 1
    """Tensor-parallel processes."""
    sequence_parallel: bool = False
    pipeline: int = 1
    """Pipeline stages; the model has 4 layers."""
    virtual_pipeline: int = 1
    """Chunks of each stage; more than 1 interleaves."""
    data: int = 1
    """Data-parallel replicas. Processes: tensor x pipeline x data."""
    zero_stage: int = 1
    """DeepSpeed ZeRO: 1, 2 or 3."""
    recompute: str = "none"
    """none, selective or full."""
    num_blocks: int = 3
    """K; 0 is the baseline."""
    owners: str = "tensor"
    """Owners of the tables' rows: tensor (the narrow memory group) or tensor_data (the wide one)."""
    window: int | None = None
    """Microbatches served by one reading of the memory; null means all of a step."""
    exchange_ahead: bool = False
    """Plan and fetch the next step's rows at the end of a step."""
    accumulation: int = 2
    """Microbatches of a data-parallel rank in a step."""
    tie_embeddings: bool = True
    table_lr_multiplier: float = 1.0
    vocab_size: int = 64
    precision: str = "fp32"
    """fp32, or bf16 with fp32 master weights."""
    device: str = "cpu"

    @property
    def world(self) -> int:
        """Processes."""
        return self.tensor * self.pipeline * self.data

    def __str__(self) -> str:
        plain = vars(Case())
        differing = [f"{key}={value}" for key, value in vars(self).items() if value != plain[key]]
        return " ".join(differing) or "plain"


def check_case(case: Case) -> None:
    """Refuse a case that cannot run, by the rules of every training run.

    Raises:
        ConfigError: one sentence that names the key, its value and a valid one.
    """
    for key in ("tensor", "pipeline", "virtual_pipeline", "data", "accumulation"):
        if (value := getattr(case, key)) < 1:
            refuse(key, value, "is not positive", "give 1 or more")
    if case.world > MOST_PROCESSES:
        sizes = f"tensor={case.tensor} x pipeline={case.pipeline} x data"
        refuse(sizes, case.data, f"needs {case.world} processes", f"ask for at most {MOST_PROCESSES}")
    if case.virtual_pipeline > 1 and case.accumulation % case.pipeline:
        why = f"is not a multiple of pipeline={case.pipeline}, as the interleaved schedule needs"
        refuse("accumulation", case.accumulation, why, f"use {case.pipeline} or {2 * case.pipeline}")
    validate(configuration(case), case.world)


def configuration(case: Case) -> TideConfig:
    """Return the case's configuration: a model small enough to train beside its reference."""
    model = ModelConfig(
        name="parity",
        num_layers=4,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=4,
        num_query_groups=2,
        vocab_size=case.vocab_size,
        init_std=0.2,
        tie_embeddings=case.tie_embeddings,
    )
    memory = MemoryConfig(
        case.num_blocks,
        table_init_std=0.3,
        gain_init=0.7,
        router_init_std=0.4,
        owners=case.owners,
        window=case.window,
        exchange_ahead=case.exchange_ahead,
    )
    parallel = ParallelConfig(
        tensor=case.tensor,
        sequence_parallel=case.sequence_parallel,
        pipeline=case.pipeline,
        virtual_pipeline=case.virtual_pipeline,
        zero_stage=case.zero_stage,
        recompute=case.recompute,
    )
    # Adam divides by sqrt(v) + eps: with eps far below the gradients' rounding noise, an element whose gradient
    # is almost 0 would turn that noise into a whole step of either sign, in any two correct programs.
    optim = OptimConfig(
        lr=3e-3, clip_grad=0.5, eps=1e-4, warmup_steps=0, table_lr_multiplier=case.table_lr_multiplier
    )
    trainer = TrainerConfig(
        max_steps=STEPS,
        global_batch_size=MICRO_BATCH * case.accumulation * case.data,
        micro_batch_size=MICRO_BATCH,
        precision=case.precision,
        z_loss=Z_LOSS,
    )
    return TideConfig(
        model=model,
        memory=memory,
        optim=optim,
        parallel=parallel,
        data=DataConfig(path="none", seq_length=SEQUENCE),
        trainer=trainer,
        checkpoint=CheckpointConfig(every=0, at_end=False),
        cluster=ClusterConfig(name="parity", device=case.device),
        run=RunConfig(name="parity"),
    )


def learning_rate(config: TideConfig, step: int) -> float:
    """Return the learning rate of a step; every step has a different one."""
    return config.optim.lr * (1 - 0.1 * step)


def batches_of_step(case: Case, step: int) -> list[TokenBatch]:
    """Return the whole step's microbatches [B, T], those of data-parallel rank 0 first."""
    generator = torch.Generator().manual_seed(1000 + step)
    # Few types, unevenly distributed: repeated ids, ids at shard edges, most rows untouched.
    draws = torch.rand(case.data * case.accumulation, MICRO_BATCH, SEQUENCE + 1, generator=generator)
    tokens = (draws.pow(2) * case.vocab_size).long().to(case.device)
    return [TokenBatch(x[:, :-1].contiguous(), x[:, 1:].contiguous()) for x in tokens]


def batches_of_rank(case: Case, data_rank: int, step: int) -> list[TokenBatch]:
    """Return the microbatches of one data-parallel rank."""
    return batches_of_step(case, step)[data_rank * case.accumulation :][: case.accumulation]


_ONE = [
    Case(),
    Case(num_blocks=0),
    Case(num_blocks=8, tie_embeddings=False, accumulation=4),
    Case(zero_stage=2, recompute="selective"),
    Case(recompute="full", accumulation=1),
    Case(zero_stage=3),
    Case(window=2, accumulation=4),
    Case(owners="tensor_data", exchange_ahead=True, table_lr_multiplier=5.0),
    Case(precision="bf16", accumulation=4),
]
_TWO = [
    Case(tensor=2, num_blocks=0, tie_embeddings=False),
    Case(tensor=2, recompute="selective"),
    Case(tensor=2, sequence_parallel=True, num_blocks=8, zero_stage=2, recompute="full"),
    Case(tensor=2, sequence_parallel=True, owners="tensor_data"),
    Case(data=2, num_blocks=0, zero_stage=3, tie_embeddings=False),
    Case(data=2, accumulation=1),
    Case(data=2, zero_stage=2, accumulation=4),
    Case(data=2, zero_stage=3, num_blocks=8, recompute="full"),
    Case(data=2, owners="tensor_data", vocab_size=61, table_lr_multiplier=3.0),
    Case(data=2, owners="tensor_data", window=1, accumulation=4),
    Case(data=2, owners="tensor_data", zero_stage=2, exchange_ahead=True, num_blocks=8),
    Case(pipeline=2, num_blocks=0, accumulation=4),
    Case(pipeline=2, tie_embeddings=False, accumulation=1),
    Case(pipeline=2, owners="tensor_data", window=2, accumulation=4),
    Case(pipeline=2, virtual_pipeline=2, accumulation=4),
    Case(tensor=2, precision="bf16", accumulation=4),
    Case(data=2, precision="bf16", zero_stage=2, accumulation=4),
    Case(data=2, precision="bf16", zero_stage=3),
    Case(data=2, precision="bf16", owners="tensor_data", accumulation=4),
    Case(pipeline=2, precision="bf16", accumulation=4),
]
_FOUR = [
    Case(data=4, zero_stage=3),
    Case(data=4, owners="tensor_data", zero_stage=2, vocab_size=61),
    Case(tensor=2, data=2, num_blocks=0, accumulation=4),
    Case(tensor=2, data=2, sequence_parallel=True, zero_stage=2),
    Case(tensor=2, data=2, sequence_parallel=True, zero_stage=3, num_blocks=8),
    Case(tensor=2, data=2, sequence_parallel=True, owners="tensor_data", recompute="selective"),
    Case(tensor=2, pipeline=2, sequence_parallel=True, exchange_ahead=True),
    Case(
        tensor=2, pipeline=2, virtual_pipeline=2, owners="tensor_data", accumulation=4, tie_embeddings=False
    ),
    Case(pipeline=2, data=2, num_blocks=8, recompute="full", accumulation=4),
    Case(pipeline=2, data=2, owners="tensor_data", zero_stage=2, exchange_ahead=True),
    Case(pipeline=2, virtual_pipeline=2, data=2, zero_stage=2, window=2, accumulation=4),
    Case(pipeline=4, accumulation=4),
    Case(tensor=2, data=2, sequence_parallel=True, precision="bf16", owners="tensor_data", zero_stage=2),
]
_EIGHT = [
    Case(tensor=2, pipeline=2, data=2, sequence_parallel=True),
    Case(
        tensor=2,
        pipeline=2,
        data=2,
        sequence_parallel=True,
        zero_stage=2,
        owners="tensor_data",
        exchange_ahead=True,
        vocab_size=62,
    ),
    Case(
        tensor=2,
        pipeline=2,
        virtual_pipeline=2,
        data=2,
        num_blocks=8,
        recompute="full",
        accumulation=4,
        tie_embeddings=False,
    ),
    Case(tensor=2, data=4, sequence_parallel=True, owners="tensor_data", window=1, accumulation=4),
    Case(tensor=2, pipeline=4, sequence_parallel=True, recompute="selective", accumulation=4),
    Case(pipeline=4, data=2, owners="tensor_data", zero_stage=2, accumulation=4),
    Case(pipeline=2, data=4, num_blocks=0, zero_stage=2, accumulation=1),
    Case(tensor=2, pipeline=2, data=2, precision="bf16", zero_stage=2, owners="tensor_data", accumulation=4),
]
FULL = [*_ONE, *_TWO, *_FOUR, *_EIGHT]
QUICK = [
    *(_ONE[0], _ONE[2], _ONE[-1]),
    Case(tensor=2, sequence_parallel=True, zero_stage=2, recompute="full"),
    Case(data=2, zero_stage=3),
    Case(data=2, owners="tensor_data", window=1, accumulation=4),
    Case(pipeline=2, tie_embeddings=False, accumulation=4),
    Case(tensor=2, data=2, sequence_parallel=True, owners="tensor_data", exchange_ahead=True),
    Case(tensor=2, pipeline=2, virtual_pipeline=2, sequence_parallel=True, num_blocks=8, accumulation=4),
    Case(pipeline=2, data=2, owners="tensor_data", zero_stage=2),
]
GRIDS = {"full": FULL, "quick": QUICK}
