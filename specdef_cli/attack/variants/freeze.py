"""Leave the compensation out of the training."""

from __future__ import annotations

from torch import nn

from specdef_cli.attack.variants.growth import Growth
from specdef_cli.attack.variants.inserted_layers import replace_layers
from specdef_cli.runtime import SpecDefLinear


def freeze_compensation(model: nn.Module) -> Growth:
    """Freeze every compensation weight. Its bias is the original layer's and goes on training.

    Raises:
        NotApplicable: The model has no hardened layer.
    """

    def build(pair: SpecDefLinear) -> nn.Module:
        pair.compensation.weight.requires_grad_(False)
        return pair

    return replace_layers(model, build)
