from dataclasses import replace

from tide_mega.health.collective import Outcome
from tide_mega.health.facts import Facts
from tide_mega.health.links import Suspicion
from tide_mega.health.verdict import judge, table

GOOD = Facts(
    rank=0,
    node="n0",
    local_rank=0,
    local_size=2,
    versions={"torch": "2.13.0", "code": "abc"},
    gpus=["H100 80 GiB", "H100 80 GiB"],
    root_free=10**12,
    tmp_free=10**11,
    clock=1000.0,
    outcome=Outcome({"n0": 3.2e11, "n0+n1": 5e10, "n2+n0": 4e10, "all": 6e10}),
)


def cluster(**changed):
    """Three nodes of two ranks; `n1=...` changes that node's first report."""
    reports = []
    for node in range(3):
        first = replace(GOOD, rank=2 * node, node=f"n{node}", **changed.get(f"n{node}", {}))
        second = Facts(rank=2 * node + 1, node=f"n{node}", local_rank=1, local_size=2, clock=first.clock)
        reports += [first, second]
    return reports


def said(reports, **kwargs):
    return [str(finding) for finding in judge(reports, **kwargs)]


def test_equal_nodes_are_healthy():
    assert said(cluster(), checkpoint_bytes=10**11) == []


def test_the_node_that_differs_is_named_not_the_others():
    odd = cluster(n1={"versions": {"torch": "2.12.0", "code": "abc"}})
    assert said(odd) == ["n1: torch is 2.12.0, where 2 others have 2.13.0"]
    first = cluster(n0={"versions": {"torch": "2.13.0", "code": "other"}})
    assert said(first) == ["n0: code is other, where 2 others have abc"]


def test_missing_and_different_gpus():
    assert said(cluster(n2={"gpus": ["H100 80 GiB"]})) == [
        "n2: GPU 1 is absent, where 2 others have H100 80 GiB",
        "n2: shows 1 GPUs for 2 processes",
    ]


def test_a_clock_that_is_off():
    assert said(cluster(n1={"clock": 1001.9})) == []
    assert said(cluster(n1={"clock": 997.0})) == ["n1: its clock is -3.0 s from the others'"]


def test_too_little_room():
    found = said(cluster(n1={"root_free": 10**9, "tmp_free": 10**8}), checkpoint_bytes=38 * 10**9)
    assert found == [
        "n1: run.root has 1.0 GB free, and a checkpoint needs 38.0 GB",
        "n1: TMPDIR has 0.10 GB free",
    ]


def test_own_problems_and_absence():
    found = said(cluster(n2={"problems": ["x"]})[2:], missing=["n0"])
    assert found == ["n0: did not report in time", "n2: x"]


def test_what_the_all_reduces_have_shown():
    suspicions = [Suspicion("n1", "hangs"), Suspicion(None, "all are slow")]
    assert said(cluster(), suspicions=suspicions) == ["n1: hangs", "all are slow"]


def test_the_table_has_a_line_for_each_node():
    lines = table(cluster(n1={"clock": 1000.25})).splitlines()
    assert set(lines.pop(1)) == {"-"}
    assert [line.split()[:2] for line in lines[1:]] == [["n0", "0-1"], ["n1", "2-3"], ["n2", "4-5"]]
    assert (
        "+250" in lines[2]
        and "2 x H100 80 GiB" in lines[1]
        and lines[1].split()[-5:-2] == ["320.0", "50.0", "60.0"]
    )
