"""The paper's two factors of a weight, and the α that a dtype can hold (arXiv 2602.18868).

Two limits exist. *Range*: an inflated weight, and an activation that passes through it, must stay finite, and 1/α must
stay a normal number. *Rounding* (symmetric gauge only): W~ is rounded with relative error u, which directions that C
does not shrink see multiplied by α, so α·u bounds what is left of the function.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from specdef_cli.errors import SpecDefError, dtype_name
from specdef_cli.spectral import Gauge
from specdef_cli.spectral.subspace import product, row_blocks, transposed_product

# A relative error of y = C(W~x) above this is a different function, not rounding: bfloat16 weights alone give 2e-3.
RECONSTRUCTION_TOLERANCE = 1e-2
# Activations after an inflated layer are α times the ordinary ones, which reach some hundreds in trained models.
ACTIVATION_HEADROOM = 512.0


def largest_safe_alpha(gauge: Gauge, dtype: torch.dtype) -> float:
    """The largest α at which a layer stored in ``dtype`` still computes what it did.

    >>> largest_safe_alpha("symmetric", torch.bfloat16)
    2.0
    """
    info = torch.finfo(dtype)
    in_range = min(info.max / ACTIVATION_HEADROOM, 1 / info.tiny)
    if gauge == "rotated":
        return round_down(in_range)
    return round_down(min(in_range, RECONSTRUCTION_TOLERANCE / (info.eps / 2)))


def check_alpha(alpha: float, gauge: Gauge, dtype: torch.dtype, where: str = "") -> None:
    """Refuse an α that is not a number of at least 1, or that ``dtype`` cannot hold in this gauge.

    Args:
        where: Why that dtype, for the message: a clause in commas.
    """
    if not (math.isfinite(alpha) and alpha >= 1):
        raise SpecDefError(f"alpha is {alpha:g}; it must be a finite number of at least 1", "Give e.g. --alpha 1e4.")
    safe = largest_safe_alpha(gauge, dtype)
    if alpha > safe:
        others = []
        if gauge == "symmetric" and alpha <= largest_safe_alpha("rotated", dtype):
            others.append("--gauge rotated")
        # float32 keeps more digits than bfloat16, and has the same range.
        wider = torch.float32 if gauge == "symmetric" else torch.bfloat16
        if dtype is not wider and alpha <= largest_safe_alpha(gauge, wider):
            others.append(f"--dtype {dtype_name(wider)}")
        raise SpecDefError(
            f"alpha {alpha:g} would break the function in {dtype_name(dtype)}{where} with the {gauge} gauge",
            ", or ".join([f"Use --alpha {safe:g} or less", *others]) + ".",
        )


def round_down(value: float) -> float:
    """One significant digit, downwards: the limit is an estimate and is printed as one."""
    magnitude = 10 ** math.floor(math.log10(value))
    return math.floor(value / magnitude) * magnitude


PROBES = 16


@dataclass(frozen=True)
class Factors:
    """The two factors of W.

    Attributes:
        inflated: W~, shape [m, n]. Its top k singular values are α times W's, if U_k spans the top subspace.
        compensation: C, shape [m, m], with C W~ = W.
    """

    inflated: Tensor
    compensation: Tensor


def householder_completion(basis: Tensor) -> tuple[Tensor, Tensor]:
    """Complete k orthonormal columns to an orthogonal matrix, in compact WY form.

    Args:
        basis: U_k, shape [m, k], orthonormal columns.

    Returns:
        V [m, k] and T [k, k] such that Q = I − V T Vᵀ is orthogonal and its first k columns span U_k (each is ± the
        corresponding column of U_k).
    """
    packed, tau = torch.geqrf(basis)
    reflectors = packed.tril(-1)
    reflectors.diagonal().fill_(1)
    # tau = 0 stands for "no reflection" (a column that is a unit vector already).
    idle = tau == 0
    reflectors[:, idle] = 0
    inverse_tau = torch.where(idle, torch.ones_like(tau), 1 / torch.where(idle, torch.ones_like(tau), tau))
    inverse = (reflectors.mT @ reflectors).triu(1) + torch.diag(inverse_tau)
    identity = torch.eye(inverse.shape[0], dtype=basis.dtype, device=basis.device)
    return reflectors, torch.linalg.solve_triangular(inverse, identity, upper=True)


def rotated_factors(weight: Tensor, basis: Tensor, alpha: float, dtype: torch.dtype | None = None) -> Factors:
    """W~ = D Qᵀ W and C = Q D⁻¹ of W [m, n], computed in the precision of the orthonormal ``basis`` U_k [m, k].

    Args:
        dtype: What the factors are stored in; ``None`` keeps the precision of the computation.
    """
    top_k = basis.shape[1]
    reflectors, compact = householder_completion(basis)
    scales = basis.new_ones(basis.shape[0])  # the diagonal of D
    scales[:top_k] = alpha
    projected = transposed_product(reflectors, weight)  # Vᵀ W, [k, n]
    return Factors(
        _inflated(weight, -reflectors, compact.mT @ projected, scales, dtype or basis.dtype),
        _compensation(-reflectors, compact @ reflectors.mT, scales, dtype or basis.dtype),
    )


def symmetric_factors(weight: Tensor, basis: Tensor, alpha: float, dtype: torch.dtype | None = None) -> Factors:
    """W~ = (I + (α−1)P) W and C = I − (1−1/α)P, computed in float64, which they keep where ``dtype`` is ``None``.

    ``basis`` is orthonormalized again in float64: the error of C W~ = W is α times the defect of its orthogonality.
    """
    exact = torch.linalg.qr(basis.double()).Q
    unscaled = exact.new_ones(exact.shape[0])
    projected = transposed_product(exact, weight)  # U_kᵀ W, [k, n]
    return Factors(
        _inflated(weight, (alpha - 1) * exact, projected, unscaled, dtype or exact.dtype),
        _compensation(-(1 - 1 / alpha) * exact, exact.mT, unscaled, dtype or exact.dtype),
    )


def _inflated(weight: Tensor, left: Tensor, right: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """D(W + L R), rounded to ``dtype`` once."""
    inflated = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for rows in row_blocks(*weight.shape):
        inflated[rows] = torch.addmm(weight[rows].to(left.dtype), left[rows], right).mul_(scales[rows, None])
    return inflated


def _compensation(left: Tensor, right: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """(I + L R)D⁻¹, rounded to ``dtype`` once."""
    size = len(scales)
    compensation = torch.empty(size, size, dtype=dtype, device=left.device)
    for rows in row_blocks(size, size):
        block = left[rows] @ right
        block.diagonal(rows.start).add_(1)
        compensation[rows] = block.div_(scales)
    return compensation


def reconstruction_error(reference: Tensor, factors: Factors, probes: Tensor) -> float:
    """‖C(W~X) − WX‖_F / ‖WX‖_F through stored factors.

    The product W~X is rounded to the stored dtype before C is applied, as it is when the model runs.

    Args:
        reference: W X, shape [m, p], float32 or better.
    """
    hidden = product(factors.inflated, probes).to(factors.inflated.dtype).to(probes.dtype)
    restored = product(factors.compensation, hidden)
    norm = torch.linalg.vector_norm(reference)
    return float(torch.linalg.vector_norm(restored - reference) / norm)


def gaussian_probes(columns: int, seed: int, device: torch.device) -> Tensor:
    """X, shape [columns, PROBES], float32, drawn on the CPU so that every device uses the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(columns, PROBES, generator=generator).to(device)
