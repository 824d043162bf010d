"""Names the nodes that the all-reduces speak against: those that hang, compute wrong sums, or are slow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from tide_mega.config.schema import ClusterConfig
from tide_mega.health.collective import Outcome
from tide_mega.health.rounds import Group

# Minimum bus bandwidth in GB/s of an all-reduce of 256 MiB within a node and between two: about half of NVLink's
# rate, and more than TCP reaches where a node should have InfiniBand or similar for each GPU. Estimates from
# data sheets, not measured. The first key that is contained in the device's name applies.
_FLOORS = (
    ("B200", 300.0, 20.0),
    ("GH200", 20.0, 10.0),
    ("H200 NVL", 10.0, 5.0),
    ("H200", 150.0, 20.0),
    ("H100 NVL", 10.0, 5.0),
    ("H100 PCIe", 10.0, 5.0),
    ("H100", 150.0, 20.0),
    ("A100-SXM", 100.0, 10.0),
)
FAIR = 0.5
"""Fraction of the median of its kind below which a group is slow even if it reaches the floor."""


@dataclass(frozen=True)
class Floors:
    """Bandwidths in bytes per second below which a node should not take part; 0 disables the check."""

    node: float
    network: float

    @classmethod
    def of(cls, cluster: ClusterConfig, device_name: str) -> "Floors":
        """Return the floors of the configuration, else those known for the device, else none."""
        known = [floors for name, *floors in _FLOORS if name.lower() in device_name.lower()]
        node, network = known[0] if known else (0.0, 0.0)
        if cluster.min_node_gbs is not None:
            node = cluster.min_node_gbs
        if cluster.min_network_gbs is not None:
            network = cluster.min_network_gbs
        return cls(node * 1e9, network * 1e9)


@dataclass(frozen=True)
class Suspicion:
    """Something wrong between ranks."""

    node: str | None
    """None if no single node can be blamed."""
    what: str


@dataclass(frozen=True)
class _Result:
    """The result of a group's all-reduce in which all its ranks took part."""

    group: Group
    rate: float
    """Bytes per second of the slowest rank; 0 if it failed."""
    failure: str | None

    def __str__(self) -> str:
        if self.failure is not None:
            return f"the all-reduce of {self.group} failed: {self.failure}"
        return f"the all-reduce of {self.group} reaches {self.rate / 1e9:.1f} GB/s"


def suspect(
    rounds: Sequence[Sequence[Group]],
    node_of_rank: Mapping[int, str],
    outcomes: Mapping[int, Outcome],
    entered: Mapping[str, frozenset[int]],
    floors: Floors,
    limit: float,
) -> list[Suspicion]:
    """Judge the ranks' reports of the rounds.

    Args:
        rounds: of the check.
        node_of_rank: of the ranks that took part.
        outcomes: of the ranks that reported.
        entered: the ranks that entered each group, by group name.
        floors: bandwidths that must be reached.
        limit: time limit of the rounds in seconds.
    """
    groups = [group for groups in rounds for group in groups]
    found = _absent(groups, node_of_rank, outcomes, entered, limit)
    # A group that a rank did not enter, or fell silent in, says nothing about its other ranks.
    results = [_result(g, outcomes, limit) for g in groups if set(g.ranks) <= entered[g.name] & set(outcomes)]
    inside = [result for result in results if len(result.group.nodes) == 1]
    found += [Suspicion(result.group.nodes[0], str(result)) for result in _bad(inside, floors.node)]
    sick = {suspicion.node for suspicion in found}
    pairs = [result for result in results if len(result.group.nodes) == 2]
    found += _blame([pair for pair in pairs if not sick & set(pair.group.nodes)], floors.network)
    if not found:
        everybody = [result for result in results if len(result.group.nodes) > 2]
        found = [
            Suspicion(None, f"{result}, and no two nodes by themselves are amiss")
            for result in _bad(everybody, floors.network)
        ]
    return found


def _absent(
    groups: Sequence[Group],
    node_of_rank: Mapping[int, str],
    outcomes: Mapping[int, Outcome],
    entered: Mapping[str, frozenset[int]],
    limit: float,
) -> list[Suspicion]:
    """Return ranks that finished one group but did not enter their next; silent ones are named elsewhere."""
    found = []
    for rank, outcome in outcomes.items():
        node = node_of_rank[rank]
        missed = [group for group in groups if rank in group.ranks and rank not in entered[group.name]]
        if missed and (outcome.stuck is None or rank not in entered[outcome.stuck]):
            what = f"rank {rank} did not come to the all-reduce of {missed[0]} within {limit:.0f} s"
            found.append(Suspicion(node, what))
    return found


def _result(group: Group, outcomes: Mapping[int, Outcome], limit: float) -> _Result:
    seen = [outcomes[rank] for rank in group.ranks]
    failures = [outcome.failures[group.name] for outcome in seen if group.name in outcome.failures]
    if not failures and any(group.name not in outcome.rates for outcome in seen):
        failures = [f"no end within {limit:.0f} s"]
    if failures:
        return _Result(group, 0.0, failures[0])
    return _Result(group, min(outcome.rates[group.name] for outcome in seen), None)


def _bad(results: Sequence[_Result], floor: float) -> list[_Result]:
    """Return the groups that failed, or are slower than the floor or than `FAIR` of their median."""
    rates = [result.rate for result in results if result.failure is None]
    least = max(floor, FAIR * median(rates)) if rates and floor else 0.0
    return [result for result in results if result.failure is not None or result.rate < least]


def _blame(pairs: Sequence[_Result], floor: float) -> list[Suspicion]:
    """Derive nodes from bad pairs: a node that does well with one neighbour is not to blame for the other."""
    bad = _bad(pairs, floor)
    well = {node for result in pairs if result not in bad for node in result.group.nodes}
    doubtful = {result: [node for node in result.group.nodes if node not in well] for result in bad}
    found = [Suspicion(nodes[0], str(result)) for result, nodes in doubtful.items() if len(nodes) == 1]
    blamed = {suspicion.node for suspicion in found}
    for result, nodes in doubtful.items():
        if not nodes:
            found.append(Suspicion(None, f"{result}, though both do well with their other neighbours"))
        elif len(nodes) == 2 and not blamed & set(nodes):
            # If other pairs do well it is one of these two; if none does it is all nodes, or the network.
            found += (
                [Suspicion(node, str(result)) for node in nodes] if well else [Suspicion(None, str(result))]
            )
    return found
