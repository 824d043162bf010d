"""What a dry run accounts, on programs whose accounts are known by hand."""

import pytest

from tests.fake_cuda import ledgers
from tests.fake_cuda.cases import TOPOLOGIES
from tide_mega.config.sizes import count_parameters
from tide_mega.dryrun.ledger import BACKWARD, FORWARD
from tide_mega.plan.rank import run_rank

pytestmark = pytest.mark.fake_cuda


def test_storages_are_held_from_their_making_to_their_last_view(dry_worker):
    found = dry_worker.run(ledgers.of, ledgers.two_at_a_time)
    assert found["result"] == [2048, 1024, 1024, 1024, 0]
    assert found["peaks"] == {"build": 2048}


def test_a_storage_becomes_what_it_is_named(dry_worker):
    before, after = dry_worker.run(ledgers.of, ledgers.named)["result"]
    assert sum(before.values()) == 512
    assert after == {"weights": 512}


def test_products_and_their_backward_passes_are_told_apart(dry_worker):
    work = dry_worker.run(ledgers.of, ledgers.product)["work"]
    flops = 2 * 8 * 32 * 4
    read = 4 * (8 * 32 + 32 * 4 + 8 * 4)
    products = [(phase, found, size, least, n) for phase, name, found, size, least, n in work if name == "mm"]
    # Both products of the backward pass read and write as much as the first.
    assert products == [(FORWARD, flops, read, 4, 1), (BACKWARD, flops, read, 4, 2)]


def test_of_a_table_only_the_rows_count(dry_worker):
    ((phase, name, _, size, _, count),) = dry_worker.run(ledgers.of, ledgers.rows_of_a_table)["work"]
    assert (phase, name, count) == ("read", "index", 1)
    assert size == 3 * 8 + 2 * 3 * 64 * 4


def test_a_compiled_function_is_one_kernel(dry_worker):
    found = dry_worker.run(ledgers.of, ledgers.one_kernel)
    ((_, _, _, size, _, count),) = found["work"]
    assert (size, count) == (800, 1)
    assert found["peaks"] == {"build": 1024}
    assert found["launches"] == {"build": 1}


def test_collectives_are_counted_by_group_with_the_bytes_of_the_whole(dry_worker):
    everybody = (0, 1, 2, 3)
    assert dry_worker.run(ledgers.of, ledgers.collectives, 4)["messages"] == [
        ("allreduce_", everybody, 2, 800),
        ("_allgather_base_", everybody, 1, 1600),
        ("alltoall_base_", everybody, 1, 800),
    ]


@pytest.fixture(scope="module")
def baseline(dry_worker, tiny_data, tmp_path_factory):
    topology = TOPOLOGIES["baseline"]
    config = topology.configuration(tiny_data, tmp_path_factory.mktemp("plan"))
    return config, dry_worker.run(run_rank, config, topology.world, topology.rank)


def test_a_step_of_the_baseline_makes_six_flops_for_each_parameter_and_token(baseline):
    config, step = baseline
    count = count_parameters(config.model, config.memory)
    tokens = step.microbatches * config.trainer.micro_batch_size * config.data.seq_length
    products = sum(
        work.flops * n for work, n in step.work.items() if work.flops and "attention" not in work.name
    )
    assert products == 6 * tokens * (count.attention + count.mlp + count.output_product)


def test_a_step_ends_with_what_it_began_with(baseline):
    _, step = baseline
    assert step.instants[-1].phase == "update"
    assert step.peaks["update"].bytes < step.peak.bytes
    assert set(step.built) >= {"weights", "masters", "moments"}
    assert step.built["weights"] == pytest.approx(2 * step.elements, rel=0.02)
    # Two replicas: each keeps half of the masters, and twice that in moments.
    assert step.built["masters"] == pytest.approx(4 * step.elements / 2, rel=0.02)
    assert step.built["moments"] == pytest.approx(2 * step.built["masters"], rel=0.02)
