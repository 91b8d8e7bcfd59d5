"""Theorem 8: σ₁ of the factors and of the loss Hessian when each inflated weight is replaced by N trainable factors.

The theorem is about the bound by a single factor, α^{1/N}. The Hessian sees the product of the others: with the
compensation C frozen, ΔF_i changes the layer's output by C F_N ⋯ F_{i+1} ΔF_i F_{i−1} ⋯ F_1 x. The side before it
carries α^{(i−1)/N}; the side behind it carries none in the directions that C does not shrink. So the last factor's
block grows as α^{2(N−1)/N}: not at all for N = 1 (C frozen, nothing else), as α for N = 2, and faster for more.

    python examples/reproduce/injection.py
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from setting import RESIDUAL_WRITERS, attack_batch, insert, markdown, slope, tiny_llama

from specdef_cli.attack.variants.factored import DeepenedLayer, collapse, deepen, freeze_compensation
from specdef_cli.certify.curvature import Curvature, hessian_top, model_loss, trainable

ALPHAS = (1e2, 1e3, 1e4, 1e5)
FACTORS = (0, 1, 2, 3, 4)
"""Per inflated weight. 0 stands for the hardened model as it is published, 1 for that with compensations frozen."""
TOP_K = 1


@dataclass(frozen=True)
class Point:
    """One expanded model.

    Attributes:
        factor_sigma: The largest σ₁ of any inflated weight or factor.
        product_error: Largest relative error of a layer's product of factors.
    """

    alpha: float
    factors: int
    factor_sigma: float
    curvature: Curvature
    product_error: float


def measure(alpha: float, factors: int) -> Point:
    """Harden every o_proj and down_proj, expand, and measure over what trains."""
    model = tiny_llama()
    pairs = insert(model, RESIDUAL_WRITERS, alpha, TOP_K)
    inflated = {name: pair.inflated.weight.detach() for name, pair in pairs.items()}
    sigma, error = max(_sigma(weight) for weight in inflated.values()), 0.0
    if factors == 1:
        freeze_compensation(model)
    elif factors > 1:
        deepen(model, factors)
        deepened = {name: module for name, module in model.named_modules() if isinstance(module, DeepenedLayer)}
        weights = {
            name: [factor.get_parameter("weight").detach() for factor in layer.factors]
            for name, layer in deepened.items()
        }
        sigma = max(_sigma(weight) for parts in weights.values() for weight in parts)
        error = max(
            _sigma(torch.linalg.multi_dot(parts[::-1]) - inflated[name]) / _sigma(inflated[name])
            for name, parts in weights.items()
        )
    curvature = hessian_top(model_loss(model, attack_batch(1, 64)), list(trainable(model).values()))
    return Point(alpha, factors, sigma, curvature, error)


def collapsed() -> float:
    """σ₁ of the Hessian after C·W~ is multiplied out: the original's."""
    model = tiny_llama()
    insert(model, RESIDUAL_WRITERS, ALPHAS[-1], TOP_K)
    collapse(model)
    return hessian_top(model_loss(model, attack_batch(1, 64)), list(trainable(model).values())).value


def main() -> None:
    """Measure and print a Markdown table."""
    original = collapsed()
    rows = []
    for factors in FACTORS:
        points = [measure(alpha, factors) for alpha in ALPHAS]
        values = [point.curvature.value for point in points]
        expected = 2 if factors == 0 else 2 * (factors - 1) / factors
        name = {0: "as published", 1: "C frozen"}.get(factors, f"N = {factors}")
        rows.append(
            (
                name,
                *(f"{value:.3g}" for value in values),
                f"{slope(ALPHAS, values):.3f}",
                f"{expected:.3f}",
                f"{slope(ALPHAS, [point.factor_sigma for point in points]):.3f}",
                f"{1 / max(1, factors):.3f}",
                f"{max(point.curvature.residual for point in points):.0e}",
                f"{max(point.product_error for point in points):.0e}",
            )
        )
    header = (
        "inflated weight",
        *(f"σ₁(H), α = {alpha:.0e}" for alpha in ALPHAS),
        "slope",
        "2(N−1)/N",
        "slope of the factors' σ₁",
        "1/N",
        "worst residual",
        "product error",
    )
    print(markdown(header, rows))
    print(f"\nCollapsed (C·W~ multiplied out): σ₁(H) = {original:.3g}, whatever α.")


def _sigma(weight: torch.Tensor) -> float:
    return float(torch.linalg.matrix_norm(weight, 2))


if __name__ == "__main__":
    main()
