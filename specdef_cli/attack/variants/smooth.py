"""Somebody smoothed the model first, as quantizers of activations want it.

SmoothQuant (Xiao et al. 2023, arXiv 2211.10438) moves the range of what a norm gives out into what reads it: with
s = √(max|x| / max|w|) for each channel, the gain is divided by s and the readers' columns are multiplied by it. AWQ
(Lin et al. 2024, arXiv 2306.00978) searches an exponent for the same s. Published checkpoints have gone through it for
reasons of their own; a fold's factors between norms and readers are such an s, and go with it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdef_cli.architectures.pairs import SymmetricPair
from specdef_cli.architectures.symmetries import symmetric_pairs
from specdef_cli.attack.errors import NotApplicable
from specdef_cli.attack.variants.channels import channel_values, multiply_channels
from specdef_cli.attack.variants.growth import Growth
from specdef_cli.runtime.fixed_batch import fixed_inputs


def smooth(model: PreTrainedModel) -> Growth:
    """Move the range of activations after norms into their readers, in place. The function stays up to rounding.

    The activations are those of random inputs: all that is taken from them is how channels compare.

    Returns:
        How many norms were changed.

    Raises:
        NotApplicable: The model's family has no norm with readers that are known here.
    """
    pairs = [pair for pair in symmetric_pairs(model) if pair.kind == "norm_readers"]
    if not pairs:
        raise NotApplicable(
            f"{type(model).__name__} has no norm whose readers are known here", "Leave --variant smooth out."
        )
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}
    ranges = _ranges(model, {_norm(pair) for pair in pairs})
    for pair in pairs:
        weights = [
            channel_values(side, tensors[side.tensor]).abs().amax(1).cpu() for side in pair.sides if side.power < 0
        ]
        largest = torch.stack(weights).amax(0)
        given = ranges[_norm(pair)]
        factors = torch.where((largest > 0) & (given > 0), (largest / given).sqrt(), 1.0)
        for side in pair.sides:
            multiply_channels(side, tensors[side.tensor], factors**side.power)
    count = sum(tensors[name].numel() for name in {side.tensor for pair in pairs for side in pair.sides})
    return Growth(len(pairs), count, count, 0)


def _norm(pair: SymmetricPair) -> str:
    """Path of the norm."""
    gain = next(side.tensor for side in pair.sides if side.power > 0 and side.tensor.endswith(".weight"))
    return gain.removesuffix(".weight")


@torch.no_grad()
def _ranges(model: PreTrainedModel, norms: set[str]) -> dict[str, Tensor]:
    """The largest absolute value that each norm gives out in each channel, float64, shape [channels]."""
    found: dict[str, Tensor] = {}

    def watch(name: str, output: Tensor) -> None:
        found[name] = output.detach().abs().flatten(0, -2).amax(0).double().cpu()

    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: watch(name, output))
        for name in norms
    ]
    try:
        model(**fixed_inputs(model))
    finally:
        for hook in hooks:
            hook.remove()
    return found
