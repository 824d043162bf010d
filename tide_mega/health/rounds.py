"""Plans which ranks all-reduce together, so that a node that is slow, hangs or sums wrongly can be identified."""

from collections.abc import Mapping
from dataclasses import dataclass

EVERYBODY = "all"
"""Name of the group of all ranks, used with more than two nodes."""


@dataclass(frozen=True)
class Group:
    """Processes that take part in one all-reduce."""

    nodes: tuple[str, ...]
    ranks: tuple[int, ...]

    @property
    def name(self) -> str:
        """Unique among all rounds of a check."""
        return "+".join(self.nodes) if len(self.nodes) < 3 else EVERYBODY

    def __str__(self) -> str:
        if len(self.nodes) == 1:
            return f"the ranks of {self.nodes[0]}"
        return " and ".join(self.nodes) if len(self.nodes) == 2 else f"all {len(self.nodes)} nodes"


def plan(node_of_rank: Mapping[int, str]) -> list[list[Group]]:
    """Return rounds of groups; the groups of a round are disjoint.

    First every node with several ranks by itself; then pairs of neighbours in a ring of nodes, so that with
    three or more nodes each meets two different others; finally all ranks, unless they were already a group.
    """
    ranks: dict[str, list[int]] = {}
    for rank in sorted(node_of_rank):
        ranks.setdefault(node_of_rank[rank], []).append(rank)
    nodes = list(ranks)

    def group(*members: str) -> Group:
        return Group(members, tuple(sorted(rank for node in members for rank in ranks[node])))

    rounds = [[group(node) for node in nodes if len(ranks[node]) > 1]]
    if len(nodes) > 1:
        count = len(nodes)
        ring = [(nodes[i], nodes[(i + 1) % count]) for i in range(count if count > 2 else 1)]
        even = count - count % 2
        rounds += [[group(*pair) for pair in ring[start:even:2]] for start in (0, 1)]
        rounds += [[group(*pair) for pair in ring[even:]]]
    if len(nodes) > 2:
        rounds += [[group(*nodes)]]
    return [groups for groups in rounds if groups]
