"""The top-k subspace against a full singular value decomposition in float64, and products by blocks of rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdef_cli.spectral import subspace
from specdef_cli.spectral.subspace import layer_seed, product, row_blocks, top_subspace, transposed_product


def with_spectrum(rows: int, columns: int, spectrum: Tensor, seed: int = 0) -> Tensor:
    """A float64 matrix with exactly these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(rows, len(spectrum), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(columns, len(spectrum), generator=generator, dtype=torch.float64)).Q
    return (left * spectrum) @ right.mT


def power_law(rank: int, exponent: float) -> Tensor:
    return torch.arange(1, rank + 1, dtype=torch.float64) ** -exponent


def orthogonality_defect(basis: Tensor) -> float:
    basis = basis.double()
    return float((basis.mT @ basis - torch.eye(basis.shape[1])).abs().max())


@pytest.mark.parametrize("exponent", [0.3, 0.5, 1.0])
@pytest.mark.parametrize(("rows", "columns"), [(384, 600), (600, 384)])
def test_it_finds_the_top_of_decaying_spectra(rows: int, columns: int, exponent: float) -> None:
    spectrum = power_law(384, exponent)
    weight = with_spectrum(rows, columns, spectrum)
    found = top_subspace(weight.float(), 16, seed=1)
    assert found.basis.shape == (rows, 16)
    assert found.singular_values[0] == pytest.approx(float(spectrum[0]), rel=1e-4)
    captured = torch.linalg.vector_norm(found.basis.double().mT @ weight) ** 2
    assert captured >= 0.97 * spectrum[:16].square().sum()
    assert orthogonality_defect(found.basis) < 1e-5


def test_it_finds_a_separated_subspace_to_rounding() -> None:
    spectrum = torch.cat([torch.linspace(100, 50, 8, dtype=torch.float64), power_law(392, 0.5)])
    weight = with_spectrum(400, 500, spectrum)
    found = top_subspace(weight.float(), 8, seed=1)
    left = torch.linalg.svd(weight).U[:, :8]
    cosines = torch.linalg.svdvals(left.mT @ found.basis.double())
    assert cosines.min() > 1 - 1e-6
    torch.testing.assert_close(found.singular_values.double(), spectrum[:8], rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("native", [True, False])
def test_half_precision_gives_float32_figures(
    dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks may be rounded on the way; what is reported of the basis may not."""
    if not native:
        monkeypatch.setattr(subspace, "_multiplies_natively", lambda weight: False)
    weight = with_spectrum(384, 600, power_law(384, 0.5)).to(dtype)
    true = torch.linalg.svdvals(weight.double())[:16]
    found = top_subspace(weight, 16, seed=1)
    assert found.basis.dtype == found.singular_values.dtype == torch.float32
    assert orthogonality_defect(found.basis) < 1e-5
    captured = torch.linalg.svdvals(found.basis.double().mT @ weight.double())
    torch.testing.assert_close(found.singular_values.double(), captured, rtol=1e-5, atol=0)
    assert captured[0] >= 0.9999 * true[0]
    assert captured.square().sum() >= 0.97 * true.square().sum()


@settings(max_examples=60, deadline=None)
@example(rows=23, columns=23, rank=2, top_k=3, seed=1, dtype=torch.float64)  # a value that is zero but for rounding
@given(
    rows=st.integers(1, 90),
    columns=st.integers(1, 90),
    rank=st.integers(1, 90),
    top_k=st.integers(1, 90),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_ritz_values_are_never_above_the_true_ones_and_the_basis_is_orthonormal(
    rows: int, columns: int, rank: int, top_k: int, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    smallest = min(rows, columns)
    rank, top_k = min(rank, smallest), min(top_k, smallest)
    weight = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    weight = (weight @ torch.randn(rank, columns, generator=generator, dtype=torch.float64)).to(dtype)
    true = torch.linalg.svdvals(weight.double())[:top_k]
    # One iteration leaves something to be wrong about; three would agree with the truth to rounding.
    found = top_subspace(weight, top_k, seed, iterations=1)
    slack = 20 * torch.finfo(dtype).eps * true[0]
    assert found.basis.dtype == found.singular_values.dtype == dtype
    assert found.basis.shape == (rows, top_k)
    assert (found.singular_values.double() <= true + slack).all()
    assert (found.singular_values.diff() <= slack).all()
    assert orthogonality_defect(found.basis) < 50 * torch.finfo(dtype).eps * math.sqrt(top_k)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1), (1, 4000), (4000, 1)])
def test_vectors(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = top_subspace(weight, 1, seed=0)
    assert float(found.singular_values[0]) == pytest.approx(float(torch.linalg.vector_norm(weight)), rel=1e-5)
    assert found.basis.shape == (shape[0], 1)
    assert orthogonality_defect(found.basis) < 1e-6


def test_more_directions_than_the_rank_are_orthonormal_with_singular_value_zero() -> None:
    weight = with_spectrum(300, 320, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)).float()
    found = top_subspace(weight, 10, seed=0)
    torch.testing.assert_close(found.singular_values[:3], torch.tensor([3.0, 2.0, 1.0]), rtol=1e-5, atol=0)
    assert found.singular_values[3:].max() < 1e-5
    assert orthogonality_defect(found.basis) < 1e-5


@pytest.mark.parametrize("top_k", [0, -1, 5])
def test_k_outside_of_the_matrix_is_refused(top_k: int) -> None:
    with pytest.raises(ValueError, match=rf"1\.\.4 .* got {top_k}"):
        top_subspace(torch.ones(4, 9), top_k, seed=0)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_does_not_matter(scale: float) -> None:
    weight = with_spectrum(300, 300, power_law(300, 0.5)).float()
    plain, scaled = top_subspace(weight, 4, seed=3), top_subspace(weight * scale, 4, seed=3)
    torch.testing.assert_close(scaled.singular_values / scale, plain.singular_values, rtol=1e-4, atol=0)


def test_the_same_seed_gives_the_same_basis_and_another_seed_another() -> None:
    weight = with_spectrum(300, 300, power_law(300, 0.2)).float()
    first, again, other = (top_subspace(weight, 5, seed=seed).basis for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_seeds_depend_on_run_and_name_alone() -> None:
    names = [f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(100)]
    seeds = {layer_seed(seed, name) for seed in range(3) for name in names}
    assert len(seeds) == 300
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Fixed for ever: another value would make old runs irreproducible.
    assert layer_seed(0, "lm_head.weight") == 3528297259338047458


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(0, 3000), columns=st.integers(0, 3000))
def test_blocks_cover_every_row_once(rows: int, columns: int) -> None:
    covered = [row for block in row_blocks(rows, columns) for row in range(block.start, block.stop)]
    assert covered == list(range(rows))


@pytest.mark.parametrize("elements", [1, 100, 2**19])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_products_have_the_vectors_precision(
    elements: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subspace, "BLOCK_ELEMENTS", elements)  # one row at a time, some rows with a shorter rest, all
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(23, 31, generator=generator).to(dtype)
    right = torch.randn(31, 4, generator=generator, dtype=torch.float64)
    left = torch.randn(23, 5, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(product(matrix, right), matrix.double() @ right, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(transposed_product(left, matrix), left.mT @ matrix.double(), rtol=1e-13, atol=1e-13)
    assert product(matrix, right.float()).dtype == torch.float32
    assert transposed_product(left.float(), matrix).dtype == torch.float32
