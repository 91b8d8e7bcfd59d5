"""How much of σ₁(A B C) the factors guarantee: Theorem 3 of arXiv 2602.18868, in the form that can be proved.

Let H be symmetric and H_ij = A·B·C one of its blocks. For all unit vectors u and v, σ₁(H) ≥ |uᵀ H_ij v|. Let 𝒱 be the
span of the r₁ leading right singular vectors of A, and 𝒰 that of the r₂ leading left singular vectors of C.

1. Aᵀ maps the unit ball onto an ellipsoid whose section with 𝒱 has no half-axis below σ_{r₁}(A). So for every unit
   q ∈ 𝒱 there is a ‖u‖ ≤ 1 with Aᵀu = σ_{r₁}(A) q; and for every unit w ∈ 𝒰 a ‖v‖ ≤ 1 with C v = σ_{r₂}(C) w.
2. Hence σ₁(H) ≥ σ_{r₁}(A) · qᵀBw · σ_{r₂}(C) for all of them, and with the best pair

       σ₁(H) ≥ sup_{r₁,r₂} σ_{r₁}(A) · ‖P_𝒱 B P_𝒰‖ · σ_{r₂}(C).                                   (bound)

   The share of σ₁(B) that the subspaces let through, ‖P_𝒱 B P_𝒰‖/σ₁(B) ≤ 1, is called *alignment* here.
3. Let q and w be the unit vectors of 𝒱 and 𝒰 nearest to B's leading pair (u₁, v₁), at the angles θ₁ and θ₂. Then
   qᵀBw = σ₁(B) cosθ₁ cosθ₂ + (a term of modulus at most σ₂(B) sinθ₁ sinθ₂), so that

       alignment ≥ cosθ₁ cosθ₂ − (σ₂(B)/σ₁(B)) sinθ₁ sinθ₂.

Read with cosθ₁ cosθ₂ in the place of the alignment (``literal`` here), the theorem holds up to a factor of
1 − (σ₂(B)/σ₁(B)) tanθ₁ tanθ₂, and not in general: with A = (1, 1)/√2, B = diag(1, 1−ε), C = (1, −1)ᵀ/√2 the product
A B C is ε/2, while 1·1·1·cos 45°·cos 45° = 1/2. Inflation lowers σ₂/σ₁ only for k = 1, and raises the angles to A's
leading vectors at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SingularSubspace:
    """Leading singular values of an operator, and its singular vectors on the side that meets B.

    Attributes:
        values: Largest first, shape [r].
        vectors: Orthonormal as rows, shape [r, positions, features]: B acts on the features of every position alike.
    """

    values: Tensor
    vectors: Tensor


@dataclass(frozen=True)
class ProductBound:
    """The bound at the ranks where it is largest.

    Attributes:
        value: σ_{r₁}(A) · σ₁(B) · alignment · σ_{r₂}(C) ≤ σ₁(A B C).
        literal: sup σ_{r₁}(A) · σ₁(B) · σ_{r₂}(C) · cosθ₁ · cosθ₂ with the smallest principal angles; may exceed it.
        rank_left, rank_right: r₁ and r₂.
        sigma_left, sigma_weight, sigma_right: σ_{r₁}(A), σ₁(B), σ_{r₂}(C).
        alignment: ‖P_𝒱 B P_𝒰‖/σ₁(B).
        cosine_left: Cosine of the smallest principal angle between 𝒱 and the leading left singular subspace of B.
        cosine_right: The same between 𝒰 and the leading right one.
        left, right: q and w as coefficients of the leading vectors of A and C, shapes [r₁] and [r₂].
    """

    value: float
    literal: float
    rank_left: int
    rank_right: int
    sigma_left: float
    sigma_weight: float
    sigma_right: float
    alignment: float
    cosine_left: float
    cosine_right: float
    left: Tensor
    right: Tensor


def product_bound(left: SingularSubspace, weight: Tensor, right: SingularSubspace) -> ProductBound:
    """Bound σ₁(A B C) from below, with B = I ⊗ W for a weight that acts on every position alike.

    The singular values of I ⊗ W are those of W, each repeated as often as there are positions; the leading subspaces
    are therefore p ⊗ u₁ and p ⊗ v₁ for every p.

    Args:
        left: Of A, with its right singular vectors, shape [r, positions, m].
        weight: W, shape [m, n].
        right: Of C, with its left singular vectors, shape [r', positions, n].
    """
    weight_left, weight_values, weight_right = torch.linalg.svd(weight, full_matrices=False)
    sigma_weight = float(weight_values[0])
    meeting = torch.einsum("apm,mn,bpn->ab", left.vectors, weight, right.vectors)  # [r, r']
    onto_left = left.vectors @ weight_left[:, 0]  # [r, positions]
    onto_right = right.vectors @ weight_right[0]  # [r', positions]
    cosines_left = [_norm(onto_left[: rank + 1]) for rank in range(len(left.values))]
    cosines_right = [_norm(onto_right[: rank + 1]) for rank in range(len(right.values))]
    best = (-1.0, 0, 0)
    literal = 0.0
    for i, sigma_left in enumerate(left.values.tolist()):
        for j, sigma_right in enumerate(right.values.tolist()):
            best = max(best, (sigma_left * _norm(meeting[: i + 1, : j + 1]) * sigma_right, i, j))
            literal = max(literal, sigma_left * sigma_weight * sigma_right * cosines_left[i] * cosines_right[j])
    value, i, j = best
    coefficients_left, through, coefficients_right = torch.linalg.svd(meeting[: i + 1, : j + 1])
    return ProductBound(
        value=value,
        literal=literal,
        rank_left=i + 1,
        rank_right=j + 1,
        sigma_left=float(left.values[i]),
        sigma_weight=sigma_weight,
        sigma_right=float(right.values[j]),
        alignment=float(through[0]) / sigma_weight if sigma_weight else 0.0,
        cosine_left=cosines_left[i],
        cosine_right=cosines_right[j],
        left=coefficients_left[:, 0],
        right=coefficients_right[0],
    )


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))
