"""Process groups: the only user of `torch.distributed` start-up and of megatron-core's parallel state."""

import contextlib
import gc
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed import ProcessGroup

from tide_mega.config.schema import ParallelConfig
from tide_mega.errors import ConfigError
from tide_mega.parallel import megatron_cpu
from tide_mega.parallel.determinism import deterministic_algorithms
from tide_mega.parallel.device import Device
from tide_mega.parallel.interface import choose_interface


@dataclass(frozen=True)
class World:
    """This process's rank and the number of processes, from torchrun's or SLURM's environment."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def from_environment(cls) -> "World":
        """Read RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE; without them there is a single process."""
        rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        return cls(rank, size, local_rank, local_size=int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


@dataclass(frozen=True)
class ParallelGroups:
    """All process groups that parts of the system need; passed explicitly, never looked up inside the model."""

    collection: ProcessGroupCollection
    """The groups in the form that megatron-core's modules take."""
    tensor: ProcessGroup
    data: ProcessGroup
    pipeline: ProcessGroup
    model: ProcessGroup
    """Tensor x pipeline: all shards of one replica."""
    embedding: ProcessGroup | None
    """First and last stage, which hold copies of a tied embedding; None on other stages and without pipeline."""
    memory: ProcessGroup
    """On the first pipeline stage, the owners of the memory tables. With `tensor_data` the ranks of tensor x data,
    of which v mod size has row v (`tide_mega.memory.ownership`); with `tensor` each has a contiguous shard."""

    @property
    def tensor_rank(self) -> int:
        """Rank of this process in its tensor-parallel group."""
        return self.tensor.rank()

    @property
    def tensor_size(self) -> int:
        """Tensor-parallel size."""
        return self.tensor.size()

    @property
    def is_first_stage(self) -> bool:
        """Whether this process holds the embedding, and the memory tables."""
        return self.pipeline.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this process computes the loss."""
        return self.pipeline.rank() == self.pipeline.size() - 1

    @property
    def data_rank(self) -> int:
        """Rank of this process in its data-parallel group."""
        return self.data.rank()

    @property
    def data_size(self) -> int:
        """Number of data-parallel replicas."""
        return self.data.size()


_until_the_end = contextlib.ExitStack()
"""Contexts entered by `start_distributed` and left by `stop_distributed`."""


def start_distributed(
    device: Device, world: World, timeout_minutes: float, *, deterministic: bool = False
) -> None:
    """Join the job's process group, or create a group of one.

    Until `stop_distributed` megatron computes on `device`, and with `deterministic` equal inputs give equal bits
    (`tide_mega.parallel.determinism`).

    Raises:
        ConfigError: there are several processes but no MASTER_ADDR and MASTER_PORT, or the environment asks for
            something that is not deterministic.
    """
    _until_the_end.close()
    megatron_cpu.redirect(to_cpu=not device.is_cuda)
    _until_the_end.enter_context(deterministic_algorithms(deterministic, device))
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # DeepSpeed refuses to start without it
    if dist.is_initialized():
        return
    timeout = timedelta(minutes=timeout_minutes)
    if world.size == 1:
        store = dist.HashStore()
        dist.init_process_group(device.backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE={world.size} but {' and '.join(missing)} is not set: start several processes with "
            "`torchrun --nproc-per-node=N -m tide_mega.train ...` or with a script of slurm/."
        )
    if world.size > world.local_size:
        choose_interface()
    dist.init_process_group(device.backend, rank=world.rank, world_size=world.size, timeout=timeout)


def make_groups(parallel: ParallelConfig, seed: int, owners: str = "tensor") -> ParallelGroups:
    """Split the world into tensor, pipeline and data groups (megatron's order: tensor varies fastest).

    `owners` is `memory.owners`: tensor or tensor_data. A process that builds several models in turn keeps its
    groups as long as the sizes stay the same.
    """
    if parallel_state.model_parallel_is_initialized() and not _sizes_are(parallel):
        _drop_groups()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=_chunks(parallel),
        )
    model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return ParallelGroups(
        collection=ProcessGroupCollection.use_mpu_process_groups(),
        tensor=parallel_state.get_tensor_model_parallel_group(),
        data=parallel_state.get_data_parallel_group(),
        pipeline=parallel_state.get_pipeline_model_parallel_group(),
        model=parallel_state.get_model_parallel_group(),
        embedding=_embedding_group(parallel),
        memory=(
            parallel_state.get_tensor_and_data_parallel_group()
            if owners == "tensor_data"
            else parallel_state.get_tensor_model_parallel_group()
        ),
    )


def _sizes_are(parallel: ParallelConfig) -> bool:
    sizes = (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size(),
    )
    return sizes == (parallel.tensor, parallel.pipeline, _chunks(parallel))


def _chunks(parallel: ParallelConfig) -> int | None:
    return parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None


def _embedding_group(parallel: ParallelConfig) -> ProcessGroup | None:
    if parallel.pipeline == 1:
        return None
    group = parallel_state.get_embedding_group(check_initialized=False)
    return group if group is not None and dist.get_rank() in dist.get_process_group_ranks(group) else None


def _drop_groups() -> None:
    # Megatron drops its groups without destroying them, and each gloo group keeps polling threads.
    for group in getattr(parallel_state, "_global_process_group_list", None) or []:
        if group is not None and group != dist.group.WORLD:
            dist.destroy_process_group(group)
    parallel_state.destroy_model_parallel()
    gc.collect()  # the model built on them may keep them, and so their threads, alive in a cycle


def stop_distributed() -> None:
    """Destroy the groups and leave the device; else gloo and NCCL threads may abort at interpreter exit."""
    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    megatron_cpu.redirect(to_cpu=False)
    _until_the_end.close()


class Mpu:
    """Megatron's parallel state in the form that DeepSpeed expects.

    DeepSpeed takes data-parallel and model-parallel groups from such an object; without it the gradient norm of a
    tensor-parallel model is silently wrong.
    """

    def __init__(self, groups: ParallelGroups) -> None:
        self.groups = groups

    def get_model_parallel_rank(self) -> int:
        """Rank among the shards of a replica."""
        return self.groups.model.rank()

    def get_model_parallel_world_size(self) -> int:
        """Number of shards of a replica."""
        return self.groups.model.size()

    def get_model_parallel_group(self) -> ProcessGroup:
        """The shards of this replica."""
        return self.groups.model

    def get_tensor_model_parallel_rank(self) -> int:
        """Rank within the tensor-parallel group."""
        return self.groups.tensor.rank()

    def get_tensor_model_parallel_world_size(self) -> int:
        """Tensor-parallel size."""
        return self.groups.tensor.size()

    def get_tensor_model_parallel_group(self) -> ProcessGroup:
        """The tensor-parallel group."""
        return self.groups.tensor

    def get_pipeline_model_parallel_rank(self) -> int:
        """Pipeline stage."""
        return self.groups.pipeline.rank()

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Number of pipeline stages."""
        return self.groups.pipeline.size()

    def get_pipeline_model_parallel_group(self) -> ProcessGroup:
        """The stages of this replica."""
        return self.groups.pipeline

    def get_data_parallel_rank(self) -> int:
        """Index of the replica."""
        return self.groups.data.rank()

    def get_data_parallel_world_size(self) -> int:
        """Number of replicas."""
        return self.groups.data.size()

    def get_data_parallel_group(self) -> ProcessGroup:
        """The processes that hold the same shard of different replicas."""
        return self.groups.data

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of the data-parallel group."""
        return dist.get_process_group_ranks(self.groups.data)


def make_host_group(timeout_minutes: float | None = None) -> ProcessGroup:
    """Create a separate group of all processes for host memory; None means torch's default timeout."""
    timeout = None if timeout_minutes is None else timedelta(minutes=timeout_minutes)
    return dist.new_group(timeout=timeout, backend="gloo")


def sum_over(group: ProcessGroup, tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over the group in place and return it; free if the group has one member."""
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor
