"""σ₁ of the loss Hessian, and the learning rate at which plain gradient descent is seen to diverge.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from specdef_cli.dtypes import dtype_name
from specdef_cli.errors import SpecDefError, first_line
from specdef_cli.spectral.lanczos import norm, top_eigenpairs

Loss = Callable[[], Tensor]
"""Runs the model on a fixed batch and returns the mean loss, shape []."""

TOLERANCE = 1e-3
"""‖Hv − λv‖/|λ| that is asked for; λ is then off by at most this share, and by its square where a gap follows."""

MAX_PRODUCTS = 100

BISECTION_RATIO = 1.05
"""The rate at which descent diverges is located to within this factor, where no other is asked for."""

HEADROOM = 16
"""The search for that rate begins this many times above 2/σ₁: networks let descent go on up to some times it."""

SEARCHED = 1e9
"""The search ends this many times above, or below, the rate that it was given."""


@dataclass(frozen=True)
class Curvature:
    """The eigenvalue of largest modulus of a loss Hessian.

    Attributes:
        eigenvalue: λ, with its sign: vᵀHv for the unit vector v that was found. Converged or not, |λ| ≤ σ₁.
        residual: ‖Hv − λv‖/|λ|, from a product that was taken for it alone. There is an eigenvalue within this share
            of λ. 0 where the Hessian is zero.
        converged: Whether the residual is within the tolerance that was asked for.
        products: Hessian-vector products that this took.
        parameters: The Hessian's side: the number of parameters it is taken over.
    """

    eigenvalue: float
    residual: float
    converged: bool
    products: int
    parameters: int

    @property
    def value(self) -> float:
        """σ₁ = |λ|."""
        return abs(self.eigenvalue)


@dataclass(frozen=True)
class DivergenceRate:
    """Where plain gradient descent was seen to turn from stable to divergent.

    Attributes:
        stable: The largest learning rate tried that did not diverge; 0 where all did.
        divergent: The smallest that did; infinite where none did.
        steps: Steps of each trial.
    """

    stable: float
    divergent: float
    steps: int

    @property
    def value(self) -> float:
        """The geometric mean of both, or the one that is a positive number."""
        if self.stable == 0 or math.isinf(self.divergent):
            return self.stable or self.divergent
        return math.sqrt(self.stable * self.divergent)


def hessian_top(
    loss: Loss,
    parameters: Sequence[Tensor],
    *,
    tolerance: float = TOLERANCE,
    max_products: int = MAX_PRODUCTS,
    seed: int = 0,
) -> Curvature:
    """σ₁ of the Hessian of ``loss`` over ``parameters``.

    Args:
        loss: Called once. For a model, see :func:`model_loss`.
        parameters: Leaves of the loss that require gradients, all of one dtype; ones that it does not use count as flat
            directions.
        tolerance: Relative residual that counts as converged.
        max_products: Hessian-vector products that may be taken; memory is some 26 vectors of the parameters' size.
        seed: Of the start vector.

    Raises:
        SpecDefError: There is no parameter or it has 16 bits, the loss is not finite, or it has no second derivative.
    """
    (curvature,) = hessian_top_by_group(
        loss, {"all": parameters}, tolerance=tolerance, max_products=max_products, seed=seed
    ).values()
    return curvature


def hessian_top_by_group(
    loss: Loss,
    groups: Mapping[str, Sequence[Tensor]],
    *,
    tolerance: float = TOLERANCE,
    max_products: int = MAX_PRODUCTS,
    seed: int = 0,
    on_group: Callable[[str], None] = lambda _: None,
) -> dict[str, Curvature]:
    """σ₁ of one diagonal block of the Hessian per group of parameters, for models too large for the whole.

    By Cauchy's interlacing theorem the whole Hessian's σ₁ is at least the largest of these. The graph of one forward
    pass serves all groups.

    Args:
        loss: Called once.
        groups: Parameters by name of the group, e.g. from :func:`groups_by_layer`.
        tolerance, max_products, seed: As for :func:`hessian_top`, for each group.
        on_group: Called with a group's name before it is measured.

    Raises:
        SpecDefError: As :func:`hessian_top`.
    """
    parameters = list({id(parameter): parameter for members in groups.values() for parameter in members}.values())
    gradients = dict(zip(map(id, parameters), differentiable_gradient(loss(), parameters), strict=True))
    curvatures = {}
    for name, members in groups.items():
        on_group(name)
        if not members:
            raise SpecDefError(f"the group {name!r} has no parameter", "Choose parameters that exist and train.")
        products = HessianProducts([gradients[id(parameter)] for parameter in members], members)
        generator = torch.Generator().manual_seed(seed)
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

    Args:
        model: In evaluation mode, so that no dropout makes the loss random.
        batch: Keyword arguments of its ``forward``.
    """

    def loss() -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            value: Tensor = model(**batch).loss
        return value

    return loss


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name."""
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


def observed_divergence_rate(
    loss: Loss,
    parameters: Sequence[Tensor],
    *,
    around: float,
    steps: int = 100,
    growth: float = 2.0,
    ratio: float = BISECTION_RATIO,
) -> DivergenceRate:
    """The learning rate at which plain full-batch gradient descent diverges.

    A trial *diverges* when its loss stops being finite or exceeds ``growth`` times the start's modulus. The descent
    from 2/σ₁ need not diverge right there: where the loss is not quadratic, a rate somewhat above it can throw the
    parameters into a flatter region and converge ("catapult", Lewkowycz et al., arXiv 2003.02218), and a rate below it
    can fail when the Hessian grows on the way.

    Rates are tried from above: one that diverges shows it within a few steps, one that is stable takes all of them.

    Args:
        loss: Called for every step. The parameters are put back before this returns.
        parameters: What is trained.
        around: Where the search begins, e.g. 2/σ₁: a few times above it.
        steps: Steps of each trial.
        growth: How many times the start's loss counts as divergence.
        ratio: The search ends once a stable and a divergent rate are within this factor of each other.
    """
    start = loss()
    limit = growth * abs(float(start.detach()))
    first_gradients = torch.autograd.grad(start, parameters, materialize_grads=True)

    def diverges(rate: float) -> bool:
        gradients = first_gradients
        with restored(parameters):
            for remaining in reversed(range(steps)):
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, gradients, strict=True):
                        parameter.sub_(gradient, alpha=rate)
                with torch.set_grad_enabled(remaining > 0):
                    value = loss()
                if not float(value.detach()) <= limit:  # NaN fails this too
                    return True
                if remaining:
                    gradients = torch.autograd.grad(value, parameters, materialize_grads=True)
        return False

    stable, divergent = 0.0, around * HEADROOM
    while not diverges(divergent):
        stable = divergent
        if stable >= around * SEARCHED:
            return DivergenceRate(stable, math.inf, steps)
        divergent *= 4
    while divergent > around / SEARCHED:
        for rate in bisection_rates(divergent / 4, divergent, ratio):
            if rate == stable or not diverges(rate):
                return DivergenceRate(rate, divergent, steps)
            divergent = rate
    return DivergenceRate(0.0, divergent, steps)


def bisection_rates(low: float, high: float, ratio: float) -> Iterator[float]:
    """The rates of all bisections of [low, high], from above: down to ``low``, and neighbours within ``ratio``."""
    if high / low <= ratio:
        yield low
        return
    middle = math.sqrt(low * high)
    yield from bisection_rates(middle, high, ratio)
    yield from bisection_rates(low, middle, ratio)


class HessianProducts:
    """v ↦ Jᵀv for the Jacobian J of ``gradients`` by ``variables``, through a graph that is kept for the next product.

    Args:
        gradients: First derivatives, with their graph.
        variables: What they are differentiated by once more.
    """

    def __init__(self, gradients: Sequence[Tensor], variables: Sequence[Tensor]) -> None:
        self.gradients = gradients
        self.variables = variables
        self.like = variables[0].detach()
        self.size = sum(variable.numel() for variable in variables)

    def __call__(self, vector: Tensor) -> Tensor:
        """Jᵀv: shape [outputs] → [variables]. With g = ∇loss over the same variables, Hv.

        Raises:
            SpecDefError: The graph cannot be differentiated a second time.
        """
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
    """∇ of a scalar, with the graph that a second derivative needs.

    Raises:
        SpecDefError: There are no variables or they have 16 bits, or the value is not finite or depends on nothing that
            trains.
    """
    if not variables:
        raise SpecDefError("there is no parameter to take the Hessian over", "Choose parameters that exist and train.")
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


@contextmanager
def restored(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Put the parameters' values back afterwards."""
    before = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(value)
