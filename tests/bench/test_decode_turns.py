"""Turns: everyone takes every token, beginning with another one each time."""

import pytest
import torch

from tide_mega.lab.bench.decode import Turns, take_turns


def test_order_rotates_and_warmup_does_not_count():
    called = []
    steps = {name: lambda ids_B, name=name: called.append((name, int(ids_B[0]))) for name in "abc"}
    found = take_turns(steps, torch.arange(4)[:, None], turns=3, warmup=2, is_cuda=False)
    assert called == [
        *(("a", 0), ("b", 0), ("c", 0)),
        *(("b", 1), ("c", 1), ("a", 1)),
        *(("c", 2), ("a", 2), ("b", 2)),
        *(("a", 3), ("b", 3), ("c", 3)),
        *(("b", 0), ("c", 0), ("a", 0)),
    ]
    assert all(len(turns.cpu) == len(turns.wall) == 3 for turns in found.values())


def test_ratios_are_within_turns():
    base, other = Turns(cpu=[1.0, 2.0, 4.0]), Turns(cpu=[2.0, 2.0, 4.0])
    assert other.ratio(base, "cpu").median == 1.0 and other.ratio(base, "cpu").high == pytest.approx(1.5)
    assert base.median("cpu") == 2.0
