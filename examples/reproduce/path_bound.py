"""Theorem 3 of arXiv 2602.18868 on a hardened layer: σ₁ of the Hessian from the factors around its inflated weight.

A hardened layer is x ↦ y = W~x ↦ z = C y. With θ_i = the parameters that reach the loss only through x, and θ_j = C,

    ∂²loss/∂C∂θ_i = A·(I ⊗ W~)·C' with A = ∂²loss/∂C∂y and C' = ∂x/∂θ_i,

exactly, because the gradient by C depends on θ_i through y alone. In an MLP those are all earlier layers; in a
Transformer the residual stream goes round the layer, so they are what only this layer reads: q, k, v and their norm for
o_proj, gate, up and theirs for down_proj. For q_proj or gate_proj there are none, and no such bound. A is not free of
α: ∂loss/∂C is linear in y.

It is evaluated as |uᵀH_ij v| at explicit unit vectors, so it is a lower bound even where a singular vector has not
converged, of σ₁ over any set of parameters that contains the block's.

How much of σ₁(A B C) the factors guarantee: Theorem 3 of arXiv 2602.18868, in the form that can be proved.

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
from compensation_bound import observed
from torch import Tensor, nn

from specdef_cli.attack.variants.factored import hardened_layers
from specdef_cli.certify.curvature import HessianProducts, Loss, differentiable_gradient, trainable
from specdef_cli.errors import SpecDefError
from specdef_cli.spectral.subspace import layer_seed, top_eigenpairs

RANK = 6
"""Leading singular pairs of A and C' that the bound chooses its subspaces among."""


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


@dataclass(frozen=True)
class PathBound:
    """The bound by the block between a compensation and what lies before the inflated weight.

    Attributes:
        layer: Module path of the hardened layer.
        value: |uᵀH_ij v| at the vectors that the product chose; at least ``product.value`` once they have converged.
        product: The factors, ranks and angles.
        before: Names of the parameters θ_i.
    """

    layer: str
    value: float
    product: ProductBound
    before: tuple[str, ...]


def path_bound(model: nn.Module, loss: Loss, layer: str, *, rank: int = RANK, seed: int = 0) -> PathBound | None:
    """Theorem 3's bound for the blocks around one hardened layer; ``None`` where no parameter is before it alone, or
    where its compensation does not train.

    Args:
        model: In evaluation mode.
        loss: Runs ``model``. Called twice.
        layer: Module path of a hardened layer.
        rank: How many leading singular pairs of A and C' are computed; more can only raise ``product.value``.
        seed: Of the start vectors.

    Raises:
        SpecDefError: There is no such hardened layer, or as :func:`compensation_bounds`.
    """
    pairs = hardened_layers(model)
    if layer not in pairs:
        raise SpecDefError(f"{layer} is not a hardened layer", f"Choose one of {', '.join(pairs)}.")
    pair = pairs[layer]
    before = exclusive_parameters(model, loss, layer) if pair.compensation.weight.requires_grad else {}
    if not before:
        return None
    with observed({layer: pair}) as seen:
        value = loss()
    place = seen[layer]
    compensation, offset, reached = pair.compensation.weight, place.offset_inflated[0], place.input[0]
    by_compensation, by_hidden = differentiable_gradient(value, [compensation, offset])
    apply_left = HessianProducts([by_hidden], [compensation])  # A
    apply_left_transposed = HessianProducts([by_compensation], [offset])  # Aᵀ
    parameters = list(before.values())
    apply_right_transposed = HessianProducts([reached], parameters)  # C'ᵀ
    cotangent = torch.zeros_like(reached, requires_grad=True)
    # C'ᵀ is linear in its cotangent, so differentiating by that gives C': forward mode by two reverse modes.
    pullback = torch.autograd.grad(reached, parameters, cotangent, create_graph=True)
    apply_right = HessianProducts(pullback, [cotangent])  # C'

    def leading(gram: HessianProducts, back: HessianProducts, like: Tensor) -> SingularSubspace:
        generator = torch.Generator().manual_seed(layer_seed(seed, layer))
        start = torch.randn(like.numel(), generator=generator, dtype=torch.float64).to(like.detach())
        # The alignment can be as small as 1/α, and a vector's error must be smaller still.
        precise = torch.finfo(like.dtype).eps ** 0.5
        found = top_eigenpairs(lambda vector: back(gram(vector)), start, count=rank, tolerance=precise)
        # Squaring halves the digits: a smaller singular value than this would be rounding.
        resolved = found.values > precise * found.values[0]
        values = found.values[resolved].sqrt().to(like.detach())
        vectors = found.vectors[resolved.to(found.vectors.device)]
        return SingularSubspace(values, vectors.view(len(values), -1, like.shape[-1]))

    left = leading(apply_left, apply_left_transposed, offset)
    right = leading(apply_right_transposed, apply_right, reached)
    if not len(left.values) or not len(right.values):
        return None
    weight = pair.inflated.weight.detach()
    product = product_bound(left, weight, right)

    def preimage(space: SingularSubspace, coefficients: Tensor) -> Tensor:
        used = len(coefficients)
        scaled = coefficients / space.values[:used] ** 2
        return torch.einsum("r,rpf->pf", scaled, space.vectors[:used]).flatten()

    unit_left = _unit(apply_left(preimage(left, product.left)))  # u with Aᵀu ∝ q
    unit_right = _unit(apply_right_transposed(preimage(right, product.right)))  # v with C'v ∝ w
    hidden = apply_right(unit_right).view(-1, weight.shape[1]) @ weight.mT  # (I ⊗ W~) C' v, shape [positions, m]
    return PathBound(layer, abs(float(unit_left @ apply_left(hidden.flatten()))), product, tuple(before))


def exclusive_parameters(model: nn.Module, loss: Loss, layer: str) -> dict[str, nn.Parameter]:
    """The trainable parameters that reach the loss only through one hardened layer's input, by name.

    Found by cutting that input out of the graph: what the loss depended on before and no longer does.

    Args:
        model: With a hardened layer at ``layer``.
        loss: Called once.
        layer: Its module path.
    """
    pair = hardened_layers(model)[layer]
    reached: list[Tensor] = []

    def cut(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        reached.append(arguments[0])
        return (arguments[0].detach(),)

    handle = pair.register_forward_pre_hook(cut)
    try:
        value = loss()
    finally:
        handle.remove()
    if not reached or not reached[0].requires_grad:
        return {}
    named = trainable(model)
    parameters = list(named.values())
    to_input = torch.autograd.grad(reached[0].sum(), parameters, allow_unused=True, retain_graph=True)
    around = torch.autograd.grad(value, parameters, allow_unused=True)
    return {
        name: parameter
        for (name, parameter), inside, outside in zip(named.items(), to_input, around, strict=True)
        if inside is not None and outside is None
    }


def _norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def _unit(vector: Tensor) -> Tensor:
    return vector / torch.linalg.vector_norm(vector)
