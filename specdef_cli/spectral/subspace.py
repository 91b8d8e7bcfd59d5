"""The top-k left singular subspace of a large matrix, without a singular value decomposition of it.

Function preservation does not depend on how good the basis is (see :mod:`specdef_cli.spectral.reparameterize`); only
the share of σ₁ that gets inflated does. So a randomized method is enough, and it is hundreds of times faster than a
full decomposition. Block Krylov iteration is used because it is the most accurate one per product with W: three
iterations give six digits of σ₁ even where singular values decay slowly.

Products with a bfloat16 W are made in bfloat16 where the processor has instructions for it, at twice the speed.
Rounding a block of the Krylov space tilts it by 2⁻⁹ at most, and a tilt costs the square of it in singular values.
These are measured at the end, in float32.

References: Musco & Musco, "Randomized Block Krylov Methods for Stronger and Faster Approximate Singular Value
Decomposition", arXiv 1504.05477; Golub, Luk & Overton, "A block Lanczos method for computing the singular values and
corresponding singular vectors of a matrix", ACM Trans. Math. Softw. 7 (1981).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from specdef_cli.spectral.blocks import transposed_product

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
