"""Random inputs of the mix, the cases its versions are compared on, and the comparison."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tide_mega.kernels.mix import mix, naive
from tide_mega.kernels.row_gradient import RowGradient
from tide_mega.kernels.token_order import TokenOrder


@dataclass(frozen=True)
class MixCase:
    """Sizes and how ids fall: `zipf`, `one` (a single type), `all` (each row once), `hot` (one is frequent)."""

    tokens: int
    rows: int
    blocks: int
    width: int
    ids: str = "zipf"
    layers: int = 1


CASES = [
    MixCase(tokens=7, rows=1, blocks=1, width=4, ids="one"),
    MixCase(tokens=12, rows=5, blocks=3, width=6),
    MixCase(tokens=9, rows=9, blocks=8, width=5, ids="all", layers=3),
    MixCase(tokens=150, rows=40, blocks=2, width=33, ids="hot", layers=2),
    MixCase(tokens=64, rows=80, blocks=24, width=20),
    MixCase(tokens=33, rows=16, blocks=16, width=48, layers=2),
]


def indices(case: MixCase, generator: torch.Generator) -> Tensor:
    """Rows of the tokens; with more rows than types some stay unread."""
    if case.ids == "one":
        return torch.full((case.tokens,), case.rows - 1)
    if case.ids == "all":
        return torch.randperm(case.rows, generator=generator)
    weights = 1 / torch.arange(1, case.rows + 1)
    index = torch.multinomial(weights, case.tokens, replacement=True, generator=generator)
    if case.ids == "hot":
        hot = torch.rand(case.tokens, generator=generator) < 0.8
        index[hot] = case.rows // 2
    return index


def inputs(
    case: MixCase, dtype: torch.dtype, seed: int = 0
) -> tuple[list[list[Tensor]], Tensor, Tensor, list[Tensor]]:
    """Return for each layer [logits, residual, ffn], the rows, the index, and each output's gradient."""
    g = torch.Generator().manual_seed(seed + case.tokens * 31 + case.width)
    N, D = case.tokens, case.width
    layers = [
        [torch.randn(*shape, generator=g).to(dtype) for shape in ((N, case.blocks + 1), (N, D), (N, D))]
        for _ in range(case.layers)
    ]
    rows = torch.randn(case.rows, case.blocks, D, generator=g).to(dtype)
    seeds = [torch.randn(N, D, generator=g).to(dtype) for _ in range(case.layers)]
    return layers, rows, indices(case, g), seeds


Result = dict[str, list[Tensor]]


def expected(case: MixCase, dtype: torch.dtype, *, wide: bool = False) -> Result:
    """Outputs, weights and all gradients by autograd through the naive mix; `wide` computes in fp64."""
    layers, rows, index, seeds = inputs(case, dtype)
    to = torch.float64 if wide else dtype
    leaf = rows.to(to).requires_grad_()
    result: Result = {"out": [], "alpha": [], "logits": [], "residual": [], "ffn": []}
    total = torch.zeros(rows.shape, dtype=torch.float64)
    for tensors, seed in zip(layers, seeds, strict=True):
        leaves = [t.to(to).requires_grad_() for t in tensors]
        out, alpha = naive.mix(*leaves, leaf, index)
        *grads, grad_rows = torch.autograd.grad(out, [*leaves, leaf], seed.to(to))
        total += grad_rows.double()
        for key, value in zip(result, [out.detach(), alpha, *grads], strict=True):
            result[key].append(value)
    return {**result, "rows": [total]}


def actual(case: MixCase, dtype: torch.dtype, version: str, device: str = "cpu") -> Result:
    """The same by a version, its row gradient by the sink."""
    layers, rows, index, seeds = inputs(case, dtype)
    order = TokenOrder.sort(index.to(device), case.rows)
    rows = rows.to(device)
    sink = RowGradient(rows.shape, rows.device, version, case.layers)
    result: Result = {"out": [], "alpha": [], "logits": [], "residual": [], "ffn": []}
    for tensors, seed in zip(layers, seeds, strict=True):
        leaves = [t.to(device).requires_grad_() for t in tensors]
        out, alpha = mix(version, *leaves, rows, order, sink)
        out.backward(seed.to(device))
        grads = [leaf.grad for leaf in leaves]
        for key, value in zip(result, [out.detach(), alpha, *grads], strict=True):
            result[key].append(value.cpu())
    return {**result, "rows": [sink.total().cpu()]}


def worst_errors(result: Result, exact: Result) -> dict[str, float]:
    """Largest error of each kind of tensor, relative to the largest value of that kind."""
    errors = {}
    for key, tensors in exact.items():
        scale = max(float(t.double().abs().max()) for t in tensors) or 1.0
        gaps = [
            float((a.double() - e.double()).abs().max()) for a, e in zip(result[key], tensors, strict=True)
        ]
        errors[key] = max(gaps) / scale
    return errors
