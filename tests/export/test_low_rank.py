"""The joint basis against the singular vectors of all rows at once."""

import pytest
import torch

from tide_mega.export.low_rank import joint_basis
from tide_mega.hf.rows_tide import RowError, RowFormat

K, D, V = 3, 8, 200


def rows() -> torch.Tensor:
    """Return rows [V, K, D] whose directions differ in strength."""
    generator = torch.Generator().manual_seed(0)
    strengths_C = torch.logspace(0, -2, K * D)
    mixed_CC = torch.linalg.qr(torch.randn(K * D, K * D, generator=generator))[0]
    return (torch.randn(V, K * D, generator=generator) * strengths_C @ mixed_CC).unflatten(1, (K, D))


@pytest.mark.parametrize("rank", [1, 7, K * D])
def test_best_rows_of_that_rank(rank: int) -> None:
    rows_VKD = rows()
    found = joint_basis(rows_VKD.split(33), rank)
    u, s, vt = torch.linalg.svd(rows_VKD.flatten(1).double(), full_matrices=False)
    best_VC = (u[:, :rank] * s[:rank] @ vt[:rank]).float()
    flat_VC = rows_VKD.flatten(1)
    torch.testing.assert_close(flat_VC @ found.basis_rC.T @ found.basis_rC, best_VC, rtol=0, atol=2e-5)
    torch.testing.assert_close(found.basis_rC @ found.basis_rC.T, torch.eye(rank), rtol=0, atol=1e-5)
    assert found.energy_kept == pytest.approx(float((s[:rank] ** 2).sum() / (s**2).sum()), abs=1e-5)
    torch.testing.assert_close(found.energies_r.double(), s[:rank] ** 2 / (s**2).sum(), rtol=1e-3, atol=1e-6)


def test_directions_that_tables_share_are_kept_by_few() -> None:
    one_V1D = torch.randn(V, 1, D)
    rows_VKD = one_V1D.expand(V, K, D).contiguous()
    found = joint_basis([rows_VKD], D)
    assert found.energy_kept == pytest.approx(1, abs=1e-5)
    format = RowFormat("rank", K, D, D)
    again = format.decode(format.encode(rows_VKD, found.basis_rC), torch.float32, found.basis_rC)
    torch.testing.assert_close(again, rows_VKD, rtol=0, atol=0.02)


def test_rows_of_zeros_lose_nothing() -> None:
    assert joint_basis([torch.zeros(5, K, D)], 2).energy_kept == 1.0


def test_refusals() -> None:
    rows_VKD = rows()
    rows_VKD[70, 1, 2] = torch.nan
    with pytest.raises(RowError, match="row 70 of memory block 1 is not finite"):
        joint_basis(rows_VKD.split(33), 2)
    with pytest.raises(RowError, match="too large"):
        joint_basis([torch.full((2, K, D), 1e30)], 2)
    with pytest.raises(ValueError, match="none came"):
        joint_basis([], 2)
    with pytest.raises(ValueError, match=r"rank is 25; it must lie in 1\.\.24"):
        joint_basis([rows()], 25)
