"""Who is blamed: clusters made up, with slow, hung, wrong and silent nodes in them."""

import pytest

from tests.health.test_rounds import nodes_of
from tide_mega.config.schema import ClusterConfig
from tide_mega.health.collective import Outcome
from tide_mega.health.links import Floors, suspect
from tide_mega.health.rounds import plan

FLOORS = Floors(node=150e9, network=20e9)


class Cluster:
    """`count` nodes that are well until a test changes what their ranks report."""

    def __init__(self, count, ranks=2):
        self.node_of_rank = nodes_of(count, ranks)
        self.rounds = plan(self.node_of_rank)
        self.groups = [group for groups in self.rounds for group in groups]
        self.outcomes = {rank: Outcome() for rank in self.node_of_rank}
        self.entered = {group.name: frozenset(group.ranks) for group in self.groups}
        for group in self.groups:
            self.rate(group, 300e9 if len(group.nodes) == 1 else 100e9)

    def rate(self, group, rate):
        for rank in group.ranks:
            self.outcomes[rank].rates[group.name] = rate

    def slow(self, *nodes, rate=9e9):
        for group in self.groups:
            if len(group.nodes) > 1 and set(nodes) & set(group.nodes):
                self.rate(group, rate)

    def named(self, *nodes):
        (group,) = [group for group in self.groups if group.nodes == nodes]
        return group

    def fail(self, group, what):
        for rank in group.ranks:
            del self.outcomes[rank].rates[group.name]
            self.outcomes[rank].failures[group.name] = what

    def hang(self, group):
        """All of its ranks enter and stay; whoever waits for one of them later stays as well."""
        held = dict.fromkeys(group.ranks, group)
        for other in self.groups[self.groups.index(group) :]:
            came = {rank for rank in other.ranks if held.get(rank, other) is other}
            if held.keys() & set(other.ranks):
                held |= dict.fromkeys(came, other)
                for rank in other.ranks:
                    self.outcomes[rank].rates.pop(other.name, None)
            self.entered[other.name] = frozenset(came)
        for rank, place in held.items():
            self.outcomes[rank].stuck = place.name

    def suspicions(self, floors=FLOORS):
        found = suspect(self.rounds, self.node_of_rank, self.outcomes, self.entered, floors, 180.0)
        return [(suspicion.node, suspicion.what) for suspicion in found]

    def blamed(self, floors=FLOORS):
        return {node for node, _ in self.suspicions(floors)}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 16])
def test_nodes_that_are_well_are_not_blamed(count):
    assert Cluster(count).suspicions() == []


@pytest.mark.parametrize("count", [3, 4, 5, 16, 17])
def test_the_slow_node_is_named_wherever_it_stands(count):
    for node in range(count):
        cluster = Cluster(count)
        cluster.slow(f"n{node}")
        assert cluster.blamed() == {f"n{node}"}
        assert "reaches 9.0 GB/s" in cluster.suspicions()[0][1]


def test_several_slow_nodes_are_named_and_a_good_one_between_them_is_not():
    for nodes in (["n3", "n4"], ["n3", "n5"], ["n0", "n7", "n4"]):
        cluster = Cluster(8)
        cluster.slow(*nodes)
        assert cluster.blamed() == set(nodes)


def test_a_node_above_the_floor_and_far_below_the_others_is_slow():
    cluster = Cluster(6)
    cluster.slow("n2", rate=45e9)
    assert cluster.blamed() == {"n2"}
    cluster = Cluster(6)
    cluster.slow("n2", rate=55e9)
    assert cluster.blamed() == set()


def test_where_all_are_slow_no_node_is_named():
    cluster = Cluster(4)
    cluster.slow("n0", "n1", "n2", "n3")
    assert cluster.blamed() == {None}
    assert ("the all-reduce of n0 and n1 reaches 9.0 GB/s") in [what for _, what in cluster.suspicions()]
    assert cluster.blamed(Floors(0.0, 0.0)) == set(), "without floors speed is not judged"


def test_of_two_nodes_neither_is_named():
    cluster = Cluster(2)
    cluster.slow("n1")
    assert cluster.suspicions() == [(None, "the all-reduce of n0 and n1 reaches 9.0 GB/s")]


def test_a_link_between_two_good_nodes():
    cluster = Cluster(5)
    cluster.rate(cluster.named("n1", "n2"), 2e9)
    ((node, what),) = cluster.suspicions()
    assert node is None and "n1 and n2 reaches 2.0 GB/s, though both do well" in what


def test_a_node_slow_inside_itself_is_named_once():
    cluster = Cluster(4)
    cluster.rate(cluster.named("n2"), 40e9)
    cluster.slow("n2")
    assert cluster.suspicions() == [("n2", "the all-reduce of the ranks of n2 reaches 40.0 GB/s")]


def test_the_slowest_rank_counts():
    cluster = Cluster(4)
    group = cluster.named("n1")
    cluster.outcomes[group.ranks[1]].rates[group.name] = 1e9
    assert cluster.blamed() == {"n1"}


def test_only_everybody_together_is_slow():
    cluster = Cluster(4)
    cluster.rate(cluster.groups[-1], 3e9)
    ((node, what),) = cluster.suspicions()
    assert node is None and "all 4 nodes reaches 3.0 GB/s, and no two nodes" in what


def test_wrong_sums_follow_the_same_rules():
    cluster = Cluster(5)
    for pair in (("n1", "n2"), ("n2", "n3")):
        cluster.fail(cluster.named(*pair), "a wrong sum")
    assert cluster.blamed(Floors(0.0, 0.0)) == {"n2"}


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_a_node_that_hangs_by_itself_is_named_alone(count):
    cluster = Cluster(count)
    cluster.hang(cluster.named("n0"))
    wanted = "the all-reduce of the ranks of n0 failed: no end within 180 s"
    assert cluster.suspicions(Floors(0.0, 0.0)) == [("n0", wanted)]


def test_a_pair_that_hangs_is_named_and_those_who_wait_for_it_are_not():
    cluster = Cluster(6)
    cluster.hang(cluster.named("n2", "n3"))
    assert cluster.blamed() == {"n2", "n3"}


def test_a_hang_of_all_together_names_no_node():
    cluster = Cluster(4)
    cluster.hang(cluster.groups[-1])
    ((node, what),) = cluster.suspicions()
    assert node is None and "all 4 nodes failed: no end within 180 s" in what


def test_a_rank_that_does_not_come_is_named_and_the_waiting_are_not():
    cluster = Cluster(4)
    pair = cluster.named("n2", "n3")
    cluster.hang(pair)
    late = pair.ranks[0]
    cluster.entered[pair.name] -= {late}
    cluster.outcomes[late].stuck = pair.name
    wanted = f"rank {late} did not come to the all-reduce of n2 and n3 within 180 s"
    assert cluster.suspicions() == [("n2", wanted)]


def test_what_a_silent_rank_took_part_in_is_held_against_nobody():
    cluster = Cluster(4)
    for pair in (("n1", "n2"), ("n2", "n3")):
        cluster.fail(cluster.named(*pair), "connection closed by peer")
    cluster.fail(cluster.groups[-1], "connection closed by peer")
    del cluster.outcomes[4]
    assert cluster.suspicions() == [], "rank 4 of n2 is named for its silence"


@pytest.mark.parametrize(
    ("gpu", "node", "network"),
    [
        ("NVIDIA H100 80GB HBM3 79 GiB", 150, 20),
        ("NVIDIA H100 PCIe 79 GiB", 10, 5),
        ("NVIDIA GH200 480GB", 20, 10),
        ("NVIDIA GB200", 300, 20),
        ("none", 0, 0),
    ],
)
def test_floors_are_those_of_the_gpu_unless_given(gpu, node, network):
    assert Floors.of(ClusterConfig(), gpu) == Floors(node * 1e9, network * 1e9)
    given = ClusterConfig(min_node_gbs=0.0, min_network_gbs=7.0)
    assert Floors.of(given, gpu) == Floors(0.0, 7e9)
