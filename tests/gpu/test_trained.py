"""A checkpoint opened on a CUDA device against the reference on the CPU."""

import pytest
import torch

from tests.support.trained import reference_of
from tide_mega.data.loader import TokenBatch
from tide_mega.parallel.device import choose_device
from tide_mega.parallel.groups import World, start_distributed, stop_distributed
from tide_mega.trained.model import TrainedModel
from tide_mega.trained.run import TrainedRun

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module", autouse=True)
def device():
    torch.backends.cuda.matmul.allow_tf32 = False
    device = choose_device("cuda", 0)
    start_distributed(device, World(0, 1, 0, 1), timeout_minutes=5)
    yield device
    stop_distributed()


@pytest.mark.parametrize("k", [0, 2])
def test_scores_inside_and_gradients_are_the_references(tiny_runs, device, k):
    run = TrainedRun.open(tiny_runs[k])
    model, reference = TrainedModel(run, device), reference_of(run)
    tokens_BT, labels_BT = torch.randint(640, (2, 3, 20), generator=torch.Generator().manual_seed(0))
    batch = TokenBatch(tokens_BT, labels_BT)
    expected = reference(*batch)
    expected.loss.backward()
    (scored,) = model.score([batch])
    torch.testing.assert_close(scored.cross_entropy_BT.cpu(), expected.cross_entropy_BT, rtol=0, atol=1e-5)
    assert model.look_inside(tokens_BT).hidden_LBTD.shape == (2, 3, 20, 32)
    if k:
        gradients = model.row_gradients(batch)
        exact_UKD = reference.memory.tables_KVD.grad[:, gradients.ids_U.cpu()].transpose(0, 1)
        torch.testing.assert_close(gradients.tables_UKD.cpu(), exact_UKD, rtol=1e-3, atol=1e-7)
