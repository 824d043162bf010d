"""Received rows added up at their owner: every version to the last bit as one asker after the other.

Shapes: W rows, Q rows received, K blocks, D width, G askers.
"""

import os
import sys

import pytest
import torch

from tide_mega.kernels.row_sum import add_rows, naive

ROWS = 23
ASKERS = {
    "one asker": [9],
    "some ask for nothing": [0, 5, 0, 7],
    "all ask for all": [ROWS] * 5,
    "nobody asks": [0, 0],
    "many": [4] * 40,
}


def received(name, blocks, width, dtype):
    """Rows of each asker, distinct and ascending, and what it sent; the table's values before."""
    generator = torch.Generator().manual_seed(len(name) + width)
    counts = ASKERS[name]
    rows = [torch.randperm(ROWS, generator=generator)[:count].sort().values for count in counts]
    values = torch.randn(sum(counts), blocks, width, generator=generator).to(dtype)
    return torch.cat(rows), values, torch.randn(ROWS, blocks, width, generator=generator)


def differences(version, name, blocks, width, dtype, divisor):
    """How many values differ from the oracle's, and how many from the table before."""
    rows_Q, received_QKD, before_WKD = received(name, blocks, width, dtype)
    expected, got = before_WKD.clone(), before_WKD.clone()
    naive.add_rows(expected, rows_Q, received_QKD, ASKERS[name], divisor)
    add_rows(version, got, rows_Q, received_QKD, ASKERS[name], divisor)
    return int((got != expected).sum()), int((got != before_WKD).sum())


CASES = [(name, *size) for name in ASKERS for size in ((3, 5, torch.float32), (2, 16, torch.bfloat16))]


@pytest.mark.parametrize(("name", "blocks", "width", "dtype"), CASES)
@pytest.mark.parametrize("divisor", [1, 3])
def test_torchs_indexed_addition_is_the_oracle_to_the_last_bit(name, blocks, width, dtype, divisor):
    wrong, changed = differences("cpu", name, blocks, width, dtype, divisor)
    assert wrong == 0
    assert (changed > 0) == (sum(ASKERS[name]) > 0)


@pytest.mark.parametrize(("name", "blocks", "width", "dtype"), [*CASES, ("many", 3, 700, torch.float32)])
@pytest.mark.parametrize("divisor", [1, 3])
def test_the_gpus_kernel_is_the_oracle_to_the_last_bit(interpreted, name, blocks, width, dtype, divisor):
    wrong, changed = interpreted(differences, "triton", name, blocks, width, dtype, divisor)
    assert wrong == 0
    assert (changed > 0) == (sum(ASKERS[name]) > 0)


def refuse_strides():
    from tide_mega.kernels.row_sum import triton

    table = torch.zeros(4, 2, 3).transpose(1, 2)
    with pytest.raises(ValueError, match="contiguous fp32 is needed"):
        triton.add_rows(table, torch.tensor([0]), torch.zeros(1, 3, 2), 1)
    with pytest.raises(ValueError, match=r"2 rows of \[2, 3\] were announced"):
        triton.add_rows(torch.zeros(4, 2, 3), torch.tensor([0, 1]), torch.zeros(1, 2, 3), 1)


def test_the_gpus_kernel_refuses_what_it_cannot_read(interpreted):
    interpreted(refuse_strides)


@pytest.mark.parametrize("arch", [90, 100])
@pytest.mark.parametrize("received", ["*fp32", "*bf16"])
def test_the_gpus_kernel_compiles_without_a_spill_and_divides_as_the_cpu_does(
    arch, received, tmp_path, monkeypatch
):
    triton = pytest.importorskip("triton", reason="triton is not installed")
    if "TRITON_INTERPRET" in os.environ or sys.platform != "linux":
        pytest.skip("nothing is compiled here")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tide_mega.kernels import aot
    from tide_mega.kernels.row_sum.triton import STRETCH, add_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = {"total_ptr": "*fp32", "rows_ptr": "*i64", "order_ptr": "*i64", "received_ptr": received}
    types |= {"divisor": "fp32", "Q": "i32", "X": "constexpr", "BX": "constexpr"}
    aligned = {(place,): [["tt.divisibility", 16]] for place in range(4)}
    source = ASTSource(add_kernel, types, {"X": 8 * 2048, "BX": STRETCH}, aligned)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, spilt = aot._resources(compiled.asm["cubin"])
    assert registers <= 64 and spilt == 0
    assert max(aot.load_widths(compiled.asm["ptx"])) == 128
    assert "div.rn.f32" in compiled.asm["ptx"] and "fma.rn" not in compiled.asm["ptx"]
