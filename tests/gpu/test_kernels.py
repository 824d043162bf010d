"""The GPU kernels on a GPU, at the size of training: against the naive versions, and from run to run."""

import pytest
import torch

from tide_mega.kernels.mix import mix
from tide_mega.kernels.mix.naive import mix as naive_mix
from tide_mega.kernels.norm_router import norm_and_route
from tide_mega.kernels.row_gradient import RowGradient, naive
from tide_mega.kernels.row_lookup import look_up
from tide_mega.kernels.row_norm import row_norm
from tide_mega.kernels.row_sum import add_rows
from tide_mega.kernels.token_order import TokenOrder
from tide_mega.lab.bench.text import draw_ids

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
CUDA = torch.device("cuda")
TOKENS = 4096
ROUNDED = 2**-8
"""What bfloat16 loses of a value at most, when it is rounded once."""


@pytest.fixture(autouse=True)
def exact_matmul():
    allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    yield
    torch.backends.cuda.matmul.allow_tf32 = allowed


def draw(*shape, dtype=torch.float32):
    return torch.randn(shape, device=CUDA).to(dtype)


def order_of(distribution, tokens=TOKENS):
    ids = draw_ids(distribution, tokens, 128_256, seed=1)
    types, index = ids.unique(return_inverse=True)
    # One row more than is read: absent from this microbatch.
    return TokenOrder.sort(index.to(CUDA), types.numel() + 1)


def leaves_of(order, blocks, width, dtype):
    shapes = [
        (order.num_tokens, blocks + 1),
        *[(order.num_tokens, width)] * 2,
        (order.num_rows, blocks, width),
    ]
    return [draw(*shape, dtype=dtype).requires_grad_() for shape in shapes]


def fused(leaves, order, seed):
    *inner, rows = leaves
    sink = RowGradient(rows.shape, CUDA, "triton", 1)
    out, alpha = mix("triton", *inner, rows, order, sink)
    return out, alpha, *torch.autograd.grad(out, inner, seed), sink.total()


@pytest.mark.parametrize("distribution", ["zipf", "uniform", "one"])
@pytest.mark.parametrize(("blocks", "width"), [(1, 2048), (2, 1536), (8, 2048), (24, 1024), (5, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mix_and_its_gradients_equal_the_naive_mix_in_fp32(distribution, blocks, width, dtype):
    torch.manual_seed(0)
    order = order_of(distribution)
    leaves, seed = leaves_of(order, blocks, width, dtype), draw(TOKENS, width, dtype=dtype)
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    out, alpha = naive_mix(*exact, order.index_N)
    expected = (out, alpha, *torch.autograd.grad(out, exact, seed.float()))
    for got, wanted in zip(fused(leaves, order, seed), expected, strict=True):
        # A frequent row sums thousands of terms: the error grows with the size of the sum's terms, not its own.
        rtol = ROUNDED if got.dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(got.float(), wanted, rtol=rtol, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("layers", "blocks", "width"), [(1, 8, 2048), (24, 8, 2048), (7, 24, 1536), (3, 5, 1000)]
)
@pytest.mark.parametrize("distribution", ["zipf", "one"])
def test_the_segmented_sum_equals_the_naive_one(distribution, layers, blocks, width, dtype):
    torch.manual_seed(1)
    order = order_of(distribution)
    alphas = [draw(TOKENS, blocks + 1).softmax(-1) for _ in range(layers)]
    gradients = [draw(TOKENS, width, dtype=dtype) for _ in range(layers)]
    from tide_mega.kernels.row_gradient.triton import add_rows

    start = draw(order.num_rows, blocks, width)
    expected, got, again = start.double(), start.clone(), start.clone()
    for alpha, gradient in zip(alphas, gradients, strict=True):
        naive.add_rows(part := torch.zeros_like(start), order, [alpha], [gradient])
        expected += part
    add_rows(got, order, alphas, gradients)
    add_rows(again, order, alphas, gradients)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))
    assert torch.equal(got, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("blocks", "width"), [(1, 64), (8, 2048), (24, 1536), (3, 5000)])
def test_the_norm_and_its_gradients_equal_the_naive_norm(blocks, width, dtype):
    torch.manual_seed(2)
    rows, gains, seed = (
        draw(*shape, dtype=dtype) for shape in [(700, blocks, width), (blocks, width), (700, blocks, width)]
    )
    results = []
    for version, kind in (("naive", torch.float32), ("triton", dtype)):
        leaves = [x.to(kind).requires_grad_() for x in (rows, gains)]
        out = row_norm(version, *leaves, 1e-5)
        results.append((out, *torch.autograd.grad(out, leaves, seed.to(kind))))
    for wanted, got in zip(*results, strict=True):
        rtol = ROUNDED if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(got.float(), wanted, rtol=rtol, atol=1e-5 * float(wanted.abs().max()))


def routed(version, leaves, seeds):
    outputs = norm_and_route(version, *leaves, 1e-5)
    return [*outputs, *torch.autograd.grad(outputs, leaves, seeds)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("blocks", "width"), [(1, 64), (2, 1536), (8, 2048), (24, 2048), (16, 3072), (40, 1000), (3, 5000)]
)
def test_the_norm_with_the_router_equals_the_naive_one_in_fp64(blocks, width, dtype):
    torch.manual_seed(5)
    tokens, banks = TOKENS + 3, blocks + 1
    leaves = [draw(tokens, width, dtype=dtype), draw(width, dtype=dtype), draw(banks, width, dtype=dtype)]
    seeds = [draw(tokens, width, dtype=dtype), draw(tokens, banks, dtype=dtype)]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    exact = routed(
        "naive", [leaf.detach().double().requires_grad_() for leaf in leaves], [x.double() for x in seeds]
    )
    for got, again, wanted in zip(
        routed("triton", leaves, seeds), routed("triton", leaves, seeds), exact, strict=True
    ):
        assert got.dtype == dtype and torch.equal(got, again)
        scale = float(wanted.abs().max())
        # Logits and the router's gradient are sums over a state that is rounded itself.
        rtol, atol = (1e-4, 1e-5 * scale) if dtype == torch.float32 else (ROUNDED, ROUNDED * scale)
        torch.testing.assert_close(got.double(), wanted, rtol=rtol, atol=atol)


def test_a_row_looked_up_3000_times_has_its_whole_gradient_rounded_once_and_repeats():
    torch.manual_seed(6)
    ids = torch.tensor([1] * 3000 + [4] * 3, device=CUDA)[torch.randperm(3003, device=CUDA)]
    seed, gradients = torch.rand(3003, 2048, device=CUDA).bfloat16(), []
    for _ in range(2):
        table = torch.zeros(7, 2048, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
        look_up(table, ids).backward(seed)
        gradients.append(table.grad)
    exact = torch.zeros(7, 2048, device=CUDA, dtype=torch.float64).index_add_(0, ids, seed.double())
    torch.testing.assert_close(gradients[0].double(), exact, rtol=ROUNDED, atol=0)
    assert torch.equal(*gradients)


def test_repeats_are_equal_to_the_last_bit():
    torch.manual_seed(3)
    order = order_of("zipf", 16_384)
    leaves, seed = leaves_of(order, 8, 2048, torch.bfloat16), draw(16_384, 2048, dtype=torch.bfloat16)
    first = fused(leaves, order, seed)
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, fused(leaves, order, seed), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_64_askers_are_added_up_to_the_last_bit_of_the_oracle(dtype):
    torch.manual_seed(5)
    counts = [(7 * asker) % 200 for asker in range(64)]
    rows_Q = torch.cat([torch.randperm(501, device=CUDA)[:count].sort().values for count in counts])
    received_QKD, before_WKD = draw(len(rows_Q), 8, 1024, dtype=dtype), draw(501, 8, 1024)
    expected, got = before_WKD.clone(), before_WKD.clone()
    add_rows("naive", expected, rows_Q, received_QKD, counts, 24)
    add_rows("triton", got, rows_Q, received_QKD, counts, 24)
    assert torch.equal(got, expected)


def test_nothing_waits_for_the_device():
    torch.manual_seed(4)
    order = order_of("zipf")
    leaves, seed = leaves_of(order, 8, 2048, torch.bfloat16), draw(TOKENS, 2048, dtype=torch.bfloat16)
    norm = [leaves[1], draw(2048, dtype=torch.bfloat16), draw(9, 2048, dtype=torch.bfloat16)]
    norm[1:] = [leaf.requires_grad_() for leaf in norm[1:]]
    fused(leaves, order, seed)  # compiles
    routed("triton", norm, [seed, leaves[0].detach()])
    table = leaves[3].flatten(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        fused(leaves, order, seed)
        routed("triton", norm, [seed, leaves[0].detach()])
        torch.autograd.grad(
            look_up(table, order.index_N), table, draw(TOKENS, 8 * 2048, dtype=torch.bfloat16)
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
