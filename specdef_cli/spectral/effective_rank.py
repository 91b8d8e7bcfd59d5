"""How many directions a matrix uses."""

from __future__ import annotations

import torch
from torch import Tensor

PROBES = 64


def effective_rank(weight: Tensor, seed: int) -> float:
    """(Σσ²)²/Σσ⁴, the participation ratio of the squared singular values, between 1 and the rank.

    Σσ⁴ = ‖W Wᵀ‖_F² is estimated with Gaussian probes (Hutchinson), so that no decomposition is needed; where the
    matrix is no larger than the probes it is exact.

    Args:
        weight: W, shape [m, n].
    """
    total = weight.double().square().sum()
    rows = weight.shape[0]
    if min(weight.shape) <= PROBES * 4:
        gram = weight.double() @ weight.double().mT if rows <= weight.shape[1] else weight.double().mT @ weight.double()
        return float(total**2 / gram.square().sum())
    generator = torch.Generator().manual_seed(seed)
    probes = torch.randn(rows, PROBES, generator=generator).to(weight.device, weight.dtype)
    fourth = (weight @ (weight.mT @ probes)).double().square().sum() / PROBES
    return float(total**2 / fourth)
