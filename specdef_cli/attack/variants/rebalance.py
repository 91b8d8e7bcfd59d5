"""What an attacker who knows of folding does first: equalize both sides of every symmetric pair.

A fold multiplies some channels of a pair by a large power of two and divides their partners by it. That is an exact
symmetry of the function, so nothing forces an attacker to keep it. From the weights alone, without manifest or data,
the scale of each channel can be read off: how much larger one side is than its channels usually are, against how much
smaller the other side is. Dividing it out is as exact as the fold was, and gives back a model that trains like the
original. This is to folding what collapsing is to inserted layers (arXiv 2602.18868, Section 4), and belongs in every
report next to it.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedModel

from specdef_cli.architectures.pairs import Side
from specdef_cli.architectures.symmetries import symmetric_pairs
from specdef_cli.attack.errors import NotApplicable
from specdef_cli.attack.variants.collapse import collapse
from specdef_cli.attack.variants.growth import Growth
from specdef_cli.attack.variants.inserted_layers import hardened_paths
from specdef_cli.attack.variants.unscale import unscale
from specdef_cli.checkpoint.slices import ScaledSlice, scale_slice
from specdef_cli.hardening.recognise import channel_exponents
from specdef_cli.runtime import SpecDefScaled


def rebalance(model: PreTrainedModel) -> Growth:
    """Equalize the sides of every symmetric pair of ``model`` in place; scales are taken out and
    inserted layers collapsed first.

    The factors are powers of two, so the function is kept bit for bit.

    Returns:
        How many pairs were changed, inserted ones included.

    Raises:
        NotApplicable: The model's family has no symmetric pair that is known here.
    """
    collapsed = Growth(0, 0, 0, 0)
    if any(isinstance(module, SpecDefScaled) for module in model.modules()):
        collapsed += unscale(model)
    if hardened_paths(model):
        collapsed += collapse(model)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}
    pairs = tuple(pair for pair in symmetric_pairs(model) if pair.channels > 1)
    if not pairs:
        raise NotApplicable(
            f"{type(model).__name__} has no symmetric pair that could be rebalanced",
            "Leave --rebalance out: this model was not folded.",
        )
    # All are measured before any is changed: they share tensors.
    exponents = {pair: channel_exponents(pair, parameters) for pair in pairs}
    changed = {pair: found for pair, found in exponents.items() if bool(found.any())}
    for pair, found in changed.items():
        for side in pair.sides:
            scale_slice(parameters[side.tensor], undoing_slice(side, found))
    touched = {side.tensor for pair in changed for side in pair.sides}
    count = sum(parameters[name].numel() for name in touched)
    return collapsed + Growth(len(changed), count, count, 0)


def undoing_slice(side: Side, exponents: Tensor) -> ScaledSlice:
    """The slice of one side's tensor that takes ``exponents`` (shape [channels]) out of it."""
    channels = exponents.nonzero().flatten().tolist()
    indices = [index for channel in channels for index in side.indices[channel]]
    powers = [-side.power * int(exponents[channel]) for channel in channels for _ in side.indices[channel]]
    return ScaledSlice(side.tensor, side.axis, side.block, tuple(indices), tuple(powers))
