"""What the meter counts for the libraries by formula, against every collective that they make in a dry run."""

import pytest

from tests.fake_cuda.cases import TOPOLOGIES
from tests.support.slow import quick_and_slow
from tide_mega.plan.rank import run_rank

pytestmark = pytest.mark.fake_cuda

CASES = (
    "baseline",
    "data, zero 2",
    "tensor",
    "tensor, sequence parallel",
    "pipeline, last",
    "interleaved, first",
    "owners, tensor, ahead",
    "everything",
)
PLACES = {
    "tensor parallel": (
        *("megatron/core/tensor_parallel/", "tide_mega/model/modules.py", "tide_mega/kernels/vocab_loss/"),
        "tide_mega/parallel/accumulation.py:GradientAccumulator._complete_sequence_slices",
    ),
    "embedding": ("tide_mega/parallel/accumulation.py:GradientAccumulator._join_tied_copies",),
    "pipeline": ("megatron/core/pipeline_parallel/",),
    "data parallel": ("deepspeed/",),
}
FLAGS = 64
"""Bytes: DeepSpeed's flags and norms stay below, one by one."""


def sent_bytes(message, moved):
    """By a ring; a receiver sends nothing."""
    members = len(message.group)
    if message.name in ("send", "recv_"):
        return moved.bytes if message.name == "send" else 0
    return (2 if message.name == "allreduce_" else 1) * (members - 1) / members * moved.bytes


@pytest.mark.parametrize("name", quick_and_slow(["baseline", "everything"], CASES))
def test_the_meter_counts_what_the_libraries_send(dry_worker, tiny_data, tmp_path, name):
    topology = TOPOLOGIES[name]
    config = topology.configuration(tiny_data, tmp_path)
    step = dry_worker.run(run_rank, config, topology.world, topology.rank)
    for kind, places in PLACES.items():
        made = sum(
            sent_bytes(message, moved)
            for message, moved in step.messages.items()
            if message.place.startswith(places) and moved.bytes > FLAGS * moved.count
        )
        told = step.traffic.get(kind, {}).get("sent", 0)
        # DeepSpeed pads what it gathers.
        found = {m: moved for m, moved in step.messages.items() if m.place.startswith(places)}
        assert told == pytest.approx(made, rel=0.03 if kind == "data parallel" else 1e-6), (kind, found)
