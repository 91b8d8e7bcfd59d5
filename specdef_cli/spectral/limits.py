"""How large α may be before the stored dtype breaks the function.

Two limits exist. *Range*: an inflated weight, and an activation that passes through it, must stay finite, and 1/α must
stay a normal number. *Rounding* (symmetric gauge only): W~ is rounded with relative error u, which directions that C
does not shrink see multiplied by α, so α·u bounds what is left of the function.
"""

from __future__ import annotations

import math

import torch

from specdef_cli.dtypes import dtype_name
from specdef_cli.errors import SpecDefError
from specdef_cli.spectral.gauges import Gauge

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
