"""Give the optimizer a fresh layer after every frozen pair."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from specdef_cli.attack.variants.growth import Growth
from specdef_cli.attack.variants.inserted_layers import GrownLayer, freeze, linear_like, replace_layers
from specdef_cli.runtime import SpecDefLinear


class InjectedLayer(GrownLayer):
    """y = I·pair(x): a trainable identity after a pair that the caller freezes."""

    def __init__(self, pair: SpecDefLinear) -> None:
        super().__init__(pair.in_features, pair.out_features, pair.weight)
        like = pair.inflated.weight
        self.pair = pair
        self.injected = linear_like(torch.eye(pair.out_features), like)

    def forward(self, input: Tensor) -> Tensor:
        return self.injected(self.pair(input))  # [..., n] → [..., m] → [..., m]


def inject(model: nn.Module) -> Growth:
    """Freeze every pair and put a trainable identity layer after it.

    Raises:
        NotApplicable: The model has no hardened layer.
    """

    def build(pair: SpecDefLinear) -> nn.Module:
        freeze(pair)
        return InjectedLayer(pair)

    return replace_layers(model, build)
