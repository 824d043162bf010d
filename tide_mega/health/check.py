"""The check of all nodes, round by round."""

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
from tide_mega.health.facts import Facts, collect
from tide_mega.health.meeting import Meeting
from tide_mega.health.verdict import Finding, judge, table
from tide_mega.parallel.device import choose_device
from tide_mega.parallel.groups import World

PATIENCE = 180.0
"""Seconds that rank 0 waits for the others; a first import from a cold file system takes its time."""
BYTES_PER_PARAMETER = 12
"""In a checkpoint: fp32 master weight and AdamW's two moments."""


def check(config: TideConfig, world: World, patience: float) -> bool:
    """Whether every node may take part; collective. Rank 0 prints the table and what is wrong.

    Nodes named sick also go, one a line, to the file that TIDE_SICK_LIST names.
    """
    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), int(os.environ.get("MASTER_PORT", "0"))
    facts = collect(config, world)
    try:
        meeting = Meeting(address, port, world.rank, world.size, patience)
    except ConnectionError as error:
        print(f"{facts.node}, rank {world.rank}: {error}", file=sys.stderr, flush=True)
        return False
    ranks = set(range(world.size))
    here = meeting.collect("here", facts.node, ranks)
    present = set(meeting.announce("present", sorted(here)))
    facts.clock = time.time()

    root, token = Path(config.run.root), meeting.announce("token", secrets.token_hex(4))
    problem = probes.mark(root, token, world.rank) if facts.speaks_for_node else None
    _note(facts, problem)
    marked = meeting.collect("marked", facts.speaks_for_node and problem is None, present)
    writers = meeting.announce("writers", [rank for rank, wrote in marked.items() if wrote])
    if facts.speaks_for_node:
        _note(facts, probes.see(root, token, writers))
    # A rank that cannot use its GPU would keep the others waiting.
    able = meeting.collect("able", facts.device_works, present)
    if meeting.announce("all able", len(able) == world.size and all(able.values())):
        device = choose_device(config.cluster.device, world.local_rank)
        facts.bandwidth, problem = probes.all_reduce(meeting, device, patience)
        _note(facts, problem)

    reports = [Facts(**report) for report in meeting.collect("facts", asdict(facts), present).values()]
    verdict = _conclude(config, reports, ranks - present) if world.rank == 0 else None
    is_healthy = meeting.announce("verdict", verdict)
    if facts.speaks_for_node:
        probes.unmark(root, token, world.rank)
    meeting.collect("end", None, present)  # rank 0 keeps the store until all have read it
    return bool(is_healthy)


def _note(facts: Facts, problem: str | None) -> None:
    if problem is not None:
        facts.problems.append(problem)


def _conclude(config: TideConfig, reports: Sequence[Facts], missing: set[int]) -> bool:
    room = BYTES_PER_PARAMETER * count_parameters(config.model, config.memory).total
    found = judge(reports, missing=_names(missing, reports), checkpoint_bytes=room)
    print(table(reports))
    for finding in found:
        print(f"sick: {finding}")
    if not found:
        nodes = {report.node for report in reports}
        print(f"{len(reports)} ranks on {len(nodes)} node(s) may train")
    sys.stdout.flush()
    _write_sick_list(found)
    return not found


def _names(missing: set[int], reports: Sequence[Facts]) -> list[str]:
    """The nodes of ranks that did not come, as the job script lists them; else their numbers."""
    nodes = os.environ.get("TIDE_NODES", "").split()
    local_size = reports[0].local_size
    index = {rank: rank // local_size for rank in sorted(missing)}
    return list(dict.fromkeys(nodes[i] if i < len(nodes) else f"rank {rank}" for rank, i in index.items()))


def _write_sick_list(found: Sequence[Finding]) -> None:
    nodes = sorted({finding.node for finding in found if finding.node})
    path = os.environ.get("TIDE_SICK_LIST")
    if path and nodes:
        try:
            Path(path).write_text("".join(f"{node}\n" for node in nodes))
        except OSError as error:
            print(f"{path} could not be written: {error}", flush=True)
