"""Records against a version that goes element by element, and rows that come back against those that went in."""

import math
import struct

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from tide_mega.hf.rows_tide import KINDS, RowError, RowFormat, finished

# As published with the QLoRA paper's code.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
GROUPS = {"int4": 32, "nf4": 64}


def case(kind: str, K: int, D: int) -> tuple[RowFormat, Tensor | None]:
    """Return a format, and the basis that kind=rank needs."""
    if kind != "rank":
        return RowFormat(kind, K, D), None
    rank = math.ceil(K * D / 2)
    generator = torch.Generator().manual_seed(1)
    basis = torch.linalg.qr(torch.randn(K * D, rank, generator=generator))[0].T.contiguous()
    return RowFormat(kind, K, D, rank), basis


def some_rows(N: int, K: int, D: int) -> Tensor:
    return torch.randn(N, K, D, generator=torch.Generator().manual_seed(0))


def bf16_at(record: bytes, at: int) -> float:
    """Return the bf16 number at a byte: the upper half of an fp32."""
    return struct.unpack("<f", b"\0\0" + record[at : at + 2])[0]


def naive_record(kind: str, K: int, D: int, record: bytes) -> list[list[float]]:
    """Decode a record [K][D] element by element."""
    if kind == "fp32":
        return [[struct.unpack_from("<f", record, 4 * (k * D + d))[0] for d in range(D)] for k in range(K)]
    if kind == "bf16":
        return [[bf16_at(record, 2 * (k * D + d)) for d in range(D)] for k in range(K)]
    if kind == "int8":
        scales_at = -(-K * D // 16) * 16
        codes = [[struct.unpack_from("b", record, k * D + d)[0] for d in range(D)] for k in range(K)]
        return [[codes[k][d] * bf16_at(record, scales_at + 2 * k) for d in range(D)] for k in range(K)]
    size = GROUPS[kind]
    groups = -(-D // size)
    scales_at = -(-K * groups * size // 2 // 16) * 16
    rows = []
    for k in range(K):
        row = []
        for d in range(D):
            byte = record[(k * groups * size + d) // 2]
            code = byte & 15 if d % 2 == 0 else byte >> 4
            value = float(code - 8) if kind == "int4" else NF4[code]
            row.append(value * bf16_at(record, scales_at + 2 * (k * groups + d // size)))
        rows.append(row)
    return rows


@pytest.mark.parametrize(("K", "D"), [(1, 1), (3, 70), (2, 128)])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "int4", "nf4"])
def test_decoded_as_element_by_element(kind: str, K: int, D: int) -> None:
    format, _ = case(kind, K, D)
    records_NR = format.encode(some_rows(3, K, D))
    expected = [naive_record(kind, K, D, bytes(record.tolist())) for record in records_NR]
    torch.testing.assert_close(
        format.decode(records_NR, torch.float32), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=0
    )


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_codes_are_the_nearest_to_each_element(kind: str) -> None:
    K, D = 2, 70
    format, _ = case(kind, K, D)
    rows_NKD = some_rows(4, K, D)
    found_NKD = format.decode(format.encode(rows_NKD), torch.float32)
    for n in range(4):
        for k in range(K):
            row = rows_NKD[n, k].tolist()
            size = GROUPS.get(kind, D)
            for first in range(0, D, size):
                group = row[first : first + size]
                largest = max(group, key=abs)
                scale, book = {
                    "int8": (abs(largest) / 127, list(range(-127, 128))),
                    "int4": (largest / -8, list(range(-8, 8))),
                    "nf4": (abs(largest), NF4),
                }[kind]
                scale = float(torch.tensor(scale).bfloat16())
                for d, element in enumerate(group, first):
                    nearest = min(abs(code * scale - element) for code in book)
                    assert abs(found_NKD[n, k, d].item() - element) == pytest.approx(nearest, abs=1e-6)


@pytest.mark.parametrize("N", [0, 1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_sizes_and_dtypes(kind: str, N: int) -> None:
    format, basis = case(kind, 3, 70)
    records_NR = format.encode(some_rows(N, 3, 70), basis)
    assert records_NR.shape == (N, format.record_bytes)
    assert records_NR.dtype == torch.uint8
    assert format.record_bytes % 16 == 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows_NKD = format.decode(records_NR, dtype, basis)
        assert rows_NKD.shape == (N, 3, 70)
        assert rows_NKD.dtype == dtype


@pytest.mark.parametrize(
    ("kind", "K", "D", "expected"),
    [
        ("int4", 8, 1024, 4096 + 512),
        ("nf4", 8, 1024, 4096 + 256),
        ("int8", 8, 1024, 8192 + 16),
        ("bf16", 8, 768, 12288),
    ],
)
def test_bytes_of_a_record(kind: str, K: int, D: int, expected: int) -> None:
    assert RowFormat(kind, K, D).record_bytes == expected


@pytest.mark.parametrize(
    ("kind", "bound"),
    [("fp32", 0.0), ("bf16", 2**-8), ("int8", 1.01 / 254), ("int4", 1.01 / 8), ("nf4", 1.01 * 0.152)],
)
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_error_is_bounded_by_the_largest_element(kind: str, bound: float, size: float) -> None:
    """nf4: half of the widest gap of its code book; int4: one step, for elements opposite to the largest one."""
    rows_NKD = some_rows(6, 2, 256) * size
    format, _ = case(kind, 2, 256)
    found_NKD = format.decode(format.encode(rows_NKD), torch.float32)
    assert (found_NKD - rows_NKD).abs().max() <= bound * rows_NKD.abs().max()


def test_mean_error_of_four_bits() -> None:
    """Of N(0, 1): symmetric codes -7 to 7 would have 0.097, and NF4 in groups of 64 has 0.092."""
    rows_NKD = some_rows(50, 2, 256)
    error = {}
    for kind in ("int4", "nf4"):
        format, _ = case(kind, 2, 256)
        found_NKD = format.decode(format.encode(rows_NKD), torch.float32)
        error[kind] = (found_NKD - rows_NKD).pow(2).mean().sqrt().item()
    assert error["int4"] < 0.089
    assert error["nf4"] < 0.094


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_rows_of_one_value(kind: str) -> None:
    format, basis = case(kind, 2, 64)
    zeros_NKD = torch.zeros(2, 2, 64)
    assert torch.equal(format.encode(zeros_NKD, basis), format.zero_records(2))
    assert not format.decode(format.zero_records(2), torch.float32, basis).any()
    assert (
        not format.decode(format.encode(zeros_NKD + 1e-42, basis), torch.float32, basis).abs().max() > 1e-38
    )
    if kind != "rank":
        ones_NKD = torch.full((1, 2, 64), -0.75)
        torch.testing.assert_close(
            format.decode(format.encode(ones_NKD), torch.float32), ones_NKD, rtol=4e-3, atol=0
        )


def test_rank_keeps_rows_that_lie_in_its_basis() -> None:
    format, basis = case("rank", 3, 10)
    assert basis is not None
    coefficients_Nr = torch.randn(5, len(basis)).bfloat16().float()
    rows_NKD = (coefficients_Nr @ basis).unflatten(1, (3, 10))
    found_NKD = format.decode(format.encode(rows_NKD, basis), torch.float32, basis)
    torch.testing.assert_close(found_NKD, rows_NKD, rtol=0, atol=0.02)
    assert format.basis_shape == (15, 30)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 2e38])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite_is_named(kind: str, value: float) -> None:
    format, basis = case(kind, 3, 70)
    rows_NKD = some_rows(5, 3, 70)
    rows_NKD[2, 1, 69] = value
    with pytest.raises(RowError, match="row 102 of memory block 1 is not finite or greater than 1e"):
        format.encode(rows_NKD, basis, first_row=100)


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_rows_stay_finite(kind: str) -> None:
    format, _ = case(kind, 1, 64)
    basis = torch.eye(format.rank, 64) if format.rank else None
    rows_NKD = torch.full((1, 1, 64), 1e38)
    assert format.decode(format.encode(rows_NKD, basis), torch.float32, basis).isfinite().all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("int3", 2, 8), "'int3' is unknown: it is one of fp32, bf16"),
        (("int8", 0, 8), "K = 0, d = 8"),
        (("int8", 2, 8, 4), "a rank belongs to the format rank, not to int8"),
        (("rank", 2, 8), r"rank is None; it must lie in 1\.\.16"),
        (("rank", 2, 8, 17), r"rank is 17; it must lie in 1\.\.16"),
    ],
)
def test_formats_that_are_none(fields: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowFormat(*fields)


def test_shapes_that_do_not_fit() -> None:
    format, basis = case("rank", 2, 8)
    with pytest.raises(ValueError, match=r"shape \[3, 8, 2\], the format stores \[N, 2, 8\]"):
        format.encode(torch.zeros(3, 8, 2), basis)
    with pytest.raises(ValueError, match=r"needs a basis of shape \[8, 16\], got none"):
        format.decode(format.zero_records(1), torch.float32)
    with pytest.raises(ValueError, match=r"got \[8, 15\]"):
        format.encode(torch.zeros(3, 2, 8), torch.zeros(8, 15))


@pytest.mark.parametrize("kind", KINDS)
def test_decoded_without_data(kind: str) -> None:
    """On meta and fake tensors, which tracers use, between uses of real ones."""
    format, basis = case(kind, 2, 70)
    records_NR = format.encode(some_rows(3, 2, 70), basis)
    before = format.decode(records_NR, torch.float32, basis)
    meta = format.decode(records_NR.to("meta"), torch.bfloat16, None if basis is None else basis.to("meta"))
    assert (meta.shape, meta.dtype, meta.device.type) == (before.shape, torch.bfloat16, "meta")
    with FakeTensorMode() as mode:
        fake_basis = None if basis is None else mode.from_tensor(basis)
        fake = format.decode(mode.from_tensor(records_NR), torch.float32, fake_basis)
    assert fake.shape == before.shape
    assert torch.equal(format.decode(records_NR, torch.float32, basis), before)


@pytest.mark.parametrize("kind", KINDS)
def test_traced_whole(kind: str) -> None:
    format, basis = case(kind, 2, 70)
    records_NR = format.encode(some_rows(3, 2, 70), basis)
    torch.compiler.reset()
    traced = torch.compile(format.decode, backend="aot_eager", fullgraph=True)
    expected = format.decode(records_NR, torch.float32, basis)
    assert torch.equal(traced(records_NR, torch.float32, basis), expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_compiled(kind: str) -> None:
    format, basis = case(kind, 2, 70)
    torch.compiler.reset()
    compiled = torch.compile(format.decode, fullgraph=True, dynamic=True)
    for N in (3, 5):
        records_NR = format.encode(some_rows(N, 2, 70), basis)
        expected = format.decode(records_NR, torch.float32, basis)
        torch.testing.assert_close(compiled(records_NR, torch.float32, basis), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_finished_rows(dtype: torch.dtype) -> None:
    tables_NKD = some_rows(4, 2, 16).to(dtype)
    tables_NKD[1] = 0
    gains_KD = torch.rand(2, 16).to(dtype)
    found_NKD = finished(tables_NKD, gains_KD, 1e-5, torch.float32)
    wide = tables_NKD.double().numpy()
    expected = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * gains_KD.double().numpy()
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found_NKD.double(), torch.from_numpy(expected), rtol=0, atol=tolerance)
