"""Whole trainings on a CUDA device that is not there: what a GPU would refuse, and what it would pay for."""

import pytest

from tests.fake_cuda.allowed import complaints, unused
from tests.fake_cuda.cases import SLOW, TOPOLOGIES
from tests.fake_cuda.training import STEPS

pytestmark = pytest.mark.fake_cuda

NAMES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in TOPOLOGIES]


@pytest.mark.parametrize("name", NAMES)
def test_a_training_does_on_cuda_what_the_lists_allow(trained, name):
    report = trained(name)
    assert complaints(report, "float32" if name == "fp32" else "bfloat16") == []
    # The steps were made, on the branches that a GPU takes, and copied to the host.
    assert report.updates == STEPS
    assert report.boxes > 0
    assert not report.is_redirected
    has_memory = name != "baseline"
    assert any(kernel.startswith("mix.triton.") for kernel in report.step.launches) == has_memory


EXPECTED = {
    "data, zero 2": {"allreduce_", "_allgather_base_"},
    "data, zero 3": {"_allgather_base_", "_reduce_scatter_base_"},
    "tensor": {"allreduce_", "_allgather_base_"},
    "tensor, sequence parallel": {"_allgather_base_", "_reduce_scatter_base_"},
    "pipeline, first": {"send", "recv_", "broadcast_"},
    "interleaved, first": {"send", "recv_", "broadcast_"},
    "owners of all": {"alltoall_base_"},
}


@pytest.mark.parametrize("name", EXPECTED)
def test_a_topology_communicates_as_it_should(trained, name):
    over_nccl = {c.name for c in trained(name).step.collectives if c.on == "cuda" and c.members > 1}
    assert EXPECTED[name] <= over_nccl


@pytest.mark.slow
def test_no_line_of_the_lists_is_out_of_date(trained):
    assert unused(trained(name) for name in TOPOLOGIES) == []
