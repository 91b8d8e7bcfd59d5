"""C·W~ = W, the spectra of both factors, and what rounding does to each gauge."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specdef_cli.spectral import subspace as blocks
from specdef_cli.spectral.factors import (
    Factors,
    gaussian_probes,
    householder_completion,
    reconstruction_error,
    rotated_factors,
    symmetric_factors,
)
from specdef_cli.spectral.subspace import top_subspace

GAUGES = [rotated_factors, symmetric_factors]


def random_basis(rows: int, top_k: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(rows, top_k, generator=generator, dtype=dtype)).Q


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def full(basis: Tensor) -> Tensor:
    """Q itself, from its compact form."""
    reflectors, compact = householder_completion(basis)
    return torch.eye(basis.shape[0], dtype=basis.dtype) - reflectors @ compact @ reflectors.mT


def assert_completes(basis: Tensor) -> None:
    completed = full(basis)
    identity = torch.eye(basis.shape[0], dtype=basis.dtype)
    tolerance = 100 * torch.finfo(basis.dtype).eps
    assert (completed.mT @ completed - identity).abs().max() < tolerance
    # Each of the first columns is ± the basis' own.
    cosines = (completed[:, : basis.shape[1]] * basis).sum(0).abs()
    assert (cosines - 1).abs().max() < tolerance


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    top_k=st.integers(1, 40),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_orthonormal_columns_are_completed_to_a_basis(rows: int, top_k: int, seed: int, dtype: torch.dtype) -> None:
    assert_completes(random_basis(rows, min(top_k, rows), seed, dtype))


@pytest.mark.parametrize(
    "columns",
    [[0], [0, 1, 2], [3], [2, 0], [4, 3, 2, 1, 0], [0, 1, 2, 3, 4]],
    ids=lambda columns: "e" + "e".join(map(str, columns)),
)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_unit_vectors_and_whole_bases_are_completed(columns: list[int], sign: float) -> None:
    # A column that is a unit vector already needs no reflection: LAPACK says so with tau = 0.
    assert_completes(sign * torch.eye(5, dtype=torch.float64)[:, columns])


@pytest.mark.parametrize("build", GAUGES)
@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 30),
    columns=st.integers(1, 30),
    top_k=st.integers(1, 30),
    log_alpha=st.floats(0, 6),
    seed=st.integers(0, 2**32),
)
def test_the_product_is_the_weight_whatever_the_basis(
    build: Callable[..., Factors], rows: int, columns: int, top_k: int, log_alpha: float, seed: int
) -> None:
    weight, alpha = random_weight(rows, columns, seed), 10.0**log_alpha
    factors = build(weight, random_basis(rows, min(top_k, rows), seed + 1), alpha)
    assert factors.inflated.shape == (rows, columns)
    assert factors.compensation.shape == (rows, rows)
    # The symmetric product cancels a factor of α; the rotated one does not.
    growth = alpha if build is symmetric_factors else 1
    defect = torch.linalg.matrix_norm(factors.compensation @ factors.inflated - weight)
    assert defect <= 1e-13 * growth * math.sqrt(rows) * torch.linalg.matrix_norm(weight)


@pytest.mark.parametrize("build", GAUGES)
@pytest.mark.parametrize(("rows", "columns", "top_k"), [(24, 40, 5), (40, 24, 5), (7, 7, 7), (1, 9, 1), (9, 1, 1)])
def test_the_spectra_are_as_the_paper_says(build: Callable[..., Factors], rows: int, columns: int, top_k: int) -> None:
    alpha = 1e4
    weight = random_weight(rows, columns)
    left, singular_values, _ = torch.linalg.svd(weight, full_matrices=False)
    factors = build(weight, left[:, :top_k], alpha)
    expected = torch.cat([singular_values[:top_k] * alpha, singular_values[top_k:]])
    torch.testing.assert_close(torch.linalg.svdvals(factors.inflated), expected, rtol=1e-9, atol=1e-9)
    ones, shrunk = torch.ones(rows - top_k, dtype=torch.float64), torch.full((top_k,), 1 / alpha, dtype=torch.float64)
    torch.testing.assert_close(
        torch.linalg.svdvals(factors.compensation), torch.cat([ones, shrunk]), rtol=1e-9, atol=1e-13
    )


def test_both_gauges_share_their_singular_values_for_an_approximate_basis_too() -> None:
    weight, basis = random_weight(20, 30), random_basis(20, 4, seed=5)
    rotated, symmetric = rotated_factors(weight, basis, 300.0), symmetric_factors(weight, basis, 300.0)
    torch.testing.assert_close(
        torch.linalg.svdvals(rotated.inflated), torch.linalg.svdvals(symmetric.inflated), rtol=1e-11, atol=0
    )
    torch.testing.assert_close(
        torch.linalg.svdvals(rotated.compensation), torch.linalg.svdvals(symmetric.compensation), rtol=1e-11, atol=0
    )
    # They differ by the rotation alone: W~_rotated = Qᵀ W~_symmetric.
    torch.testing.assert_close(full(basis).mT @ symmetric.inflated, rotated.inflated, rtol=0, atol=1e-11)


def test_a_closed_form_by_hand() -> None:
    # W = diag(3, 1), u = (3, 4)/5, α = 10. P = uuᵀ = [[9, 12], [12, 16]]/25.
    weight = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    basis = torch.tensor([[0.6], [0.8]], dtype=torch.float64)
    factors = symmetric_factors(weight, basis, 10.0)
    # W~ = (I + 9P)W = [[106, 108], [108, 169]]/25 · diag(3, 1);  C = I − 0.9 P = [[16.9, −10.8], [−10.8, 10.6]]/25
    inflated = torch.tensor([[318.0, 108.0], [324.0, 169.0]], dtype=torch.float64) / 25
    compensation = torch.tensor([[16.9, -10.8], [-10.8, 10.6]], dtype=torch.float64) / 25
    torch.testing.assert_close(factors.inflated, inflated, rtol=1e-14, atol=0)
    torch.testing.assert_close(factors.compensation, compensation, rtol=1e-14, atol=0)

    # LAPACK reflects u onto −e₁: Q = [[−0.6, −0.8], [−0.8, 0.6]], W~ = diag(10, 1) Qᵀ W, C = Q diag(0.1, 1).
    rotated = rotated_factors(weight, basis, 10.0)
    inflated = torch.tensor([[-18.0, -8.0], [-2.4, 0.6]], dtype=torch.float64)
    compensation = torch.tensor([[-0.06, -0.8], [-0.08, 0.6]], dtype=torch.float64)
    torch.testing.assert_close(rotated.inflated, inflated, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(rotated.compensation, compensation, rtol=1e-14, atol=1e-15)


def stored_error(build: Callable[..., Factors], alpha: float, dtype: torch.dtype) -> float:
    weight = random_weight(96, 128).float()
    factors = build(weight, top_subspace(weight, 8, seed=0).basis, alpha)
    stored = Factors(factors.inflated.to(dtype), factors.compensation.to(dtype))
    probes = gaussian_probes(128, 0, torch.device("cpu"))
    return reconstruction_error(weight @ probes, stored, probes)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 8e-3), (torch.float32, 2e-6), (torch.float64, 2e-6)])
def test_rounding_of_the_rotated_gauge_does_not_grow_with_alpha(dtype: torch.dtype, bound: float) -> None:
    errors = [stored_error(rotated_factors, alpha, dtype) for alpha in (1.0, 1e2, 1e4, 1e6, 1e9)]
    assert max(errors) < bound
    assert max(errors) < 2 * min(errors) + 1e-7


def test_rounding_of_the_symmetric_gauge_grows_in_proportion_to_alpha() -> None:
    alphas = (1e2, 1e3, 1e4, 1e5)
    for dtype in (torch.float32, torch.bfloat16):
        errors = [stored_error(symmetric_factors, alpha, dtype) for alpha in alphas]
        for smaller, larger in itertools.pairwise(errors):
            assert 5 < larger / smaller < 20
    assert stored_error(symmetric_factors, 1e4, torch.float32) < 1e-2
    assert stored_error(symmetric_factors, 1e4, torch.bfloat16) > 1  # the function is destroyed


def test_the_symmetric_gauge_repairs_a_basis_that_is_orthonormal_in_float32_only() -> None:
    weight, alpha = random_weight(60, 60), 1e4
    basis = random_basis(60, 6, seed=3, dtype=torch.float32)
    assert (basis.double().mT @ basis.double() - torch.eye(6)).abs().max() > 1e-9
    factors = symmetric_factors(weight, basis, alpha)
    assert (factors.compensation @ factors.inflated - weight).abs().max() < 1e-9


@pytest.mark.parametrize("build", GAUGES)
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_factors_are_rounded_once_and_the_weight_is_as_stored(
    build: Callable[..., Factors], stored: torch.dtype
) -> None:
    weight, basis = random_weight(40, 56).to(stored), random_basis(40, 4, seed=2, dtype=torch.float32)
    before = weight.clone()
    exact = build(weight.to(torch.float32), basis, 100.0)
    rounded = build(weight, basis, 100.0, stored)
    assert torch.equal(rounded.inflated, exact.inflated.to(stored))
    assert torch.equal(rounded.compensation, exact.compensation.to(stored))
    assert torch.equal(weight, before)


@pytest.mark.parametrize("build", GAUGES)
@pytest.mark.parametrize("elements", [1, 100, 1000])
def test_blocks_of_rows_make_no_difference(
    build: Callable[..., Factors], elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, basis = random_weight(24, 40), random_basis(24, 5, seed=1)
    whole = build(weight, basis, 1e3)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", elements)
    parts = build(weight, basis, 1e3)
    torch.testing.assert_close(parts.inflated, whole.inflated, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(parts.compensation, whole.compensation, rtol=1e-11, atol=1e-14)


def test_the_error_sees_a_wrong_factor() -> None:
    weight, probes = random_weight(32, 32).float(), gaussian_probes(32, 0, torch.device("cpu"))
    factors = rotated_factors(weight, random_basis(32, 4, seed=0, dtype=torch.float32), 100.0)
    assert reconstruction_error(weight @ probes, factors, probes) < 1e-5
    factors.compensation[3, 5] += 1
    assert reconstruction_error(weight @ probes, factors, probes) > 1e-2
    factors.compensation[3, 5] = math.nan
    assert math.isnan(reconstruction_error(weight @ probes, factors, probes))
