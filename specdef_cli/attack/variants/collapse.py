"""The attack that undoes insertion: multiply the pair, C·W~ = W (arXiv 2602.18868, Section 4)."""

from __future__ import annotations

import torch
from torch import nn

from specdef_cli.attack.variants.growth import Growth
from specdef_cli.attack.variants.inserted_layers import linear_like, replace_layers
from specdef_cli.runtime import SpecDefLinear


def collapse(model: nn.Module) -> Growth:
    """Multiply every pair, C·W~ = W, and put a plain linear layer in its place.

    The product is formed in float64 where the device has it, so that what is lost is only what storing the factors
    had lost.

    Raises:
        NotApplicable: The model has no hardened layer.
    """

    def build(pair: SpecDefLinear) -> nn.Module:
        like = pair.inflated.weight
        exact = torch.float64 if like.device.type in ("cpu", "cuda") else torch.float32
        product = pair.compensation.weight.detach().to(exact) @ like.detach().to(exact)  # [m, m] [m, n] → [m, n]
        linear = linear_like(product, like)
        linear.bias = pair.compensation.bias
        return linear

    return replace_layers(model, build)
