"""The top singular values of a matrix and what they span, by randomized block Krylov iteration."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# 2 MiB in float32: best of those tried between half and eight times as much, on 1 MiB of second-level cache a core.
BLOCK_ELEMENTS = 2**19


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Consecutive slices of the rows of a matrix, of about ``BLOCK_ELEMENTS`` elements each."""
    height = max(1, BLOCK_ELEMENTS // max(1, columns))
    return (slice(start, min(start + height, rows)) for start in range(0, rows, height))


def product(matrix: Tensor, vectors: Tensor) -> Tensor:
    """M X, shape [m, p], in the precision of X; M [m, n] is of any floating dtype."""
    return torch.cat([matrix[rows].to(vectors.dtype) @ vectors for rows in row_blocks(*matrix.shape)])


def transposed_product(vectors: Tensor, matrix: Tensor) -> Tensor:
    """Xᵀ M, shape [p, n], in the precision of X [m, p]; M [m, n] is of any floating dtype."""
    total = vectors.new_zeros(vectors.shape[1], matrix.shape[1])
    for rows in row_blocks(*matrix.shape):
        total.addmm_(vectors[rows].mT, matrix[rows].to(vectors.dtype))
    return total


PROBES = 64


def effective_rank(weight: Tensor, seed: int) -> float:
    """(Σσ²)²/Σσ⁴, the participation ratio of the squared singular values, between 1 and the rank.

    Σσ⁴ = ‖W Wᵀ‖_F² is estimated with Gaussian probes (Hutchinson), so that no decomposition is needed; where the
    matrix is no larger than the probes it is exact.
    """
    total = weight.double().square().sum()
    rows = weight.shape[0]
    if min(weight.shape) <= PROBES * 4:
        gram = weight.double() @ weight.double().mT if rows <= weight.shape[1] else weight.double().mT @ weight.double()
        return float(total**2 / gram.square().sum())
    generator = torch.Generator().manual_seed(seed)
    probes = torch.randn(rows, PROBES, generator=generator).to(weight.device, weight.dtype)
    fourth = (weight @ (weight.mT @ probes)).double().square().sum() / PROBES
    return float(total**2 / fourth)


OVERSAMPLING = 6
"""At least so many columns beyond k are iterated."""
BLOCK_MULTIPLE = 16
"""Columns that matrix units take at a time: with 33, a product with W takes up to twice as long as with 32."""
KRYLOV_ITERATIONS = 3


@dataclass(frozen=True)
class TopSubspace:
    """An orthonormal basis of (approximately) the top-k left singular subspace.

    Attributes:
        basis: U_k, shape [m, k], orthonormal columns; float64 if W is, else float32.
        singular_values: Ritz values, shape [k], largest first. Each is at most the true singular value.
    """

    basis: Tensor
    singular_values: Tensor


def layer_seed(seed: int, name: str) -> int:
    """A seed for one layer that depends on its name alone, so that neither order nor process count matters."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


def top_subspace(weight: Tensor, top_k: int, seed: int, *, iterations: int = KRYLOV_ITERATIONS) -> TopSubspace:
    """Approximate the ``top_k`` largest singular values of ``weight`` and their left singular vectors.

    Args:
        weight: W, shape [m, n], of any floating dtype, finite.
        top_k: k, with 1 <= k <= min(m, n).

    Raises:
        ValueError: k is out of range.
    """
    rows, columns = weight.shape
    if not 1 <= top_k <= min(rows, columns):
        raise ValueError(f"top_k must be in 1..{min(rows, columns)} for a {rows}×{columns} matrix, got {top_k}")
    precision = torch.float64 if weight.dtype == torch.float64 else torch.float32
    block = math.ceil((top_k + OVERSAMPLING) / BLOCK_MULTIPLE) * BLOCK_MULTIPLE
    if block * (iterations + 1) >= min(rows, columns):
        # The Krylov space would fill the whole space: the matrix is small, and the exact answer costs no more.
        left, singular_values, _ = torch.linalg.svd(weight.to(precision), full_matrices=False)
        return TopSubspace(left[:, :top_k].contiguous(), singular_values[:top_k])

    factor = weight if _multiplies_natively(weight) else weight.to(precision)
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(columns, block, generator=generator, dtype=precision).to(factor)
    newest = torch.linalg.qr((factor @ start).to(precision)).Q  # [m, block]
    krylov, images = newest, [newest.to(factor).mT @ factor]  # K, and the blocks of Kᵀ W, [block, n] each
    for _ in range(iterations):
        grown = (factor @ images[-1].mT).to(precision)
        # Orthonormal to all blocks before it, so that the products Kᵀ W need not be made again for the final basis.
        newest = torch.linalg.qr(torch.cat([krylov, grown], dim=1)).Q[:, -block:]
        krylov = torch.cat([krylov, newest], dim=1)  # [m, block·(iterations+1)]
        images.append(newest.to(factor).mT @ factor)
    basis = torch.linalg.qr(krylov @ _left_singular_vectors(torch.cat(images).to(precision))[:, :top_k]).Q
    # Of the narrow Wᵀ U_k by way of its triangular factor: a Gram matrix would lose what is below √ε of the largest.
    singular_values = torch.linalg.svdvals(torch.linalg.qr(transposed_product(basis, weight).mT).R)
    return TopSubspace(basis, singular_values)


def _left_singular_vectors(wide: Tensor) -> Tensor:
    """Left singular vectors [p, p] of a wide matrix [p, n], those of the largest values first.

    From the eigenvectors of its small Gram matrix, in float64 because squaring halves the digits.
    """
    gram = wide.double() @ wide.double().mT if wide.numel() < 2**22 else (wide @ wide.mT).double()
    return torch.linalg.eigh(gram).eigenvectors.flip(-1).to(wide.dtype)


def _multiplies_natively(weight: Tensor) -> bool:
    if weight.dtype == torch.bfloat16:
        return weight.device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype in {torch.float32, torch.float64}


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
