"""σ₁ of the loss Hessian, of any loss and of a checkpoint's; plain gradient descent is stable up to 2/σ₁.

Gradient descent with rate η multiplies the component of the parameters along an eigenvector of the Hessian by 1 − ηλ,
so on a quadratic it diverges exactly above 2/σ₁ (for λ > 0). The Hessian is never formed: one product Hv is a second
backward pass through the gradient (Pearlmutter, "Fast Exact Multiplication by the Hessian", Neural Computation 6,
1994), and Lanczos needs some tens of them. All products share one graph, so there is one forward pass.

Precision: a product in float32 carries an error of about 1e-7·σ₁, whatever the direction. That is enough for σ₁ itself;
what it does to the pair is in the reported residual. Blocks that are smaller than 1e-7 of the largest are noise in
float32, and a model hardened with a large α has such blocks: load tiny models in float64. Norms and eager attention's
softmax stay in float32 even then: transformers casts to it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from specdef_cli.errors import SpecDefError, dtype_name, first_line
from specdef_cli.spectral.subspace import norm, top_eigenpairs

Loss = Callable[[], Tensor]
"""Runs the model on a fixed batch and returns the mean loss, shape []."""

TOLERANCE = 1e-3
"""‖Hv − λv‖/|λ| that is asked for; λ is then off by at most this share, and by its square where a gap follows."""

MAX_PRODUCTS = 100

MAX_FOR_DOUBLE = 5_000_000
"""Parameters up to which float64 is used."""

MAX_FOR_WHOLE = 100_000_000
"""Parameters up to which the whole Hessian is taken; beyond, its diagonal blocks, one for each layer."""

MEMORY_PER_PARAMETER = 4 * 30
"""Bytes: Lanczos keeps some 26 vectors, and the graph of the gradient comes on top."""

ROUGH, ROUGH_PRODUCTS = 0.1, 5
"""Tolerance and products with which every block is measured; the largest is then measured to the usual tolerance."""


@dataclass(frozen=True)
class Curvature:
    """The eigenvalue of largest modulus of a loss Hessian."""

    eigenvalue: float
    """λ, with its sign: vᵀHv for the unit vector v that was found. Converged or not, |λ| ≤ σ₁."""
    residual: float
    """‖Hv − λv‖/|λ|, from a product that was taken for it alone. There is an eigenvalue within this share of λ. 0 where
    the Hessian is zero."""
    converged: bool
    """Whether the residual is within the tolerance that was asked for."""
    products: int
    """Hessian-vector products that this took."""
    parameters: int
    """The Hessian's side: the number of parameters it is taken over."""

    @property
    def value(self) -> float:
        """σ₁ = |λ|."""
        return abs(self.eigenvalue)


def hessian_top(
    loss: Loss,
    parameters: Sequence[Tensor],
    *,
    tolerance: float = TOLERANCE,
    max_products: int = MAX_PRODUCTS,
) -> Curvature:
    """σ₁ of the Hessian of ``loss`` over ``parameters``.

    Args:
        parameters: Leaves of the loss that require gradients, all of one dtype; ones that it does not use count as flat
            directions.
        max_products: Hessian-vector products that may be taken; memory is some 26 vectors of the parameters' size.
    """
    (curvature,) = hessian_top_by_group(
        loss, {"all": parameters}, tolerance=tolerance, max_products=max_products
    ).values()
    return curvature


def hessian_top_by_group(
    loss: Loss,
    groups: Mapping[str, Sequence[Tensor]],
    *,
    tolerance: float = TOLERANCE,
    max_products: int = MAX_PRODUCTS,
    on_group: Callable[[str], None] = lambda _: None,
) -> dict[str, Curvature]:
    """σ₁ of one diagonal block of the Hessian per group of parameters, for models too large for the whole.

    By Cauchy's interlacing theorem the whole Hessian's σ₁ is at least the largest of these. The graph of one forward
    pass serves all groups.

    Args:
        groups: Parameters by name of the group, e.g. from :func:`groups_by_layer`.
    """
    parameters = list({id(parameter): parameter for members in groups.values() for parameter in members}.values())
    gradients = dict(zip(map(id, parameters), differentiable_gradient(loss(), parameters), strict=True))
    curvatures = {}
    for name, members in groups.items():
        on_group(name)
        if not members:
            raise SpecDefError(f"the group {name!r} has no parameter", "Choose parameters that exist and train.")
        products = HessianProducts([gradients[id(parameter)] for parameter in members], members)
        generator = torch.Generator().manual_seed(0)
        start = torch.randn(products.size, generator=generator, dtype=torch.float64)
        # Half the tolerance: the recurrence only estimates the residual, and rounding comes on top.
        pairs = top_eigenpairs(
            products, start.to(products.like), tolerance=tolerance / 2, max_products=max(1, max_products - 1)
        )
        vector = pairs.vectors[0]
        image = products(vector)
        eigenvalue = float(vector @ image)
        distance = norm(image - eigenvalue * vector)
        residual = distance / abs(eigenvalue) if eigenvalue else (math.inf if distance else 0.0)
        curvatures[name] = Curvature(eigenvalue, residual, residual <= tolerance, pairs.products + 1, products.size)
    return curvatures


def model_loss(model: nn.Module, batch: Mapping[str, Any]) -> Loss:
    """The loss of a transformers model on a batch that carries its labels, differentiable twice.

    PyTorch's fused attention kernels have no second derivative; they are switched off, so that models with
    ``attn_implementation="eager"`` and ``"sdpa"`` both work.
    """

    def loss() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            value: Tensor = model(**batch).loss
        return value

    return loss


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def groups_by_layer(model: nn.Module) -> dict[str, list[Tensor]]:
    """Trainable parameters by the layer that holds them: ``model.layers.3.mlp.up_proj.weight`` is in
    ``model.layers.3``; what is in no numbered layer is grouped by its module.
    """
    groups: dict[str, list[Tensor]] = {}
    for name, parameter in trainable(model).items():
        numbered = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
        groups.setdefault(numbered[0] if numbered else name.rpartition(".")[0], []).append(parameter)
    return groups


def largest_stable_rate(curvature: Curvature) -> float:
    """2/σ₁: the learning rate above which gradient descent leaves the quadratic approximation of the loss. Infinite
    where the Hessian is zero.
    """
    return 2 / curvature.value if curvature.value else math.inf


class HessianProducts:
    """v ↦ Jᵀv for the Jacobian J of ``gradients`` by ``variables``, through a graph kept for the next product."""

    def __init__(self, gradients: Sequence[Tensor], variables: Sequence[Tensor]) -> None:
        self.gradients = gradients
        self.variables = variables
        self.like = variables[0].detach()
        self.size = sum(variable.numel() for variable in variables)

    def __call__(self, vector: Tensor) -> Tensor:
        """Jᵀv: shape [outputs] → [variables]. With g = ∇loss over the same variables, Hv."""
        cotangents = split_like(vector, self.gradients)
        # What the loss is linear in has a gradient without a graph: its second derivative is zero.
        live = [pair for pair in zip(self.gradients, cotangents, strict=True) if pair[0].requires_grad]
        if not live:
            return self.like.new_zeros(self.size)
        outputs, directions = zip(*live, strict=True)
        try:
            second = torch.autograd.grad(outputs, self.variables, directions, retain_graph=True, materialize_grads=True)
        except RuntimeError as error:
            raise SpecDefError(
                f"the model has no second derivative: {first_line(error)}",
                "Load it with attn_implementation='eager'.",
            ) from error
        return torch.cat([product.detach().flatten() for product in second])


def differentiable_gradient(value: Tensor, variables: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """∇ of a scalar, with the graph that a second derivative needs."""
    if not variables:
        raise SpecDefError("no trainable parameter found for the Hessian", "Choose parameters that exist and train.")
    for variable in variables:
        if variable.dtype not in (torch.float32, torch.float64):
            name = dtype_name(variable.dtype)
            raise SpecDefError(f"the Hessian cannot be measured in {name}", "Load the model in float32 or float64.")
    if not torch.isfinite(value):
        raise SpecDefError(
            f"the loss is {float(value.detach()):g}, and the Hessian does not exist there",
            "Check the batch and the dtype: float32 or float64 holds what float16 cannot.",
        )
    if not value.requires_grad:
        raise SpecDefError("the loss depends on no parameter that trains", "Leave requires_grad on for some.")
    return torch.autograd.grad(value, variables, create_graph=True, materialize_grads=True)


def split_like(vector: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """A vector as views with the shapes of ``tensors``."""
    parts = vector.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


@dataclass(frozen=True)
class CurvatureFigures:
    """The curvature of one checkpoint's loss on a small batch."""

    top: Curvature
    """Of the whole Hessian, or the largest of its diagonal blocks."""
    block: str | None
    """Which block that is; ``None`` for the whole."""
    largest_stable_rate: float
    """2/σ₁."""


def measure_curvature(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    device: torch.device | str = "cpu",
    on_block: Callable[[str], None] = lambda _: None,
) -> CurvatureFigures | str:
    """The figures of one causal language model, or why they were not measured.

    Args:
        model: It is left in another dtype, and on ``device``.
        tokens: int64, shape [sequences, length]: the batch.
        device: Without float64 there, everything is measured in float32.
    """
    model.to(device=torch.device(device), dtype=torch.float32)
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # others take no float64
    count = sum(parameter.numel() for parameter in model.parameters())
    on_gpu = model.device.type == "cuda"
    available = torch.cuda.mem_get_info(model.device)[0] if on_gpu else psutil.virtual_memory().available
    if count * MEMORY_PER_PARAMETER > available and count <= MAX_FOR_WHOLE:
        needed = count * MEMORY_PER_PARAMETER
        return f"it takes about {needed / 1e9:.1f} GB and {available / 1e9:.1f} GB of memory are free"
    double = count <= MAX_FOR_DOUBLE and model.device.type != "mps"
    module: nn.Module = model.double() if double else model
    tokens = tokens.to(model.device)
    loss = model_loss(module, {"input_ids": tokens, "labels": tokens})
    if count <= MAX_FOR_WHOLE:
        block, top = None, hessian_top(loss, list(trainable(module).values()))
    else:
        groups = groups_by_layer(module)
        rough = hessian_top_by_group(loss, groups, tolerance=ROUGH, max_products=ROUGH_PRODUCTS, on_group=on_block)
        block = max(rough, key=lambda name: rough[name].value)
        top = hessian_top_by_group(loss, {block: groups[block]})[block]
    return CurvatureFigures(top, block, largest_stable_rate(top))
