from types import SimpleNamespace

import pytest
import torch

from tide_mega.data.loader import TokenBatch
from tide_mega.memory.memory import Memory
from tide_mega.training.live import StepNullWeights

BINS = torch.tensor([0, 0, 9, -1], dtype=torch.int8)
"""Types 0 and 1 in the rarest decile, 2 in the commonest, 3 dropped."""


class Alone:
    def size(self):
        return 1


class FakeMemory:
    num_layers = 2
    alpha_L = None

    def __init__(self, null_LBT):
        self.null_weights = lambda: null_LBT

    recording = Memory.recording


def stage_with(null_LBT, num_blocks=2):
    return SimpleNamespace(
        num_blocks=num_blocks, memory=FakeMemory(null_LBT), groups=SimpleNamespace(data=Alone())
    )


def test_each_layer_has_its_mean_by_the_decile_of_the_token_itself():
    tokens = [torch.tensor([[0, 1], [2, 2]]), torch.tensor([[2, 3], [0, 2]])]
    first_BT = torch.tensor([[0.5, 0.25], [9.0, 9.0], [0.75, 0.125], [0.75, 0.25]])
    stage = stage_with(torch.stack([first_BT, first_BT / 2]))
    null = StepNullWeights(stage, BINS)
    null.record(True)
    assert stage.memory.alpha_L == {}
    # Labels are of other types, which counts nothing, and a row of padding has none.
    labels = [torch.tensor([[3, 3], [-1, -1]]), torch.full((2, 2), 3)]
    result = null.read([TokenBatch(*both) for both in zip(tokens, labels, strict=True)])
    assert stage.memory.alpha_L is None
    rarest = {slot: weight for slot, weight in result.by_layer_and_bin[0].items() if weight is not None}
    assert rarest == {"0": 0.5, "9": 0.5, "dropped": 0.125}
    assert result.by_layer_and_bin[1]["0"] == 0.25
    assert result.by_layer == pytest.approx([2.625 / 6, 2.625 / 12])


def test_a_step_that_is_not_logged_records_nothing():
    stage = stage_with(torch.zeros(2, 1, 1))
    StepNullWeights(stage, BINS).record(False)
    assert stage.memory.alpha_L is None


def test_without_memory_there_is_nothing_to_read():
    stage = stage_with(None, num_blocks=0)
    null = StepNullWeights(stage, BINS)
    null.record(True)
    assert stage.memory.alpha_L is None
    assert null.read([]).by_layer_and_bin == []
