"""The mix alone, as a benchmark runs it: router logits to output, and every gradient back.

Shapes: N tokens, D width, K blocks, J = K + 1, U distinct types, L layers; lists hold one tensor a layer.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tide_mega.bench.ids import draw_ids
from tide_mega.bench.timing import Stopwatch
from tide_mega.kernels.mix import mix
from tide_mega.kernels.mix.naive import mix as autograd_mix
from tide_mega.kernels.row_gradient import RowGradient
from tide_mega.kernels.token_order import TokenOrder

BASELINE = "autograd"
"""[N, K, D] in each layer, and gradients by autograd down to fp32 rows that each layer casts."""
REGIONS = ("order", "forward", "backward", "row gradient")
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class MixCase:
    """One line of the benchmark."""

    tokens: int
    width: int
    blocks: int
    layers: int
    """Contributions to one row gradient."""
    dtype: str
    """bf16 or fp32, of rows and hidden states."""
    distribution: str
    vocab: int


@dataclass
class MixInputs:
    """What is there before the clock starts."""

    logits_NJ: list[Tensor]
    residual_ND: list[Tensor]
    ffn_ND: list[Tensor]
    grad_ND: list[Tensor]
    """Gradients of the outputs."""
    rows_UKD: Tensor
    wide_UKD: Tensor | None
    """The baseline's fp32 leaf."""
    index_N: Tensor


@dataclass
class MixResults:
    """What must be there when the clock stops."""

    out_ND: list[Tensor]
    grad_logits_NJ: list[Tensor]
    grad_rows_UKD: Tensor
    """In fp32, of all layers."""


def make_inputs(case: MixCase, version: str, device: torch.device) -> MixInputs:
    """Random inputs, the same for every version."""
    torch.manual_seed(0)
    N, D, K, dtype = case.tokens, case.width, case.blocks, DTYPES[case.dtype]
    types_U, index_N = draw_ids(case.distribution, N, case.vocab, seed=0).unique(return_inverse=True)

    def layers(width: int, *, leaf: bool) -> list[Tensor]:
        made = [torch.randn(N, width, device=device).to(dtype) for _ in range(case.layers)]
        return [tensor.requires_grad_(leaf) for tensor in made]

    rows_UKD = torch.randn(types_U.numel(), K, D, device=device).to(dtype)
    return MixInputs(
        layers(K + 1, leaf=True),
        layers(D, leaf=True),
        layers(D, leaf=True),
        layers(D, leaf=False),
        rows_UKD,
        rows_UKD.float().requires_grad_() if version == BASELINE else None,
        index_N.to(device),
    )


def run_mix(inputs: MixInputs, version: str, watch: Stopwatch) -> MixResults:
    """Forward through all layers, then backward; marks `REGIONS` on the watch.

    Args:
        inputs: of `make_inputs` for the same version.
        version: `BASELINE`, or one of tide_mega.kernels.mix.
        watch: the baseline's row gradient is a part of its region backward.
    """
    if version == BASELINE:
        return _autograd(inputs, watch)
    return _deferred(inputs, version, watch)


def exact_results(inputs: MixInputs) -> MixResults:
    """What `run_mix` would return without rounding: autograd in fp32, a layer at a time."""
    wide_UKD = inputs.rows_UKD.float().requires_grad_()
    found = MixResults([], [], torch.zeros_like(wide_UKD))
    for layer, grad_ND in enumerate(inputs.grad_ND):
        of_layer = (inputs.logits_NJ[layer], inputs.residual_ND[layer], inputs.ffn_ND[layer])
        logits_NJ, residual_ND, ffn_ND = (tensor.detach().float().requires_grad_() for tensor in of_layer)
        out_ND, _ = autograd_mix(logits_NJ, residual_ND, ffn_ND, wide_UKD, inputs.index_N)
        rows, logits = torch.autograd.grad(out_ND, [wide_UKD, logits_NJ], grad_ND.float())
        found.out_ND.append(out_ND.detach())
        found.grad_logits_NJ.append(logits)
        found.grad_rows_UKD += rows
    return found


def _autograd(inputs: MixInputs, watch: Stopwatch) -> MixResults:
    wide_UKD = inputs.wide_UKD
    assert wide_UKD is not None
    out_ND = [
        autograd_mix(logits, residual, ffn, wide_UKD.to(residual.dtype), inputs.index_N)[0]
        for logits, residual, ffn in zip(inputs.logits_NJ, inputs.residual_ND, inputs.ffn_ND, strict=True)
    ]
    watch.mark("forward")
    leaves = [wide_UKD, *inputs.logits_NJ, *inputs.residual_ND, *inputs.ffn_ND]
    grad_rows_UKD, *rest = torch.autograd.grad(out_ND, leaves, inputs.grad_ND)
    watch.mark("backward")
    return MixResults(out_ND, rest[: len(out_ND)], grad_rows_UKD)


def _deferred(inputs: MixInputs, version: str, watch: Stopwatch) -> MixResults:
    rows_UKD, layers = inputs.rows_UKD, len(inputs.grad_ND)
    order = TokenOrder.sort(inputs.index_N, rows_UKD.size(0))
    watch.mark("order")
    # One layer more than will come, so that the sum waits for `total` and has a region of its own.
    sink = RowGradient(rows_UKD.shape, rows_UKD.device, version, layers + 1)
    out_ND = [
        mix(version, logits, residual, ffn, rows_UKD, order, sink)[0]
        for logits, residual, ffn in zip(inputs.logits_NJ, inputs.residual_ND, inputs.ffn_ND, strict=True)
    ]
    watch.mark("forward")
    leaves = [*inputs.logits_NJ, *inputs.residual_ND, *inputs.ffn_ND]
    gradients = torch.autograd.grad(out_ND, leaves, inputs.grad_ND)
    watch.mark("backward")
    grad_rows_UKD = sink.total()
    watch.mark("row gradient")
    return MixResults(out_ND, list(gradients[:layers]), grad_rows_UKD)
