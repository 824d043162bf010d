"""The GPU's segmented sum, interpreted, against the naive one; and the pieces it works on."""

from collections import Counter

import pytest
import torch

from tide_mega.kernels.row_gradient import naive
from tide_mega.kernels.row_gradient.pieces import Pieces
from tide_mega.kernels.token_order import TokenOrder


def draw_ids(kind, tokens, rows, generator):
    if kind == "one row":
        return torch.full((tokens,), rows - 1)
    if kind == "own rows":
        return torch.randperm(rows, generator=generator)[:tokens]
    ids = torch.randint(0, rows, (tokens,), generator=generator)
    return (
        torch.where(torch.rand(tokens, generator=generator) < 0.7, rows // 2, ids)
        if kind == "frequent"
        else ids
    )


KINDS = ["one row", "own rows", "frequent", "even"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("most", [1, 3, 16, 100])
@pytest.mark.parametrize("rows", [1, 3, 60])
def test_pieces_hold_every_token_once_and_slots_are_not_shared(kind, most, rows):
    check_pieces(draw_ids(kind, 50, rows, torch.Generator().manual_seed(most)), rows, most)


@pytest.mark.parametrize("most", [1, 4])
@pytest.mark.parametrize("over", [0, 1])
def test_pieces_of_rows_that_are_just_short_or_long(most, over):
    check_pieces(torch.arange(5).repeat_interleave(most + over), 5, most)


def check_pieces(ids, rows, most):
    order = TokenOrder.sort(ids, rows)
    pieces = Pieces.cut(order, most)
    counts = Counter(ids.tolist())
    held, slots = Counter(), []
    for piece, row in enumerate(pieces.row_P.tolist()):
        if row == rows:
            continue
        begin = (piece - int(pieces.first_U[row])) * most
        tokens = min(most, counts[row] - begin)
        assert tokens > 0
        held[row] += tokens
        if pieces.slot_U[row] >= 0:
            slots.append(int(pieces.slot_U[row]) + piece - int(pieces.first_U[row]))
    assert held == counts
    assert sorted(slots) == list(range(len(slots))) and len(slots) <= pieces.num_slots
    long = sorted(row for row, count in counts.items() if count > most)
    assert [row for row in pieces.long_M.tolist() if row < rows] == long
    assert [row for row in range(rows) if pieces.slot_U[row] >= 0] == long


def contributions(layers, tokens, blocks, width, dtype, generator):
    alphas = [torch.randn(tokens, blocks + 1, generator=generator).softmax(-1) for _ in range(layers)]
    return alphas, [torch.randn(tokens, width, generator=generator).to(dtype) for _ in range(layers)]


def check(kind, layers, blocks, width, dtype, pairs):
    from tide_mega.kernels.row_gradient import triton as fused

    fused.PAIRS_OF_A_PIECE = pairs
    generator = torch.Generator().manual_seed(blocks)
    rows, tokens = 23, 21
    order = TokenOrder.sort(draw_ids(kind, tokens, rows, generator), rows)
    alphas, gradients = contributions(layers, tokens, blocks, width, dtype, generator)
    start = torch.randn(rows, blocks, width, generator=generator)
    expected, got, again = start.clone(), start.clone(), start.clone()
    naive.add_rows(expected, order, alphas, gradients)
    fused.add_rows(got, order, alphas, gradients)
    fused.add_rows(again, order, alphas, gradients)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-4)
    absent = torch.bincount(order.index_N, minlength=rows) == 0
    assert torch.equal(got[absent], start[absent])
    assert torch.equal(got, again)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_sum_equals_the_naive_one_and_repeats_to_the_last_bit(interpreted, kind, dtype):
    interpreted(check, kind, 2, 3, 20, dtype, 12)


@pytest.mark.parametrize(("layers", "blocks", "width"), [(1, 1, 5), (3, 24, 40), (5, 16, 300)])
def test_layers_blocks_and_widths(interpreted, layers, blocks, width):
    interpreted(check, "even", layers, blocks, width, torch.float32, 1536)


def check_awkward():
    """Strided, misaligned and of several dtypes: the same sum."""
    from tide_mega.kernels.row_gradient.triton import add_rows

    generator = torch.Generator().manual_seed(3)
    order = TokenOrder.sort(torch.tensor([1, 0, 1, 1]), 2)
    alphas, gradients = contributions(3, 4, 2, 12, torch.float32, generator)
    strided = gradients[0].T.contiguous().T
    misaligned = torch.empty(4 * 12 + 1)[1:].view(4, 12).copy_(gradients[1])
    expected, got = torch.zeros(2, 2, 12), torch.zeros(2, 2, 12)
    given = [strided, misaligned, gradients[2].bfloat16()]
    naive.add_rows(expected, order, alphas, given)
    add_rows(got, order, [alphas[0].T.contiguous().T, *alphas[1:]], given)
    torch.testing.assert_close(got, expected)


def test_strided_misaligned_and_mixed_gradients_are_read_right(interpreted):
    interpreted(check_awkward)


def check_readable():
    from tide_mega.kernels.row_gradient.triton import _readable

    aligned = torch.randn(4, 12)
    misaligned = torch.empty(4 * 12 + 1)[1:].view(4, 12).copy_(aligned)
    strided = aligned.T.contiguous().T
    read = _readable([aligned, misaligned, strided])
    assert read[0].data_ptr() == aligned.data_ptr()
    assert all(layer.data_ptr() % 16 == 0 and layer.is_contiguous() for layer in read)
    assert all(torch.equal(layer, aligned) for layer in read)


def test_only_what_cannot_be_read_where_it_lies_is_copied(interpreted):
    interpreted(check_readable)


def check_refusals():
    from tide_mega.kernels.row_gradient.triton import add_rows

    order = TokenOrder.sort(torch.tensor([1, 0]), 2)
    alphas, gradients = [torch.ones(2, 4)], [torch.ones(2, 5)]
    with pytest.raises(ValueError, match="contiguous fp32 is needed"):
        add_rows(torch.zeros(2, 3, 5, dtype=torch.float64), order, alphas, gradients)
    with pytest.raises(ValueError, match="has 3 rows and the order 2"):
        add_rows(torch.zeros(3, 3, 5), order, alphas, gradients)
    with pytest.raises(ValueError, match="contribution 0 has weights"):
        add_rows(torch.zeros(2, 2, 5), order, alphas, gradients)
    total = torch.ones(2, 3, 5)
    add_rows(total, order, [], [])
    assert torch.equal(total, torch.ones(2, 3, 5))


def test_a_total_or_layer_that_does_not_fit_is_refused(interpreted):
    interpreted(check_refusals)
