"""The numbers that are added up, and real processes of which one is slow, hangs, stays away or dies."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.slurm.conftest import free_ports
from tide_mega.health.collective import numbers_of, spread, sum_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("size", [1, 2, 3, 8, 511, 512, 2365])
def test_the_sum_is_that_of_all_members(size):
    numbers = torch.stack([numbers_of(index, size) for index in range(size)])
    assert torch.equal(numbers.double().sum(0), sum_of(size).double())
    assert len({tuple(row) for row in numbers.tolist()}) == size, "no two add the same"
    assert (numbers.amax(1) > 0).all(), "each adds something, and is missed"


def test_the_sums_over_a_hundred_thousand_ranks_are_exact_in_any_order():
    size = 100_000
    places = torch.arange(1, size + 1).unsqueeze(1) >> torch.arange(size.bit_length()) & 1
    largest = 7 * places.float()  # the largest of the seven scales
    assert torch.equal(numbers_of(99_998, size)[-size.bit_length() :], largest[99_998])
    wanted = sum_of(size)[-size.bit_length() :]
    generator = torch.Generator().manual_seed(1)
    for order in (torch.arange(size), torch.randperm(size, generator=generator)):
        one_by_one = torch.zeros(size.bit_length())
        for block in largest[order].split(1000):
            one_by_one = torch.cumsum(torch.cat([one_by_one[None], block]), 0, dtype=torch.float32)[-1]
        assert torch.equal(one_by_one, wanted)
    tree = torch.cat([largest, torch.zeros(2**17 - size, size.bit_length())])
    while len(tree) > 1:
        tree = tree[0::2] + tree[1::2]
    assert torch.equal(tree[0], wanted)
    assert torch.equal(wanted.double(), largest.double().sum(0))


def test_more_ranks_than_can_be_added_exactly_are_refused():
    with pytest.raises(ValueError, match="at most 2396745 ranks"):
        numbers_of(0, 2_396_746)


def test_a_period_is_repeated_to_the_length():
    assert spread(torch.tensor([1.0, 2.0]), 5, torch.device("cpu")).tolist() == [1, 2, 1, 2, 1]


def check_on(fault, tmp_path, nodes=3, limit=60.0):
    """Run the check in a process for each node; statuses, and what rank 0 printed."""
    (port,) = free_ports(1)
    environment = dict(os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    environment |= {"OMP_NUM_THREADS": "1", "TIDE_SICK_LIST": str(tmp_path / "sick")}
    started = []
    for rank in range(nodes):
        words = [str(rank), str(nodes), fault, str(tmp_path / "runs"), str(limit)]
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.health.faulty_rank", *words],
            cwd=ROOT,
            env=environment | {"SLURMD_NODENAME": f"n{rank}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
    printed = [process.communicate(timeout=300)[0] for process in started]
    return [process.returncode for process in started], printed[0]


def sick(tmp_path):
    return (tmp_path / "sick").read_text().split() if (tmp_path / "sick").exists() else []


@pytest.mark.slow
def test_processes_that_are_well_get_through_all_rounds(tmp_path):
    statuses, printed = check_on("none", tmp_path)
    assert statuses == [0, 0, 0], printed
    assert "3 ranks on 3 node(s) may train" in printed and sick(tmp_path) == []
    rows = [line.split() for line in printed.splitlines() if line.startswith("n")]
    # 2 (n - 1) / n of 4 MiB in a millisecond: 4.2 GB/s for two, 5.6 for three.
    assert [row[-5:-2] for row in rows[1:]] == [["-", "4.2", "5.6"]] * 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said"), [("slow", "n0 and n1 reaches 0.0 GB/s"), ("wrong", "n0 and n1 failed: a wrong sum")]
)
def test_a_node_that_is_slow_or_adds_up_wrongly_is_named(tmp_path, fault, said):
    statuses, printed = check_on(fault, tmp_path)
    assert statuses == [5, 5, 5], printed
    assert f"sick: n1: the all-reduce of {said}" in printed
    assert sick(tmp_path) == ["n1"]


@pytest.mark.slow
def test_a_rank_that_never_enters_the_collective_is_named_and_all_end_with_status_5(tmp_path):
    statuses, printed = check_on("stays away", tmp_path, limit=6.0)
    assert statuses == [5, 5, 5], printed
    assert "sick: n1: rank 1 did not come to the all-reduce of all 3 nodes within 6 s" in printed
    assert sick(tmp_path) == ["n1"]


@pytest.mark.slow
def test_a_collective_that_all_enter_and_one_does_not_leave_ends_with_status_5(tmp_path):
    statuses, printed = check_on("hangs", tmp_path, nodes=2, limit=6.0)
    assert statuses == [5, 5], printed
    assert "sick: the all-reduce of n0 and n1 failed: no end within 6 s" in printed


@pytest.mark.slow
def test_a_process_that_dies_in_the_collective_is_named_by_its_silence(tmp_path):
    statuses, printed = check_on("dies", tmp_path, limit=6.0)
    assert statuses == [5, 9, 5], printed
    assert "sick: n1: did not report in time" in printed
    assert sick(tmp_path) == ["n1"]
