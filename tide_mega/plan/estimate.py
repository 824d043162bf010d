"""From what ranks did in a dry run to the time of a step, its parts, MFU, and the cost of the whole run.

A phase lasts as long as its kernels or, if the host cannot launch them fast enough, as long as their launches; its
collectives and the host's waits come on top, since the program overlaps neither with computation. A pipeline of P
stages with M micro-batches and v chunks a stage adds (P - 1) / (M v) of the schedule. Stages wait for the slowest.

Collectives of n members: an all-reduce moves 2 (n - 1) / n of its tensor over the slowest link, an all-gather, a
reduce-scatter and an all-to-all (n - 1) / n, a broadcast, a send and a receive all of it; latency counts once
within a node, and log2 of the nodes across.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tide_mega.config.device_memory import element_bytes
from tide_mega.config.schema import TideConfig
from tide_mega.config.sizes import count_parameters, flops_per_token
from tide_mega.dryrun.ledger import BACKWARD, FORWARD, READ, REDUCE, RETURN, UPDATE, Message, Moved, Work
from tide_mega.memory.traffic import away
from tide_mega.plan.rank import RankStep
from tide_mega.plan.rates import ATTENTION_SHARE, GPUS_IN_A_NODE, PRODUCT_SHARES, Rates

STEP = (READ, FORWARD, BACKWARD, RETURN, REDUCE, UPDATE)


@dataclass(frozen=True)
class PhaseTime:
    """Seconds of one phase on one rank."""

    products: float = 0.0
    """Matrix products and attention."""
    traffic: float = 0.0
    """Other kernels."""
    launches: float = 0.0
    """By which the host's launches outlast the kernels."""
    communication: float = 0.0
    waits: float = 0.0

    @property
    def total(self) -> float:
        """All parts."""
        return self.products + self.traffic + self.launches + self.communication + self.waits


@dataclass(frozen=True)
class Estimate:
    """One step of the whole job, and the run that it is repeated in."""

    phases: dict[str, PhaseTime]
    """Forward and backward of the slowest stage, everything else of the slowest rank."""
    bubble: float
    tokens: int
    """Of one step, over all replicas."""
    world_size: int
    mfu: float
    checkpoint_bytes: int
    checkpoint_seconds: float
    total_tokens: int | None

    @property
    def seconds(self) -> float:
        """Of one step."""
        return sum(phase.total for phase in self.phases.values()) + self.bubble

    @property
    def tokens_per_second(self) -> float:
        """Over all GPUs."""
        return self.tokens / self.seconds

    @property
    def hours(self) -> float | None:
        """To the run's last token; None if the run has no end."""
        return None if self.total_tokens is None else self.total_tokens / self.tokens_per_second / 3600

    @property
    def gpu_hours(self) -> float | None:
        """The same, times the GPUs."""
        return None if self.hours is None else self.hours * self.world_size

    def parts(self) -> dict[str, float]:
        """Return the seconds of a step by what they are spent on."""
        update = self.phases[UPDATE]
        others = [phase for name, phase in self.phases.items() if name != UPDATE]
        return {
            "products": sum(phase.products for phase in others),
            "memory traffic": sum(phase.traffic for phase in others),
            "launches": sum(phase.launches for phase in others),
            "communication": sum(phase.communication for phase in self.phases.values()),
            "waits": sum(phase.waits for phase in self.phases.values()),
            "optimizer": update.products + update.traffic + update.launches,
            "bubble": self.bubble,
        }


def estimate(config: TideConfig, world_size: int, ranks: Sequence[RankStep], rates: Rates) -> Estimate:
    """Estimate the step of a job from its distinct ranks; `ranks` must have one of every stage that differs."""
    by_rank = [{phase: phase_time(step, phase, rates) for phase in STEP} for step in ranks]
    schedules = [times[FORWARD].total + times[BACKWARD].total for times in by_rank]
    slowest = by_rank[max(range(len(ranks)), key=schedules.__getitem__)]
    phases = {
        phase: slowest[phase]
        if phase in (FORWARD, BACKWARD)
        else max((times[phase] for times in by_rank), key=lambda time: time.total)
        for phase in STEP
    }
    parallel, trainer = config.parallel, config.trainer
    idle = (parallel.pipeline - 1) / (ranks[0].microbatches * parallel.virtual_pipeline)
    tokens = trainer.global_batch_size * config.data.seq_length
    bubble = idle * max(schedules)
    seconds = sum(phase.total for phase in phases.values()) + bubble
    flops = flops_per_token(config.model, config.memory, config.data.seq_length) * tokens
    kept = 12 * count_parameters(config.model, config.memory).total
    nodes = math.ceil(world_size / GPUS_IN_A_NODE)
    steps = trainer.max_steps
    return Estimate(
        phases,
        bubble,
        tokens,
        world_size,
        flops / (seconds * world_size * rates.peak(element_bytes(config))),
        kept,
        kept / (1e9 * rates.disk_gbs * nodes),
        trainer.max_tokens if trainer.max_tokens is not None else steps * tokens if steps else None,
    )


def phase_time(step: RankStep, phase: str, rates: Rates) -> PhaseTime:
    """Return the seconds of one phase of a rank."""
    products = traffic = 0.0
    for work, count in step.work.items():
        if work.phase == phase:
            seconds = count * kernel_seconds(work, rates)
            if work.flops:
                products += seconds
            else:
                traffic += seconds
    launches = 1e-6 * rates.launch_us * step.launches[phase]
    communication = sum(
        message_seconds(message, moved, rates)
        for message, moved in step.messages.items()
        if message.phase == phase
    )
    # A wait has no phase of its own: most are in the update, where the votes and the norm are read.
    waits = 1e-6 * rates.wait_us * sum(step.waits.values()) if phase == UPDATE else 0.0
    return PhaseTime(products, traffic, max(0.0, launches - products - traffic), communication, waits)


def kernel_seconds(work: Work, rates: Rates) -> float:
    """Return the seconds of one kernel: of its arithmetic or of its traffic, whichever takes longer."""
    seconds = max(1e-6 * rates.kernel_us, work.bytes / (1e9 * rates.memory_gbs * rates.memory_share))
    if not work.flops:
        return seconds
    share = next(share for least, share in PRODUCT_SHARES if work.smallest >= least)
    if "attention" in work.name:
        share = ATTENTION_SHARE
    return max(seconds, work.flops / (rates.peak(work.width) * share))


def nodes_of(group: Sequence[int]) -> int:
    """Return over how many nodes a group is spread."""
    return len({rank // GPUS_IN_A_NODE for rank in group})


def message_seconds(message: Message, moved: Moved, rates: Rates) -> float:
    """Return the seconds of all collectives of one kind."""
    members = len(message.group)
    if members == 1:
        return 0.0
    nodes = nodes_of(message.group)
    link = rates.nvlink_gbs if nodes == 1 else rates.network_gbs
    latency = rates.nvlink_us if nodes == 1 else rates.network_us * max(1.0, math.log2(nodes))
    share = away(members)
    if message.name in ("send", "recv_", "broadcast_", "barrier"):
        share = 1.0
    elif message.name == "allreduce_":
        share *= 2
    return moved.count * 1e-6 * latency + share * moved.bytes / (1e9 * link * rates.link_share)
