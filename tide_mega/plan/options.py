"""What a plan is asked: its own keys, and beside them any word of a training."""

from dataclasses import dataclass, field, fields

from tide_mega.config.schema import TideConfig
from tide_mega.errors import ConfigError, refuse
from tide_mega.plan.rates import GPUS_IN_A_NODE, Rates, rates_of


@dataclass
class PlanOptions:
    """Every other word is one of a training: `experiment=tide_8e_1b parallel=tp2 trainer.micro_batch_size=4`."""

    nodes: int = 1
    """Nodes of eight GPUs."""
    gpus: int | None = None
    """GPUs in all, instead of `nodes`."""
    gpu: str = "h100"
    """Model of GPU: a100, h100, h200, b200, gb200, b300, gb300."""
    ranks: list[int] = field(default_factory=list)
    """Ranks to run; by default the first and last tensor rank of every pipeline stage."""
    out: str | None = None
    """Folder for plan.json, plan.txt and plan.png."""
    workers: int = 2
    """Dry runs at a time; each needs a core and up to 2 GB."""
    memory_gbs: float | None = None
    """Memory bandwidth in GB/s, in place of the data sheet's; this and what follows are the plan's assumptions."""
    memory_share: float | None = None
    """Share of it that elementwise kernels reach."""
    kernel_us: float | None = None
    """Shortest kernel, in microseconds."""
    launch_us: float | None = None
    """Host time of one operation."""
    wait_us: float | None = None
    """Host time of one wait for the GPU."""
    nvlink_gbs: float | None = None
    """One GPU's bandwidth within a node, in one direction."""
    network_gbs: float | None = None
    """The same across nodes."""
    link_share: float | None = None
    """Share of a link's bandwidth that collectives reach."""
    nvlink_us: float | None = None
    """Latency of a collective within a node."""
    network_us: float | None = None
    """Latency of a hop across nodes."""
    disk_gbs: float | None = None
    """What one node writes to shared storage, in GB/s."""

    @property
    def world_size(self) -> int:
        """GPUs of the job, one process each."""
        return self.gpus if self.gpus is not None else self.nodes * GPUS_IN_A_NODE

    def rates(self) -> Rates:
        """Return the assumptions.

        Raises:
            ConfigError: the model of GPU is not known, or a rate is not positive.
        """
        names = {f.name for f in fields(Rates)} & {f.name for f in fields(self)} - {"gpu"}
        return rates_of(self.gpu, **{name: getattr(self, name) for name in names})

    def check(self) -> None:
        """Refuse values that no plan can be made of.

        Raises:
            ConfigError: naming the key.
        """
        for name in ("nodes", "gpus", "workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                refuse(name, value, "is too small", "give 1 or more")
        if wrong := [rank for rank in self.ranks if not 0 <= rank < self.world_size]:
            raise ConfigError(f"ranks={wrong[0]} is none of the job's: they are 0 to {self.world_size - 1}.")


def split_words(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the words of a plan and those of a training; a flag such as `--help` is the plan's."""
    keys = {f.name for f in fields(PlanOptions)}
    mine = [word for word in words if word.partition("=")[0] in keys or word.startswith("-")]
    return mine, [word for word in words if word not in mine]


def distinct_ranks(config: TideConfig, world_size: int) -> list[int]:
    """Return the first and last tensor rank of the first replica of each stage (megatron's order of ranks)."""
    parallel = config.parallel
    of_a_stage = world_size // parallel.pipeline
    return [
        stage * of_a_stage + tensor
        for stage in range(parallel.pipeline)
        for tensor in sorted({0, parallel.tensor - 1})
    ]
