"""What a dry run counts, refuses and remembers, on programs of a few lines."""

import re

import pytest

from tests.fake_cuda import probes
from tide_mega.dryrun.worker import DryRunFailedError

pytestmark = pytest.mark.fake_cuda

WAITS = {
    probes.item: "item",
    probes.branch: "item",
    probes.to_list: "tolist",
    probes.to_host: "copy to host",
    probes.to_pageable_host: "copy to host",
    probes.to_device: "copy to device",
    probes.many_to_device: "copy to device",
    probes.to_device_from_pageable: "copy to device",
    probes.made_of_a_list: "copy to device",
    probes.nonzero: "sized by data",
    probes.distinct: "sized by data",
    probes.by_mask: "sized by data",
    probes.put_by_mask: "sized by data",
    probes.synchronize: "synchronize",
    probes.synchronize_event: "synchronize",
}


@pytest.mark.parametrize("program", WAITS, ids=lambda program: program.__name__)
def test_a_wait_is_counted(dry_worker, program):
    assert dry_worker.run(probes.waits_of, program) == [WAITS[program]]


@pytest.mark.parametrize(
    "program",
    [probes.fill_by_mask, probes.pinned_both_ways, probes.on_the_device, probes.on_the_host],
    ids=lambda program: program.__name__,
)
def test_what_does_not_wait_is_not_counted(dry_worker, program):
    assert dry_worker.run(probes.waits_of, program) == []


REFUSALS = {
    probes.cpu_beside_cuda: r"aten\.add\.Tensor a CPU tensor \[4\]",
    probes.cpu_index: r"aten\.index\.Tensor a CPU tensor \[2\]",
    probes.cpu_to_nccl: r"NCCL's allreduce_ a tensor on cpu",
    probes.cuda_to_gloo: r"gloo's allreduce_ a tensor on cuda",
    probes.strided_to_nccl: r"not contiguous",
    probes.uneven_all_to_all: r"has room for 3",
    probes.numpy_of_cuda: r"can't convert a CUDA tensor to numpy",
}


@pytest.mark.parametrize("program", REFUSALS, ids=lambda program: program.__name__)
def test_what_a_gpu_refuses_is_refused(dry_worker, program):
    assert re.search(REFUSALS[program], dry_worker.run(probes.refusal_of, program, 2))


def test_integers_have_their_values_and_floats_count_as_one(dry_worker):
    assert dry_worker.run(probes.value_of, probes.values_are_kept) == {
        "ids": [1, 2, 3],
        "inverse": [2, 0, 2, 1],
        "in place": [5, 2, 3, 0],
        "picked": [3, 3],
        "unknown": 1.0,
        "finite": True,
        "count": 1.0,
        "devices": ["cuda:0", "cpu", "cuda:0"],
        "type": "torch.cuda.FloatTensor",
        "addresses": 3,
    }


@pytest.mark.parametrize(
    ("rank", "counts", "ids"), [(0, [3, 3], [0, 2, 4, 0, 2, 4]), (1, [2, 2], [1, 3, 1, 3])]
)
def test_the_other_ranks_are_alike(dry_worker, rank, counts, ids):
    assert dry_worker.run(probes.value_of, probes.values_received, 2, rank) == {
        "counts": counts,
        "ids": ids,
        "gathered": [7, 8, 7, 8],
        "objects": [{"a": 1}, {"a": 1}],
    }


def test_a_worker_goes_on_after_a_failure_and_a_death(dry_worker):
    with pytest.raises(DryRunFailedError, match=r"(?s)Traceback.*ValueError: on purpose"):
        dry_worker.run(probes.fail)
    with pytest.raises(DryRunFailedError, match="die: the process died with status 768"):
        dry_worker.run(probes.die)
    assert dry_worker.run(probes.add, 1, 2) == 3
