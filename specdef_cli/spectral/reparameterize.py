"""W = C·W~: one linear map as an inflated layer followed by its compensation (the paper's Algorithm 1).

With U_k any m×k matrix of orthonormal columns and P = U_k U_kᵀ, two factorizations ("gauges") are built:

*symmetric* (the paper's)
    W~ = (I + (α−1)P) W,  C = I − (1−1/α) P. Rounding W~ in the stored dtype leaves an error of about α·u·σ₁ in
    directions that C does not shrink, so the function survives only while α times the unit roundoff u is small.
*rotated*
    Q = [U_k, U_⊥] orthogonal, D = diag(α×k, 1, …): W~ = D Qᵀ W, C = Q D⁻¹. The same singular values, but each row of
    W~ has its own scale, so rounding is relative in every row and the error does not grow with α.

Both satisfy C W~ = W for every orthonormal U_k. Q is never formed: it is the product of k Householder reflectors in
compact form, Q = I − V T Vᵀ. So both gauges are a rank-k update and a scaling, W~ = D(W + L R) and C = (I + L′R′)D⁻¹,
which costs O(mnk) instead of O(m²n) and is made and rounded a block of rows at a time.

References: arXiv 2602.18868, Algorithm 1; Schreiber & Van Loan, "A storage-efficient WY representation for products
of Householder transformations", SIAM J. Sci. Stat. Comput. 10 (1989).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specdef_cli.spectral.blocks import product, row_blocks, transposed_product

PROBES = 16


@dataclass(frozen=True)
class Factors:
    """The two factors of W.

    Attributes:
        inflated: W~, shape [m, n]. Its top k singular values are α times W's, if U_k spans the top subspace.
        compensation: C, shape [m, m], with C W~ = W.
    """

    inflated: Tensor
    compensation: Tensor


def householder_completion(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Complete k orthonormal columns to an orthogonal matrix, in compact WY form.

    Args:
        basis: U_k, shape [m, k], orthonormal columns.

    Returns:
        V [m, k] and T [k, k] such that Q = I − V T Vᵀ is orthogonal and its first k columns span U_k (each is ± the
        corresponding column of U_k).
    """
    packed, tau = torch.geqrf(basis)
    reflectors = packed.tril(-1)
    reflectors.diagonal().fill_(1)
    # tau = 0 stands for "no reflection" (a column that is a unit vector already).
    idle = tau == 0
    reflectors[:, idle] = 0
    inverse_tau = torch.where(idle, torch.ones_like(tau), 1 / torch.where(idle, torch.ones_like(tau), tau))
    inverse = (reflectors.mT @ reflectors).triu(1) + torch.diag(inverse_tau)
    identity = torch.eye(inverse.shape[0], dtype=basis.dtype, device=basis.device)
    return reflectors, torch.linalg.solve_triangular(inverse, identity, upper=True)


def rotated_factors(weight: Tensor, basis: Tensor, alpha: float, dtype: torch.dtype | None = None) -> Factors:
    """W~ = D Qᵀ W and C = Q D⁻¹, computed in the precision of ``basis``.

    Args:
        weight: W, shape [m, n], in any floating dtype.
        basis: U_k, shape [m, k], orthonormal columns.
        alpha: α > 0.
        dtype: What the factors are stored in; ``None`` keeps the precision of the computation.
    """
    top_k = basis.shape[1]
    reflectors, compact = householder_completion(basis)
    scales = basis.new_ones(basis.shape[0])  # the diagonal of D
    scales[:top_k] = alpha
    projected = transposed_product(reflectors, weight)  # Vᵀ W, [k, n]
    return Factors(
        _inflated(weight, -reflectors, compact.mT @ projected, scales, dtype or basis.dtype),
        _compensation(-reflectors, compact @ reflectors.mT, scales, dtype or basis.dtype),
    )


def symmetric_factors(weight: Tensor, basis: Tensor, alpha: float, dtype: torch.dtype | None = None) -> Factors:
    """W~ = (I + (α−1)P) W and C = I − (1−1/α)P, computed in float64.

    ``basis`` is orthonormalized again in float64: the error of C W~ = W is α times the defect of its orthogonality.

    Args:
        weight: W, shape [m, n], in any floating dtype.
        basis: U_k, shape [m, k].
        alpha: α > 0.
        dtype: What the factors are stored in; ``None`` keeps float64.
    """
    exact = torch.linalg.qr(basis.double()).Q
    unscaled = exact.new_ones(exact.shape[0])
    projected = transposed_product(exact, weight)  # U_kᵀ W, [k, n]
    return Factors(
        _inflated(weight, (alpha - 1) * exact, projected, unscaled, dtype or exact.dtype),
        _compensation(-(1 - 1 / alpha) * exact, exact.mT, unscaled, dtype or exact.dtype),
    )


def _inflated(weight: Tensor, left: Tensor, right: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """D(W + L R), rounded to ``dtype`` once."""
    inflated = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for rows in row_blocks(*weight.shape):
        inflated[rows] = torch.addmm(weight[rows].to(left.dtype), left[rows], right).mul_(scales[rows, None])
    return inflated


def _compensation(left: Tensor, right: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(I + L R)D⁻¹, rounded to ``dtype`` once."""
    size = len(scales)
    compensation = torch.empty(size, size, dtype=dtype, device=left.device)
    for rows in row_blocks(size, size):
        block = left[rows] @ right
        block.diagonal(rows.start).add_(1)
        compensation[rows] = block.div_(scales)
    return compensation


def reconstruction_error(reference: Tensor, factors: Factors, probes: Tensor) -> float:
    """‖C(W~X) − WX‖_F / ‖WX‖_F through stored factors.

    The product W~X is rounded to the stored dtype before C is applied, as it is when the model runs.

    Args:
        reference: W X, shape [m, p], float32 or better.
        probes: X, shape [n, p].
    """
    hidden = product(factors.inflated, probes).to(factors.inflated.dtype).to(probes.dtype)
    restored = product(factors.compensation, hidden)
    norm = torch.linalg.vector_norm(reference)
    return float(torch.linalg.vector_norm(restored - reference) / norm)


def gaussian_probes(columns: int, seed: int, device: torch.device) -> Tensor:
    """X, shape [columns, PROBES], float32, drawn on the CPU so that every device uses the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(columns, PROBES, generator=generator).to(device)
