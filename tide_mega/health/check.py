"""The health check of all nodes, round by round."""

import os
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tide_mega.config.schema import TideConfig
from tide_mega.config.sizes import count_parameters
from tide_mega.health import probes
from tide_mega.health.collective import entered, run_rounds
from tide_mega.health.facts import Facts, collect
from tide_mega.health.links import Floors, Suspicion, suspect
from tide_mega.health.meeting import StoreRendezvous
from tide_mega.health.rounds import Group, plan
from tide_mega.health.verdict import Finding, judge, table
from tide_mega.parallel.device import choose_device
from tide_mega.parallel.groups import World
from tide_mega.parallel.interface import choose_interface

PATIENCE = 180.0
"""Seconds that rank 0 waits for the others; a first import from a cold file system is slow."""
COLLECTIVES = 120.0
"""Seconds for all all-reduces together, including NCCL's initialisation in each group."""
BYTES_PER_PARAMETER = 12
"""Bytes per parameter in a checkpoint: fp32 master weight and AdamW's two moments."""


def check(config: TideConfig, world: World, patience: float = PATIENCE, limit: float = COLLECTIVES) -> bool:
    """Return whether every node may take part; collective. Rank 0 prints the table and what is wrong.

    Sick nodes are also written, one per line, to the file named by TIDE_SICK_LIST. After a negative result the
    process should end by `os._exit`, since one of its threads may hang in a collective.

    Args:
        config: of the training.
        world: rank of this process and number of processes.
        patience: seconds that rank 0 waits for the others in each round of messages.
        limit: seconds for all collectives together, after which they count as hung.
    """
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "0"))
    facts = collect(config, world)
    try:
        meeting = StoreRendezvous(address, port, world.rank, world.size, patience)
    except ConnectionError as error:
        print(f"{facts.node}, rank {world.rank}: {error}", file=sys.stderr, flush=True)
        return False
    ranks = set(range(world.size))
    here = meeting.collect("here", facts.node, ranks)
    node_of_rank = dict(meeting.announce("present", sorted(here.items())))
    present = set(node_of_rank)
    facts.clock = time.time()

    root, token = Path(config.run.root), meeting.announce("token", secrets.token_hex(4))
    problem = probes.mark(root, token, world.rank) if facts.speaks_for_node else None
    _note(facts, problem)
    marked = meeting.collect("marked", facts.speaks_for_node and problem is None, present)
    writers = meeting.announce("writers", [rank for rank, wrote in marked.items() if wrote])
    if facts.speaks_for_node:
        _note(facts, probes.see(root, token, writers))
    rounds = plan(node_of_rank)
    # A rank that cannot use its GPU would make the others wait.
    able = meeting.collect("able", facts.device_works, present)
    if meeting.announce("all able", len(able) == world.size and all(able.values())):
        device = choose_device(config.cluster.device, world.local_rank)
        if world.size > world.local_size:
            choose_interface()
        own = [group for groups in rounds for group in groups if world.rank in group.ranks]
        facts.outcome = run_rounds(own, world.rank, device, meeting.other_store, limit=limit)

    collected = meeting.collect("facts", asdict(facts), present)
    verdict = None
    if world.rank == 0:
        reports = [Facts.from_json(report) for report in collected.values()]
        suspicions = _suspicions(config, reports, node_of_rank, rounds, meeting, limit)
        verdict = _conclude(config, reports, ranks - set(collected), node_of_rank, suspicions)
    is_healthy = meeting.announce("verdict", verdict)
    if facts.speaks_for_node:
        probes.unmark(root, token, world.rank)
    meeting.collect(
        "end", None, set(collected)
    )  # rank 0 keeps the store until all remaining ranks have read it
    return bool(is_healthy)


def _suspicions(
    config: TideConfig,
    reports: Sequence[Facts],
    node_of_rank: dict[int, str],
    rounds: Sequence[Sequence[Group]],
    meeting: StoreRendezvous,
    limit: float,
) -> list[Suspicion]:
    outcomes = {report.rank: report.outcome for report in reports if report.outcome is not None}
    if not outcomes:
        return []
    came = {
        group.name: frozenset(rank for rank in group.ranks if meeting.has(entered(group, rank)))
        for groups in rounds
        for group in groups
    }
    gpus = next((report.gpus for report in reports if report.gpus), ["none"])
    return suspect(rounds, node_of_rank, outcomes, came, Floors.of(config.cluster, gpus[0]), limit)


def _note(facts: Facts, problem: str | None) -> None:
    if problem is not None:
        facts.problems.append(problem)


def _conclude(
    config: TideConfig,
    reports: Sequence[Facts],
    missing: set[int],
    node_of_rank: dict[int, str],
    suspicions: Sequence[Suspicion],
) -> bool:
    room = BYTES_PER_PARAMETER * count_parameters(config.model, config.memory).total
    names = _names(missing, node_of_rank, reports[0].local_size)
    found = judge(reports, missing=names, suspicions=suspicions, checkpoint_bytes=room)
    print(table(reports))
    for finding in found:
        print(f"sick: {finding}")
    if not found:
        nodes = {report.node for report in reports}
        print(f"{len(reports)} ranks on {len(nodes)} node(s) may train")
    sys.stdout.flush()
    _write_sick_list(found)
    return not found


def _names(missing: set[int], node_of_rank: dict[int, str], local_size: int) -> list[str]:
    """Return the nodes of missing or silent ranks: as listed by the job script, else their numbers."""
    nodes = os.environ.get("TIDE_NODES", "").split()
    listed = {rank: nodes[rank // local_size] for rank in missing if rank // local_size < len(nodes)}
    return list(dict.fromkeys((listed | node_of_rank).get(rank, f"rank {rank}") for rank in sorted(missing)))


def _write_sick_list(found: Sequence[Finding]) -> None:
    nodes = sorted({finding.node for finding in found if finding.node})
    path = os.environ.get("TIDE_SICK_LIST")
    if path and nodes:
        try:
            Path(path).write_text("".join(f"{node}\n" for node in nodes))
        except OSError as error:
            print(f"{path} could not be written: {error}", flush=True)
