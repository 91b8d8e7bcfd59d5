"""The eigenvalues of largest modulus of a symmetric matrix that is known only by its products.

Thick-restart Lanczos with full orthogonalization. ARPACK (``scipy.sparse.linalg.eigsh``) finds the same pairs and is
what the tests compare with; it is not used because it copies every vector to the host and, when the budget of products
runs out, hands back nothing. Here the vectors stay on the parameters' device, and what is returned is always a Ritz
pair: vᵀHv for a unit vector v, hence a true lower bound of σ₁, with its residual saying how good it is.

Reference: Wu & Simon, "Thick-Restart Lanczos Method for Large Symmetric Eigenvalue Problems", SIAM J. Matrix Anal.
Appl. 22 (2000).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SUBSPACE = 24
"""Vectors held at a time, beyond those asked for: the memory is this many times the size of the matrix's one side."""

ROUNDING = 100
"""A remainder below this many units of rounding is noise, and no new direction."""


@dataclass(frozen=True)
class RitzPairs:
    """Approximate eigenpairs, largest modulus first.

    Attributes:
        values: θ, float64, shape [count].
        vectors: Orthonormal, shape [count, n], in the dtype of the start vector.
        residuals: ‖Hv − θv‖ as the recurrence estimates it, shape [count].
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor
    products: int


def norm(vector: Tensor) -> float:
    """‖v‖, whatever the size of its entries.

    The Hessian of a hardened model has entries of 1e25 and more, whose squares float32 does not hold.
    """
    largest = float(torch.linalg.vector_norm(vector, ord=torch.inf))
    if largest == 0 or not math.isfinite(largest):
        return largest
    return largest * float(torch.linalg.vector_norm(vector / largest))


def top_eigenpairs(
    product: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    count: int = 1,
    tolerance: float = 1e-3,
    max_products: int = 200,
) -> RitzPairs:
    """Approximate the ``count`` eigenvalues of largest modulus.

    Args:
        product: v ↦ Hv for a symmetric H, shape [n] → [n].
        start: Shape [n], not zero; its dtype and device are those of the computation.
        count: How many pairs; fewer come back where n, or the space that ``start`` generates, is smaller.
    """
    size = start.numel()
    capacity = min(size, SUBSPACE + 2 * count)
    basis = start.new_empty(capacity, size)
    projected = torch.zeros(capacity, capacity, dtype=torch.float64)  # the basis's own view of H
    vector, used = start / norm(start), 0
    for products in range(1, max_products + 1):
        basis[used] = vector
        image = product(vector)
        coefficients = basis[: used + 1] @ image
        rest = image - coefficients @ basis[: used + 1]
        # Once more: one pass leaves a component in the basis that grows from step to step.
        rest -= (basis[: used + 1] @ rest) @ basis[: used + 1]
        projected[: used + 1, used] = projected[used, : used + 1] = coefficients.double().cpu()
        used += 1
        values, rotation = torch.linalg.eigh(projected[:used, :used])
        order = values.abs().argsort(descending=True)
        values, rotation = values[order], rotation[:, order]
        rest_norm = norm(rest)
        residuals = rest_norm * rotation[-1].abs()
        wanted = min(count, used)
        # A remainder of rounding only: the space is invariant, and its pairs are exact.
        exhausted = rest_norm <= ROUNDING * torch.finfo(start.dtype).eps * norm(image)
        settled = used >= count and bool((residuals[:count] <= tolerance * values[:count].abs()).all())
        if settled or exhausted or used == size or products == max_products:
            break
        if used == capacity:
            kept = capacity // 2
            basis[:kept] = rotation[:, :kept].mT.to(basis) @ basis
            projected[:kept, :kept] = torch.diag(values[:kept])
            used = kept
        vector = rest / rest_norm
    vectors = rotation[:, :wanted].mT.to(basis) @ basis[:used]
    return RitzPairs(values[:wanted], vectors, residuals[:wanted], products)
