"""Lower bounds of σ₁ of a hardened model's loss Hessian from its inflated weights, for a given batch.

A hardened layer is x ↦ y = W~x ↦ z = C y. Two blocks of the Hessian carry α, both through the compensation C:

*path* (Theorem 3 of arXiv 2602.18868): θ_i = the parameters that reach the loss only through x, θ_j = C. Then
    ∂²loss/∂C∂θ_i = A·(I ⊗ W~)·C' with A = ∂²loss/∂C∂y and C' = ∂x/∂θ_i, exactly, because the gradient by C depends on
    θ_i through y alone. In an MLP those are all earlier layers; in a Transformer the residual stream goes round the
    layer, so they are what only this layer reads: q, k, v and their norm for o_proj, gate, up and theirs for down_proj.
    For q_proj or gate_proj there are none, and no such bound. A is not free of α: ∂loss/∂C is linear in y.

*compensation*: θ_i = θ_j = C. For unit vectors a, b and the direction a bᵀ, z changes by a (bᵀy) at every position, so
        (a bᵀ)ᵀ ∂²loss/∂C² (a bᵀ) = Σ_{t,s} p_t p_s aᵀ H_z[t,s] a,   p_t = bᵀW~x_t,
    with H_z the Hessian by the layer's output. With b = u₁ and W~ = αW in that direction, p_t = α σ₁(W) v₁ᵀx_t, hence
        σ₁(H) ≥ α² σ₁(W)² · σ₁(Σ v₁ᵀx_t v₁ᵀx_s H_z[t,s]),
    where the last factor, the *context*, belongs to the original function and does not change with α. This holds
    exactly in every architecture, and is why the measured σ₁ grows as α² once it passes the original's. It also says
    what does not grow: without C among the trained parameters no block carries α.

Both are evaluated as |uᵀH_ij v| at explicit unit vectors, so they are lower bounds even where a singular vector has
not converged. They hold for σ₁ over any set of parameters that contains the block's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from specdef_cli.attack.variants.inserted_layers import hardened_layers
from specdef_cli.certify.curvature import HessianProducts, Loss, differentiable_gradient, trainable
from specdef_cli.errors import SpecDefError
from specdef_cli.runtime import SpecDefLinear
from specdef_cli.spectral.bound import ProductBound, SingularSubspace, product_bound
from specdef_cli.spectral.lanczos import top_eigenpairs
from specdef_cli.spectral.subspace import layer_seed, top_subspace

RANK = 6
"""Leading singular pairs of A and C' that the path bound chooses its subspaces among."""


@dataclass(frozen=True)
class CompensationBound:
    """The bound by the block of one compensation.

    Attributes:
        layer: Module path of the hardened layer.
        value: At most σ₁ of the Hessian over any parameters that contain this compensation's weight.
        sigma_inflated: σ₁(W~).
        context: ``value``/σ₁(W~)²: what the rest of the network and the batch contribute. Does not change with α.
    """

    layer: str
    value: float
    sigma_inflated: float
    context: float


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


@dataclass
class _Layer:
    """What hooks see of one hardened layer while a loss is computed.

    Attributes:
        input: x, shape [..., n], one per run of the layer.
        inflated: y, shape [..., m], before its offset.
        offset_inflated, offset_output: Zeros, added to y and to z, to differentiate by.
    """

    input: list[Tensor] = field(default_factory=list)
    inflated: list[Tensor] = field(default_factory=list)
    offset_inflated: list[Tensor] = field(default_factory=list)
    offset_output: list[Tensor] = field(default_factory=list)


def compensation_bounds(model: nn.Module, loss: Loss, *, seed: int = 0) -> dict[str, CompensationBound]:
    """The compensation bound of every hardened layer whose compensation trains. One forward pass serves them all.

    Args:
        model: With hardened layers (:class:`SpecDefLinear`), in evaluation mode.
        loss: Runs ``model``, see :func:`specdef_cli.certify.curvature.model_loss`. Called once.
        seed: Of the start vectors.

    Raises:
        SpecDefError: No layer is hardened, one runs more than once in a pass, or the loss is not finite.
    """
    layers = {name: pair for name, pair in hardened_layers(model).items() if pair.compensation.weight.requires_grad}
    with _observed(layers) as seen:
        value = loss()
    ran = [name for name in layers if seen[name].input]
    offsets = [seen[name].offset_output[0] for name in ran]
    gradients = differentiable_gradient(value, offsets) if offsets else ()
    bounds = {name: CompensationBound(name, 0.0, 0.0, 0.0) for name in layers}  # an expert that no token reaches: H = 0
    for name, offset, gradient in zip(ran, offsets, gradients, strict=True):
        pair, hidden = layers[name], seen[name].inflated[0].detach()
        weight = _exact(pair.inflated.weight)
        direction = top_subspace(weight, 1, layer_seed(seed, name)).basis[:, 0]  # b, shape [m]
        profile = (hidden.flatten(0, -2) @ direction.to(hidden)).unsqueeze(-1)  # p, shape [positions, 1]
        hessian = HessianProducts([gradient], [offset])

        def compressed(vector: Tensor, profile: Tensor = profile, hessian: HessianProducts = hessian) -> Tensor:
            return (profile * hessian((profile * vector).flatten()).view(len(profile), -1)).sum(0)

        start = torch.randn(pair.out_features, generator=torch.Generator().manual_seed(layer_seed(seed, name)))
        ritz = top_eigenpairs(compressed, start.to(hidden), max_products=50)
        bound = abs(float(ritz.values[0]))
        sigma = float(torch.linalg.vector_norm(direction @ weight))
        bounds[name] = CompensationBound(name, bound, sigma, bound / sigma**2 if sigma else 0.0)
    return bounds


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
    with _observed({layer: pair}) as seen:
        value = loss()
    observed = seen[layer]
    compensation, offset, reached = pair.compensation.weight, observed.offset_inflated[0], observed.input[0]
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


@contextmanager
def _observed(layers: dict[str, SpecDefLinear]) -> Iterator[dict[str, _Layer]]:
    """Run what is inside with every layer's input and hidden vector recorded, and zeros added to differentiate by.

    Raises:
        SpecDefError: A layer ran more than once, so that one offset does not stand for its weight.
    """
    seen = {name: _Layer() for name in layers}
    handles = []

    def offset(output: Tensor, kept: list[Tensor]) -> Tensor:
        kept.append(torch.zeros_like(output, requires_grad=True))
        return output + kept[-1]

    for name, pair in layers.items():

        def on_inflated(
            _: nn.Module, arguments: tuple[Tensor, ...], output: Tensor, each: _Layer = seen[name]
        ) -> Tensor:
            each.input.append(arguments[0])
            each.inflated.append(output)
            return offset(output, each.offset_inflated)

        def on_output(_: nn.Module, __: tuple[Tensor, ...], output: Tensor, each: _Layer = seen[name]) -> Tensor:
            return offset(output, each.offset_output)

        handles += [
            pair.inflated.register_forward_hook(on_inflated),
            pair.compensation.register_forward_hook(on_output),
        ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
    repeated = [name for name, each in seen.items() if len(each.input) > 1]
    if repeated:
        raise SpecDefError(
            f"{repeated[0]} runs {len(seen[repeated[0]].input)} times in one pass, and the bound is for a layer that "
            "runs once",
            "Give a batch and settings with one pass through each layer.",
        )


def _exact(weight: Tensor) -> Tensor:
    weight = weight.detach()
    return weight if weight.dtype == torch.float64 else weight.float()


def _unit(vector: Tensor) -> Tensor:
    return vector / torch.linalg.vector_norm(vector)
