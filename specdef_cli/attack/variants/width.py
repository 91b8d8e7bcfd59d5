"""Give the optimizer fresh parameters beside every frozen pair, or beside every frozen block of a fold."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from specdef_cli.attack.variants.beside import grow_beside
from specdef_cli.attack.variants.growth import Growth
from specdef_cli.attack.variants.inserted_layers import (
    GrownLayer,
    count_parameters,
    freeze,
    replace_layers,
)
from specdef_cli.runtime import SpecDefLinear


class WidenedLayer(GrownLayer):
    """y = pair(x) + up(down(x)), ``up`` zero at first.

    Args:
        pair: n → m; frozen by the caller.
        width: w, the path's inner dimension.
        generator: Draws ``down`` on the CPU, so that the path is the same on every device.
    """

    def __init__(self, pair: SpecDefLinear, width: int, generator: torch.Generator) -> None:
        super().__init__(pair.in_features, pair.out_features, pair.weight)
        like = pair.inflated.weight
        self.pair = pair
        self.down = nn.Linear(pair.in_features, width, bias=False, device="meta")
        self.up = nn.Linear(width, pair.out_features, bias=False, device="meta")
        # Rows of norm about 1: ‖down(x)‖ ≈ ‖x‖·√(w/n), so the path trains at the original's scale, not at α's.
        down = torch.randn(width, pair.in_features, generator=generator) / math.sqrt(pair.in_features)
        self.down.weight = nn.Parameter(down.to(like.device, like.dtype))
        self.up.weight = nn.Parameter(torch.zeros(pair.out_features, width, device=like.device, dtype=like.dtype))

    def forward(self, input: Tensor) -> Tensor:
        return self.pair(input) + self.up(self.down(input))  # [..., n] → [..., w] → [..., m]


def widen(model: nn.Module, factor: float = 2.0, *, seed: int = 0) -> Growth:
    """Freeze every pair and set a fresh trainable path beside it; beside every block where nothing was inserted.

    The path's width is the smallest that makes the hardened layers at least ``factor`` times as large: w(n+m) ≥
    (factor−1)(mn + m² + bias). For ``factor`` = 2 that is w = m (one more with a bias), so the path can express any
    change of W.

    Args:
        model: Changed in place.
        factor: > 1.
        seed: Of the path's first factor; the second is zero.

    Raises:
        NotApplicable: The model has neither a hardened layer nor a block that could be made afresh.
    """
    if not any(isinstance(module, SpecDefLinear) for module in model.modules()):
        return grow_beside(model, factor, seed)
    generator = torch.Generator().manual_seed(seed)

    def build(pair: SpecDefLinear) -> nn.Module:
        freeze(pair)
        width = math.ceil((factor - 1) * count_parameters(pair) / (pair.in_features + pair.out_features))
        return WidenedLayer(pair, width, generator)

    return replace_layers(model, build)
