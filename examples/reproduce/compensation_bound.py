"""A lower bound of σ₁ of a hardened model's loss Hessian from its inflated weights, for a given batch.

A hardened layer is x ↦ y = W~x ↦ z = C y. The block of the Hessian by the compensation C carries α: for unit vectors
a, b and the direction a bᵀ, z changes by a (bᵀy) at every position, so

    (a bᵀ)ᵀ ∂²loss/∂C² (a bᵀ) = Σ_{t,s} p_t p_s aᵀ H_z[t,s] a,   p_t = bᵀW~x_t,

with H_z the Hessian by the layer's output. With b = u₁ and W~ = αW in that direction, p_t = α σ₁(W) v₁ᵀx_t, hence

    σ₁(H) ≥ α² σ₁(W)² · σ₁(Σ v₁ᵀx_t v₁ᵀx_s H_z[t,s]),

where the last factor, the *context*, belongs to the original function and does not change with α. This holds exactly in
every architecture, and is why the measured σ₁ grows as α² once it passes the original's. It also says what does not
grow: without C among the trained parameters no block carries α.

It is evaluated as |uᵀHu| at an explicit unit vector, so it is a lower bound even where a singular vector has not
converged, of σ₁ over any set of parameters that contains C. Theorem 3 of arXiv 2602.18868 bounds σ₁ by another block,
between C and what lies before W~, which grows as α alone (examples/reproduce/path_bound.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from specdef_cli.attack.variants.factored import hardened_layers
from specdef_cli.certify.curvature import HessianProducts, Loss, differentiable_gradient
from specdef_cli.errors import SpecDefError
from specdef_cli.model import SpecDefLinear
from specdef_cli.spectral.subspace import layer_seed, top_eigenpairs, top_subspace


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


@dataclass
class ObservedLayer:
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
    with observed(layers) as seen:
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


@contextmanager
def observed(layers: dict[str, SpecDefLinear]) -> Iterator[dict[str, ObservedLayer]]:
    """Run what is inside with every layer's input and hidden vector recorded, and zeros added to differentiate by.

    Raises:
        SpecDefError: A layer ran more than once, so that one offset does not stand for its weight.
    """
    seen = {name: ObservedLayer() for name in layers}
    handles = []

    def offset(output: Tensor, kept: list[Tensor]) -> Tensor:
        kept.append(torch.zeros_like(output, requires_grad=True))
        return output + kept[-1]

    for name, pair in layers.items():

        def on_inflated(
            _: nn.Module, arguments: tuple[Tensor, ...], output: Tensor, layer: ObservedLayer = seen[name]
        ) -> Tensor:
            layer.input.append(arguments[0])
            layer.inflated.append(output)
            return offset(output, layer.offset_inflated)

        def on_output(
            _: nn.Module, __: tuple[Tensor, ...], output: Tensor, layer: ObservedLayer = seen[name]
        ) -> Tensor:
            return offset(output, layer.offset_output)

        handles += [
            pair.inflated.register_forward_hook(on_inflated),
            pair.compensation.register_forward_hook(on_output),
        ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
    repeated = [name for name, layer in seen.items() if len(layer.input) > 1]
    if repeated:
        raise SpecDefError(
            f"{repeated[0]} runs {len(seen[repeated[0]].input)} times in one pass, and the bound is for a layer that "
            "runs once",
            "Give a batch and settings with one pass through each layer.",
        )


def _exact(weight: Tensor) -> Tensor:
    weight = weight.detach()
    return weight if weight.dtype == torch.float64 else weight.float()
