from collections import Counter

import pytest

from tide_mega.health.rounds import EVERYBODY, plan


def nodes_of(count, ranks=2):
    return {rank: f"n{rank // ranks}" for rank in range(count * ranks)}


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 33])
@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_a_rank_is_in_one_group_at_a_time_and_a_node_meets_two_others(count, ranks):
    rounds = plan(nodes_of(count, ranks))
    for groups in rounds:
        members = [rank for group in groups for rank in group.ranks]
        assert len(members) == len(set(members))
    groups = [group for groups in rounds for group in groups]
    assert len({group.name for group in groups}) == len(groups)
    assert all(len(group.ranks) > 1 for group in groups)
    meetings = Counter(node for group in groups if len(group.nodes) == 2 for node in group.nodes)
    assert set(meetings.values()) == {1: set(), 2: {1}}.get(count, {2})
    assert sum(len(group.nodes) == 1 for group in groups) == (count if ranks > 1 else 0)
    largest = max((group.ranks for group in groups), key=len, default=(0,))
    assert largest == tuple(range(count * ranks))
    assert (groups[-1].name == EVERYBODY) == (count > 2) if groups else count * ranks == 1


def test_the_ranks_of_a_node_need_not_follow_each_other():
    (inside, pair) = plan({0: "a", 1: "b", 2: "a", 3: "b"})
    assert [group.ranks for group in inside] == [(0, 2), (1, 3)]
    assert pair[0].ranks == (0, 1, 2, 3) and str(pair[0]) == "a and b" and pair[0].name == "a+b"
