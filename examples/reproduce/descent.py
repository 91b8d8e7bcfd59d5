"""The learning rate at which plain gradient descent is seen to diverge, to compare with 2/σ₁ of the Hessian."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from specdef_cli.certify.curvature import Loss

BISECTION_RATIO = 1.05
"""The rate at which descent diverges is located to within this factor, where no other is asked for."""

HEADROOM = 16
"""The search for that rate begins this many times above 2/σ₁: networks let descent go on up to some times it."""

SEARCHED = 1e9
"""The search ends this many times above, or below, the rate that it was given."""


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
