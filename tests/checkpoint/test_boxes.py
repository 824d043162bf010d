"""Ranges of flattened weights as boxes: nothing twice, nothing left out, and where it says."""

import math
import random

import pytest
import torch

from tide_mega.checkpoint.contents import boxes_of_range, parts_of
from tide_mega.model.canonical import Box, LocalWeight


@pytest.mark.parametrize("shape", [(7,), (5, 4), (1, 6), (6, 1), (3, 2, 5)])
def test_boxes_of_every_range_hold_its_elements_in_order(shape):
    total = math.prod(shape)
    numbered = torch.arange(total).view(shape)
    for first in range(total + 1):
        for last in range(first, total + 1):
            read = []
            for offset, size in boxes_of_range(shape, first, last):
                cut = numbered[tuple(slice(a, a + n) for a, n in zip(offset, size, strict=True))]
                read += cut.flatten().tolist()
            assert read == list(range(first, last))


def test_a_range_within_rows_needs_three_boxes():
    assert list(boxes_of_range((10, 4), 6, 30)) == [((1, 2), (1, 2)), ((2, 0), (5, 4)), ((7, 0), (1, 2))]
    assert list(boxes_of_range((10, 4), 8, 32)) == [((2, 0), (6, 4))]


def test_random_ranges_of_a_fused_weight_join_to_the_canonical_tensors():
    # Two groups of query, key and value rows of a tensor-parallel rank that holds columns 3..8 of 10.
    chance = random.Random(5)
    canonical = {name: torch.randn(rows, 10) for name, rows in {"q": 8, "k": 4, "v": 4}.items()}
    boxes = []
    for group in range(2):
        boxes += [
            Box("q", (8, 10), (4 * group, 3), (4, 5)),
            Box("k", (4, 10), (2 * group, 3), (2, 5)),
            Box("v", (4, 10), (2 * group, 3), (2, 5)),
        ]
    rows = [canonical[b.name][b.offset[0] : b.offset[0] + b.size[0], 3:8] for b in boxes]
    local = torch.cat(rows)
    weight = LocalWeight(local, tuple(boxes))
    assert weight.shape == (16, 5)
    for _ in range(30):
        cuts = sorted(chance.sample(range(1, local.numel()), 3))
        joined = {name: torch.full_like(values, torch.nan) for name, values in canonical.items()}
        for first, last in zip([0, *cuts], [*cuts, local.numel()], strict=True):
            part_of_rank = local.flatten()[first:last]
            for part in parts_of(weight, first, last):
                values = part_of_rank[part.start : part.start + part.numel].view(part.box.size)
                place = tuple(slice(a, a + n) for a, n in zip(part.box.offset, part.box.size, strict=True))
                assert joined[part.box.name][place].isnan().all()
                joined[part.box.name][place] = values
        for name, values in canonical.items():
            assert torch.equal(joined[name][:, 3:8], values[:, 3:8])
            assert joined[name][:, :3].isnan().all() and joined[name][:, 8:].isnan().all()
