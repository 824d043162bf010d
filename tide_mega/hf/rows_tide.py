"""Storage format of a token's memory rows: one record of bytes for its K rows, in full or quantised.

Records hold finished rows, M_k(v) = RMSNorm(E_k[v]) * gain_k, which no longer change after training: normalised in
fp32 and quantised once.

Shapes: N records, K memory blocks, D width, R bytes of a record, G groups of a row, r rank of the joint basis.
"""

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

KINDS = ("fp32", "bf16", "int8", "int4", "nf4", "rank")
TRAINED_KINDS = ("fp32", "bf16")
"""Kinds whose tables, if among the weights, are stored as trained, with their norm's gains."""
ALIGNMENT = 16
"""Records, and the scales within them, are aligned to this many bytes."""
LARGEST = 1e38
"""Larger elements are refused: a scale times its largest code would exceed the range of fp32."""

_GROUPS = {"int4": 32, "nf4": 64}
_INT4 = tuple(float(code) for code in range(-8, 8))
# Dettmers et al., "QLoRA" (arXiv 2305.14314), appendix E: quantiles of N(0, 1) scaled to [-1, 1].
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_CODE_BOOKS = {"int4": _INT4, "nf4": _NF4}


class RowError(ValueError):
    """A row that cannot be stored; the message names it."""


@dataclass(frozen=True)
class RowFormat:
    """How the K rows of a token are stored.

    fp32 and bf16 store the elements; int8 has a bf16 scale per row, int4 and nf4 one per group of 32 and 64
    elements; rank stores r bf16 coefficients of a basis [r, K * D] shared by all tokens.

    Args:
        kind: one of KINDS.
        num_blocks: K.
        width: D.
        rank: r, only with kind=rank.

    Raises:
        ValueError: an unknown kind, a size below 1, or a rank that is missing, too large or not applicable.
    """

    kind: str
    num_blocks: int
    width: int
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"the memory's format {self.kind!r} is unknown: it is one of {', '.join(KINDS)}")
        if self.num_blocks < 1 or self.width < 1:
            raise ValueError(f"a memory has blocks and a width, not K = {self.num_blocks}, d = {self.width}")
        most = self.num_blocks * self.width
        if self.kind != "rank" and self.rank is not None:
            raise ValueError(f"a rank belongs to the format rank, not to {self.kind}")
        if self.kind == "rank" and not (self.rank is not None and 1 <= self.rank <= most):
            raise ValueError(f"the rank is {self.rank}; it must lie in 1..{most}, K * d")

    @functools.cached_property
    def record_bytes(self) -> int:
        """R, a multiple of 16."""
        return self._scales_at + _rounded_up(2 * self.num_blocks * self._groups, ALIGNMENT)

    @property
    def basis_shape(self) -> tuple[int, int] | None:
        """Shape [r, K * D] of the basis that kind=rank needs; None otherwise."""
        return None if self.rank is None else (self.rank, self.num_blocks * self.width)

    @functools.cached_property
    def _groups(self) -> int:
        """G, the number of scales per row."""
        if self.kind == "int8":
            return 1
        return math.ceil(self.width / _GROUPS[self.kind]) if self.kind in _GROUPS else 0

    @functools.cached_property
    def _code_bytes(self) -> int:
        elements = self.num_blocks * self.width
        if self.kind in _GROUPS:
            return self.num_blocks * self._groups * _GROUPS[self.kind] // 2
        return {"fp32": 4 * elements, "bf16": 2 * elements, "int8": elements, "rank": 2 * (self.rank or 0)}[
            self.kind
        ]

    @functools.cached_property
    def _scales_at(self) -> int:
        return _rounded_up(self._code_bytes, ALIGNMENT)

    def zero_records(self, rows: int, device: torch.device | str | None = None) -> Tensor:
        """Return records [rows, R], uint8, of zero rows."""
        records_NR = torch.zeros(rows, self.record_bytes, dtype=torch.uint8, device=device)
        if self.kind in _CODE_BOOKS:
            zero = _CODE_BOOKS[self.kind].index(0.0)
            records_NR[:, : self._code_bytes] = zero | zero << 4
        return records_NR

    def encode(self, rows_NKD: Tensor, basis: Tensor | None = None, *, first_row: int = 0) -> Tensor:
        """Return the records [N, R], uint8, of finished rows [N, K, D], fp32.

        Args:
            rows_NKD: finished rows.
            basis: with kind=rank, [r, K * D], rows orthonormal.
            first_row: id of the first row, for error messages.

        Raises:
            RowError: an element is not finite, or larger than LARGEST.
            ValueError: the rows have a wrong shape, or the basis is missing.
        """
        if rows_NKD.shape[1:] != (self.num_blocks, self.width):
            wanted = f"[N, {self.num_blocks}, {self.width}]"
            raise ValueError(f"the rows have shape {list(rows_NKD.shape)}, the format stores {wanted}")
        rows_NKD = rows_NKD.float()
        refuse_unusable(rows_NKD, first_row)
        records_NR = self.zero_records(len(rows_NKD), rows_NKD.device)
        if self.kind in ("fp32", "bf16"):
            elements = rows_NKD if self.kind == "fp32" else rows_NKD.bfloat16()
            records_NR[:, : self._code_bytes] = elements.flatten(1).contiguous().view(torch.uint8)
        elif self.kind == "rank":
            coefficients_NR = rows_NKD.flatten(1) @ self._checked(basis).float().T
            records_NR[:, : self._code_bytes] = coefficients_NR.bfloat16().view(torch.uint8)
        else:
            codes_N, scales_N = self._int8(rows_NKD) if self.kind == "int8" else self._four_bits(rows_NKD)
            records_NR[:, : self._code_bytes] = codes_N
            scales_N = scales_N.view(torch.uint8)
            records_NR[:, self._scales_at : self._scales_at + scales_N.shape[1]] = scales_N
        return records_NR

    def decode(self, records_NR: Tensor, dtype: torch.dtype, basis: Tensor | None = None) -> Tensor:
        """Return new rows [N, K, D] in `dtype`; computed in fp32, or with kind=rank in the basis's precision.

        Args:
            records_NR: uint8, on any device.
            dtype: a floating dtype.
            basis: with kind=rank, [r, K * D] on the same device.

        Raises:
            ValueError: the basis is missing.
        """
        shape = (len(records_NR), self.num_blocks, self.width)
        codes_N = records_NR[:, : self._code_bytes]
        if self.kind == "fp32":
            return codes_N.view(torch.float32).view(shape).to(dtype, copy=True)
        if self.kind == "bf16":
            return codes_N.view(torch.bfloat16).view(shape).to(dtype, copy=True)
        if self.kind == "rank":
            basis = self._checked(basis)
            return (codes_N.view(torch.bfloat16).to(basis.dtype) @ basis).view(shape).to(dtype)
        end = self._scales_at + 2 * self.num_blocks * self._groups
        scales_N = records_NR[:, self._scales_at : end].view(torch.bfloat16)
        if self.kind == "int8":
            return codes_N.view(torch.int8).view(shape).float().mul_(scales_N.unsqueeze(-1)).to(dtype)
        # One look-up per byte yields both elements: 2 to 3 times as fast as shifts at N = 1 on a CPU.
        pairs = _pairs_of(self.kind, records_NR).index_select(0, codes_N.reshape(-1).int())
        grouped = pairs.view(torch.float32).view(*shape[:2], self._groups, _GROUPS[self.kind])
        grouped.mul_(scales_N.view(*shape[:2], self._groups, 1))
        rows_NKD = grouped.view(*shape[:2], self._groups * _GROUPS[self.kind])
        return (rows_NKD if self.width % _GROUPS[self.kind] == 0 else rows_NKD[..., : self.width]).to(dtype)

    def _checked(self, basis: Tensor | None) -> Tensor:
        if basis is None or basis.shape != self.basis_shape:
            found = "none" if basis is None else list(basis.shape)
            raise ValueError(
                f"the format rank needs a basis of shape {list(self.basis_shape or ())}, got {found}"
            )
        return basis

    def _int8(self, rows_NKD: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes and scales [N, K] of whole rows, codes in [-127, 127]."""
        scales_NK = _scale(rows_NKD.abs().amax(-1) / 127)
        codes_NKD = (rows_NKD / _divisor(scales_NK)).round_().clamp_(-127, 127).to(torch.int8)
        return codes_NKD.flatten(1).view(torch.uint8), scales_NK

    def _four_bits(self, rows_NKD: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes, two per byte with the first in the low bits, and scales [N, K * G] of groups.

        int4: the group's largest element by magnitude gets code -8, so that every code is used: the error on
        normal elements is 0.89 times that of codes -7 to 7. nf4: the code nearest to element / largest.
        """
        size = _GROUPS[self.kind]
        padded = functional.pad(rows_NKD, (0, -self.width % size))
        grouped = padded.view(*rows_NKD.shape[:2], self._groups, size)
        if self.kind == "int4":
            largest = grouped.gather(-1, grouped.abs().argmax(-1, keepdim=True)).squeeze(-1)
            scales = _scale(largest / -8)
            codes = (grouped / _divisor(scales)).round_().clamp_(-8, 7).add_(8).to(torch.uint8)
        else:
            scales = _scale(grouped.abs().amax(-1))
            book = torch.tensor(_NF4, device=grouped.device)
            between = (book[1:] + book[:-1]) / 2
            codes = torch.bucketize(grouped / _divisor(scales), between, out_int32=True).to(torch.uint8)
        low, high = codes.flatten(1).unflatten(1, (-1, 2)).unbind(-1)
        return low | high << 4, scales.flatten(1)


def part_bounds(rows: int, part_rows: int) -> list[tuple[int, int]]:
    """Return first row and end of every tensor that rows among the weights are split into."""
    return [(first, min(first + part_rows, rows)) for first in range(0, rows, part_rows)]


def finished(tables_NKD: Tensor, gains_KD: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Return M_k(v) = RMSNorm(E_k[v]) * gain_k [N, K, D] of rows of trained tables; the norm is in fp32."""
    wide = tables_NKD.float() if tables_NKD.dtype in (torch.bfloat16, torch.float16) else tables_NKD
    unit = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (unit.to(tables_NKD.dtype) * gains_KD).to(dtype)


def refuse_unusable(rows_NKD: Tensor, first_row: int) -> None:
    """Raise RowError if an element of rows, numbered from `first_row`, is not finite or beyond LARGEST."""
    usable_NK = rows_NKD.abs().amax(-1) <= LARGEST
    if usable_NK.all():
        return
    n, k = (~usable_NK).nonzero()[0].tolist()
    raise RowError(
        f"row {first_row + n} of memory block {k} is not finite or greater than {LARGEST:g}: the training has "
        "diverged, look at an earlier checkpoint"
    )


def _scale(exact: Tensor) -> Tensor:
    """Return scales in bf16; subnormal ones, which are inexact, become 0, and so do their elements."""
    rounded = exact.bfloat16()
    return torch.where(rounded.abs() < torch.finfo(torch.bfloat16).tiny, 0, rounded)


def _divisor(scales: Tensor) -> Tensor:
    """Return the divisor of elements, with an axis for them; infinite where the scale is 0."""
    wide = scales.float().unsqueeze(-1)
    return torch.where(wide == 0, torch.inf, wide)


def _pairs_of(kind: str, like: Tensor) -> Tensor:
    """Return the two fp32 elements that each byte encodes, packed as int64 [256]."""
    if type(like) is not Tensor or torch.compiler.is_compiling():
        return _packed_pairs(kind, like.device)
    return _kept_pairs(kind, like.device)


def _packed_pairs(kind: str, device: torch.device) -> Tensor:
    book = torch.tensor(_CODE_BOOKS[kind], device=device)
    low, high = book.repeat(len(book)), book.repeat_interleave(len(book))
    return torch.stack((low, high), -1).view(torch.int64).flatten()


@functools.cache
def _kept_pairs(kind: str, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return _packed_pairs(kind, device)


def _rounded_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
