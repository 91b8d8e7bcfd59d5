"""What an attacker who knows of folding does first: equalize both sides of every symmetric pair.

A fold multiplies some channels of a pair by a large power of two and divides their partners by it. That is an exact
symmetry of the function, so nothing forces an attacker to keep it. From the weights alone, without manifest or data,
the scale of each channel can be read off: how much larger one side is than its channels usually are, against how much
smaller the other side is. Dividing it out is as exact as the fold was, and gives back a model that trains like the
original. This is to folding what collapsing is to inserted layers (arXiv 2602.18868, Section 4), and belongs in every
report next to it.

A channel's size is the median of its weights' absolute values: a fold changes few channels of each pair, so that what
other pairs did to single entries of the same row or column does not move a median.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdef_cli.architectures.pairs import Side, SymmetricPair, symmetric_pairs
from specdef_cli.attack.errors import NotApplicable
from specdef_cli.attack.variants.collapse import collapse
from specdef_cli.attack.variants.growth import Growth
from specdef_cli.attack.variants.inserted_layers import hardened_paths
from specdef_cli.checkpoint.manifest import ScaledSlice
from specdef_cli.hardening.fold import scale_slice


def rebalance(model: PreTrainedModel) -> Growth:
    """Equalize the sides of every symmetric pair of ``model`` in place; inserted layers are collapsed first.

    The factors are powers of two, so the function is kept bit for bit.

    Returns:
        How many pairs were changed, inserted ones included.

    Raises:
        NotApplicable: The model's family has no symmetric pair that is known here.
    """
    collapsed = collapse(model) if hardened_paths(model) else Growth(0, 0, 0, 0)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}
    pairs = symmetric_pairs(model.config, {name: tuple(tensor.shape) for name, tensor in parameters.items()})
    pairs = tuple(pair for pair in pairs if pair.channels > 1)
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


def channel_exponents(pair: SymmetricPair, tensors: dict[str, Tensor]) -> Tensor:
    """The power of two by which each channel of a pair seems to be scaled, shape [channels], whole numbers.

    Half the difference between how far (in octaves) the channel stands out on the sides that a fold multiplies, and
    on those that it divides. What a channel weighs naturally stands out on both and cancels.

    Args:
        pair: With several channels.
        tensors: Parameters by name.
    """
    found = {1: [], -1: []}  # type: dict[int, list[Tensor]]
    for side in pair.sides:
        sizes = channel_sizes(side, tensors[side.tensor])
        if bool((sizes > 0).all()):
            octaves = sizes.log2()
            found[side.power].append(octaves - octaves.median())
    if not found[1] or not found[-1]:
        return torch.zeros(pair.channels, dtype=torch.int64)
    multiplied, divided = (torch.stack(found[power]).mean(0) for power in (1, -1))
    return ((multiplied - divided) / 2).round().long()


def channel_sizes(side: Side, tensor: Tensor) -> Tensor:
    """The median absolute weight of each channel, shape [channels]."""
    if side.indices is None:
        raise AssertionError(f"{side.tensor}: a pair of several channels names their indices")
    axis = side.axis
    if side.block is not None:
        tensor, axis = tensor[side.block], axis - 1
    index = torch.tensor(side.indices, device=tensor.device)  # [channels, entries]
    rows = tensor.movedim(axis, 0)[index.flatten()].float().abs()
    return rows.reshape(len(side.indices), -1).median(-1).values.cpu()


def undoing_slice(side: Side, exponents: Tensor) -> ScaledSlice:
    """The slice of one side's tensor that takes ``exponents`` (shape [channels]) out of it."""
    assert side.indices is not None
    channels = exponents.nonzero().flatten().tolist()
    indices = [index for channel in channels for index in side.indices[channel]]
    powers = [-side.power * int(exponents[channel]) for channel in channels for _ in side.indices[channel]]
    return ScaledSlice(side.tensor, side.axis, side.block, tuple(indices), tuple(powers))
