"""Rows by id: the gradient of a row, however often it is used, by every path there is.

Shapes: N tokens, U rows, K blocks, D width.
"""

import pytest
import torch

from tide_mega.config.schema import KernelConfig
from tide_mega.kernels.choice import choose_kernels
from tide_mega.kernels.mix import mix
from tide_mega.kernels.mix import naive as naive_mix
from tide_mega.kernels.row_gradient import RowGradient
from tide_mega.kernels.row_lookup import look_up
from tide_mega.kernels.row_sum import add_rows
from tide_mega.kernels.token_order import TokenOrder
from tide_mega.model.reference import rows as reference_rows

USES, RARE, WIDTH = 3000, 3, 8
"""Row 1 is used 3,000 times and row 3 three times; row 2 never, by nobody."""
ONCE = 2**-8
"""What bf16 loses of a value that it rounds once."""


def used():
    """Ids in a mixed order, and a gradient of one sign, so that a sum which stops growing is far off."""
    generator = torch.Generator().manual_seed(0)
    ids_N = torch.tensor([1] * USES + [3] * RARE)[torch.randperm(USES + RARE, generator=generator)]
    gradient_ND = torch.rand(USES + RARE, WIDTH, generator=generator).bfloat16()
    return ids_N, gradient_ND


def exact(ids_N, values_ND):
    return torch.zeros(5, *values_ND.shape[1:], dtype=torch.float64).index_add_(0, ids_N, values_ND.double())


def off(actual, wanted):
    """Largest deviation relative to the value; inf where a row that nobody used got something."""
    return float(((actual.double() - wanted).abs() / wanted.abs()).nan_to_num(0.0, posinf=torch.inf).max())


def differentiated(read):
    ids_N, gradient_ND = used()
    table_UD = torch.zeros(5, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    read(table_UD, ids_N).backward(gradient_ND)
    return off(table_UD.grad, exact(ids_N, gradient_ND))


def by_look_up():
    return differentiated(look_up)


def by_the_reference():
    return differentiated(reference_rows)


def by_autograd_through_the_oracle():
    ids_N, gradient_ND = used()
    rows_UKD = torch.zeros(5, 2, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    logits_NJ = torch.zeros(len(ids_N), 3, dtype=torch.bfloat16)
    logits_NJ[:, 1] = 60.0  # all weight on one block, so that α is 1 in every precision
    zeros_ND = torch.zeros_like(gradient_ND)
    naive_mix.mix(logits_NJ, zeros_ND, zeros_ND, rows_UKD, ids_N)[0].backward(gradient_ND)
    return off(rows_UKD.grad[:, 1], exact(ids_N, gradient_ND))


def by_the_mix(version, blocks=2):
    ids_N, gradient_ND = used()
    order = TokenOrder.sort(ids_N, 5)
    rows_UKD = torch.randn(5, blocks, WIDTH).bfloat16()
    sink = RowGradient(rows_UKD.shape, rows_UKD.device, version, 1)
    logits_NJ = torch.randn(len(ids_N), blocks + 1).bfloat16().requires_grad_()
    zeros_ND = torch.zeros_like(gradient_ND)
    out_ND, alpha_NJ = mix(version, logits_NJ, zeros_ND, zeros_ND, rows_UKD, order, sink)
    out_ND.backward(gradient_ND)
    wanted_NKD = alpha_NJ[:, :blocks, None].double() * gradient_ND[:, None].double()
    return off(sink.total(), exact(ids_N, wanted_NKD))


def by_what_many_blocks_take():
    version = choose_kernels(KernelConfig(), torch.device("cuda"), 64).mix
    assert version == "naive"
    return by_the_mix(version, 64)


def by_the_owner(version):
    """3,000 askers that each send the row once."""
    _, gradient_ND = used()
    received_QKD = gradient_ND[:USES, None]
    ids_Q = torch.ones(USES, dtype=torch.int64)
    total_WKD = torch.zeros(5, 1, WIDTH)
    add_rows(version, total_WKD, ids_Q, received_QKD, [1] * USES, 1)
    return off(total_WKD, exact(ids_Q, received_QKD))


FP32_PATHS = {
    "the naive mix": (by_the_mix, "naive"),
    "the mix on a CPU": (by_the_mix, "cpu"),
    "more blocks than triton takes": (by_what_many_blocks_take,),
    "owners, naive": (by_the_owner, "naive"),
    "owners on a CPU": (by_the_owner, "cpu"),
}
INTERPRETED_PATHS = {"triton": (by_the_mix, "triton"), "owners, triton": (by_the_owner, "triton")}
BF16_PATHS = {
    "look up": (by_look_up,),
    "the reference": (by_the_reference,),
    "autograd through the oracle": (by_autograd_through_the_oracle,),
}


@pytest.mark.parametrize("path", FP32_PATHS)
def test_a_row_used_3000_times_has_its_whole_gradient_in_fp32(path):
    function, *arguments = FP32_PATHS[path]
    assert function(*arguments) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("path", INTERPRETED_PATHS)
def test_a_row_used_3000_times_has_its_whole_gradient_on_a_gpu(interpreted, path):
    function, *arguments = INTERPRETED_PATHS[path]
    assert interpreted(function, *arguments) < 1e-4


@pytest.mark.parametrize("path", BF16_PATHS)
def test_a_row_used_3000_times_has_its_whole_gradient_rounded_once(path):
    function, *arguments = BF16_PATHS[path]
    assert function(*arguments) < ONCE
