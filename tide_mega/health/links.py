"""Which nodes the rounds of all-reduces speak against: those that hang, add up wrongly, or are slow."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from tide_mega.config.schema import ClusterConfig
from tide_mega.health.collective import Outcome
from tide_mega.health.rounds import Group

# Bus bandwidth in GB/s that an all-reduce of 256 MiB reaches at least, within a node and between two: about half
# of what NVLink gives, and more than TCP where a node should have InfiniBand or its like for each GPU. Estimates
# from data sheets, not measured. The first name contained in the device's name counts.
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
"""Of the median of its kind, below which a group is slow even if it reaches the floor."""


@dataclass(frozen=True)
class Floors:
    """Bandwidths in bytes per second below which a node should not take part; 0 judges nothing."""

    node: float
    network: float

    @classmethod
    def of(cls, cluster: ClusterConfig, device_name: str) -> "Floors":
        """Those of the configuration, else those known of the device, else none."""
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
    """None where no single node can be blamed."""
    what: str


@dataclass(frozen=True)
class _Result:
    """How the all-reduce of a group went that all its ranks came to."""

    group: Group
    rate: float
    """Bytes per second, that of the slowest rank; 0 where it failed."""
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
    """Judge what the ranks report of the rounds.

    Args:
        rounds: of the check.
        node_of_rank: of the ranks that took part.
        outcomes: of the ranks that reported.
        entered: the ranks that came to each group, by its name.
        floors: bandwidths that must be reached.
        limit: seconds that the rounds had.
    """
    groups = [group for groups in rounds for group in groups]
    found = _absent(groups, node_of_rank, outcomes, entered, limit)
    # A group that a rank did not come to, or fell silent in, says nothing of its other ranks.
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
    """Ranks that came through one group and not to their next; those that fell silent are named elsewhere."""
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
    """Those that failed, or are slower than the floor or than is fair among them."""
    rates = [result.rate for result in results if result.failure is None]
    least = max(floor, FAIR * median(rates)) if rates and floor else 0.0
    return [result for result in results if result.failure is not None or result.rate < least]


def _blame(pairs: Sequence[_Result], floor: float) -> list[Suspicion]:
    """From bad pairs to nodes: who does well with one neighbour is not to blame for how it does with the other."""
    bad = _bad(pairs, floor)
    well = {node for result in pairs if result not in bad for node in result.group.nodes}
    doubtful = {result: [node for node in result.group.nodes if node not in well] for result in bad}
    found = [Suspicion(nodes[0], str(result)) for result, nodes in doubtful.items() if len(nodes) == 1]
    blamed = {suspicion.node for suspicion in found}
    for result, nodes in doubtful.items():
        if not nodes:
            found.append(Suspicion(None, f"{result}, though both do well with their other neighbours"))
        elif len(nodes) == 2 and not blamed & set(nodes):
            # Where others do well it is one of these two; where none does it is all, or what joins them.
            found += (
                [Suspicion(node, str(result)) for node in nodes] if well else [Suspicion(None, str(result))]
            )
    return found
