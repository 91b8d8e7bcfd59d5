"""σ₁ of the loss Hessian of the tiny Llama against α, measured, and the two lower bounds from its inflated weights.

python examples/reproduce/curvature.py
"""

from __future__ import annotations

from dataclasses import dataclass

from compensation_bound import compensation_bounds
from path_bound import path_bound
from setting import RESIDUAL_WRITERS, attack_batch, insert, markdown, slope, tiny_llama

from specdef_cli.certify.curvature import Curvature, hessian_top, model_loss, trainable

ALPHAS = (1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6)
TOP_KS = (25, 1)
SEQUENCES, LENGTH = 2, 64


@dataclass(frozen=True)
class Point:
    """One hardened model.

    Attributes:
        measured: Over all parameters.
        frozen: Over all but the compensations.
        compensation: The largest compensation bound.
        layer: Where that is.
        path: Theorem 3's bound at the same layer.
    """

    alpha: float
    top_k: int
    measured: Curvature
    frozen: Curvature
    compensation: float
    layer: str
    path: float


def measure(alpha: float, top_k: int) -> Point:
    """Harden every o_proj and down_proj, and measure."""
    model = tiny_llama()
    pairs = insert(model, RESIDUAL_WRITERS, alpha, top_k)
    loss = model_loss(model, attack_batch(SEQUENCES, LENGTH))
    measured = hessian_top(loss, list(trainable(model).values()))
    bounds = compensation_bounds(model, loss)
    best = max(bounds.values(), key=lambda bound: bound.value)
    path = path_bound(model, loss, best.layer)
    assert path is not None
    for pair in pairs.values():
        pair.compensation.weight.requires_grad_(False)
    frozen = hessian_top(loss, list(trainable(model).values()))
    return Point(alpha, top_k, measured, frozen, best.value, best.layer, path.value)


def main() -> None:
    """Measure, print a Markdown table and the slopes."""
    points = [measure(alpha, top_k) for top_k in TOP_KS for alpha in ALPHAS]
    rows = [
        (
            f"{point.top_k}",
            f"{point.alpha:.0e}",
            f"{point.measured.value:.4g}",
            f"{point.measured.residual:.0e}",
            f"{point.frozen.value:.4g}",
            f"{point.compensation:.4g}",
            f"{point.compensation / point.measured.value:.2g}",
            f"{point.path:.4g}",
            f"{point.path / point.measured.value:.1g}",
            point.layer.removeprefix("model.layers."),
        )
        for point in points
    ]
    header = ("k", "α", "σ₁ measured", "residual", "C frozen", "bound C", "ratio", "bound path", "ratio", "layer")
    print(markdown(header, rows))
    for top_k in TOP_KS:
        large = [point for point in points if point.top_k == top_k and point.alpha >= 1e3]
        alphas = [point.alpha for point in large]
        slopes = {
            "measured": [point.measured.value for point in large],
            "compensation bound": [point.compensation for point in large],
            "path bound": [point.path for point in large],
            "compensations frozen": [point.frozen.value for point in large],
        }
        print(f"\nk = {top_k}, slope of log σ₁ over log α from α = 10³: ", end="")
        print(", ".join(f"{name} {slope(alphas, values):.3f}" for name, values in slopes.items()) + ".")


if __name__ == "__main__":
    main()
