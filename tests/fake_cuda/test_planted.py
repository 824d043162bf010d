"""The test of the test: mistakes planted in the product are found, and named by their place."""

import pytest

from tests.fake_cuda import plants
from tests.fake_cuda.allowed import complaints
from tests.fake_cuda.cases import TOPOLOGIES
from tide_mega.dryrun.worker import DryRunFailedError

pytestmark = pytest.mark.fake_cuda
LAYER = "tide_mega/model/layer.py:TideLayer._forward_feed_forward"


@pytest.fixture
def train_with(dry_worker, tiny_data, tmp_path):
    def run(plant, name):
        topology = TOPOLOGIES[name]
        config = topology.configuration(tiny_data, tmp_path)
        return dry_worker.run(plants.train_with, plant, config, topology.world, topology.rank, tmp_path)

    return run


def test_a_tensor_made_on_the_cpu_is_found(train_with):
    found = (
        r"tide_mega/kernels/rope\.py:_turn gives aten\.mul\.Tensor a CPU tensor \[32, 1, 1, 8\] beside CUDA"
    )
    with pytest.raises(DryRunFailedError, match=found):
        train_with(plants.rotation_on_the_cpu, "baseline")


def test_a_number_read_in_the_hot_path_is_found(train_with):
    report = train_with(plants.look_at_a_number, "one")
    assert complaints(report, "bfloat16") == [
        # Two layers, three microbatches; the evaluation has two.
        f"step: {LAYER} makes the host wait 6 times (item)",
        f"evaluation: {LAYER} makes the host wait 4 times (item)",
    ]


def test_a_float64_on_the_device_is_found(train_with):
    report = train_with(plants.widen_to_float64, "tensor")
    found = complaints(report, "bfloat16")
    assert found[0] == f"step: {LAYER} computes in float64 on the device, 4 times (_to_copy)"
    assert all(LAYER in complaint for complaint in found)


@pytest.mark.slow
def test_a_product_in_float32_is_found(train_with):
    report = train_with(plants.multiply_in_float32, "one")
    assert complaints(report, "bfloat16")[0] == f"step: {LAYER} multiplies matrices of float32, 6 times"


@pytest.mark.slow
def test_host_memory_given_to_nccl_is_found(train_with):
    found = r"tide_mega/memory/memory\.py:Memory\.send_gradients gives NCCL's allreduce_ a tensor on cpu"
    with pytest.raises(DryRunFailedError, match=found):
        train_with(plants.send_host_memory, "pipeline, first")


@pytest.mark.slow
def test_a_kernel_given_a_transposed_tensor_is_found(train_with):
    with pytest.raises(
        DryRunFailedError, match=r"launches forward_kernel with logits_ptr .* strides \(1, 64\)"
    ):
        train_with(plants.launch_on_a_transposed_tensor, "one")
