"""The topologies: each with a rank whose view of it is worth having."""

from dataclasses import dataclass
from pathlib import Path

from tests.support.runs import tiny
from tide_mega.config.schema import TideConfig

MICRO_BATCH = 2


@dataclass(frozen=True)
class Topology:
    """One rank of a training; `overrides` are words of the command line."""

    world: int
    rank: int
    overrides: tuple[str, ...]
    microbatches: int = 2

    @property
    def replicas(self) -> int:
        """Data-parallel size."""
        shards = [
            w.split("=")[1] for w in self.overrides if w.startswith(("parallel.tensor", "parallel.pipe"))
        ]
        size = self.world
        for part in shards:
            size //= int(part)
        return size

    def configuration(self, data: Path, root: Path) -> TideConfig:
        """Compose it."""
        words = [
            "trainer.precision=bf16",
            "trainer.eval_sequences=4",
            "cluster.device=cuda",
            f"trainer.micro_batch_size={MICRO_BATCH}",
            f"trainer.global_batch_size={MICRO_BATCH * self.microbatches * self.replicas}",
        ]
        return tiny(data, root, *words, *self.overrides, world_size=self.world)


def _of(world: int, rank: int, words: str, microbatches: int = 2) -> Topology:
    return Topology(world, rank, tuple(words.split()), microbatches)


TOPOLOGIES = {
    "one": _of(1, 0, "", 3),
    "baseline": _of(2, 1, "memory=none"),
    "data, zero 1": _of(4, 3, "parallel.zero_stage=1"),
    "data, zero 2": _of(
        4, 1, "parallel.zero_stage=2 parallel.recompute=selective trainer.deterministic=true"
    ),
    # DeepSpeed compares its lists with rank 0's, whose values only rank 0 knows.
    "data, zero 3": _of(4, 0, "parallel.zero_stage=3"),
    "tensor": _of(4, 1, "parallel.tensor=2"),
    "tensor, sequence parallel": _of(4, 3, "parallel.tensor=2 parallel.sequence_parallel=true"),
    "pipeline, first": _of(4, 0, "parallel.pipeline=2"),
    "pipeline, last": _of(4, 3, "parallel.pipeline=2 memory.owners=tensor_data"),
    "interleaved, first": _of(
        2, 0, "parallel.pipeline=2 parallel.virtual_pipeline=2 model.num_layers=4 memory.owners=tensor_data"
    ),
    "interleaved, last": _of(2, 1, "parallel.pipeline=2 parallel.virtual_pipeline=2 model.num_layers=4"),
    "owners of all": _of(4, 1, "memory=k8 memory.owners=tensor_data"),
    "owners, tensor, ahead": _of(
        4, 2, "parallel.tensor=2 memory.owners=tensor_data memory.exchange_ahead=true parallel.recompute=full"
    ),
    "owners, zero 2, windows": _of(
        2, 1, "parallel.zero_stage=2 memory.owners=tensor_data memory.window=1 model.tie_embeddings=false"
    ),
    "everything": _of(
        8,
        6,
        "parallel.tensor=2 parallel.pipeline=2 parallel.sequence_parallel=true memory.owners=tensor_data "
        "parallel.recompute=full",
    ),
    # Long enough that most rows of the tables are touched.
    "fp32": _of(2, 0, "trainer.precision=fp32 memory.owners=tensor_data data.seq_length=128"),
}

SLOW = {
    "data, zero 2",
    "pipeline, last",
    "interleaved, last",
    "owners, zero 2, windows",
    "everything",
    "fp32",
}
"""Those left out of the quick suite: their parts are in others."""
