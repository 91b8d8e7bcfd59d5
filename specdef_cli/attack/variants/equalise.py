"""Somebody converted the model first: norm gains merged into what reads them, neighbouring layers equalised.

Interpretability tools merge the gains of norms into their readers (TransformerLens calls it ``fold_ln``). Converters
for low precision balance the range of an MLP's up and down projection, or of value and output (cross-layer
equalisation, Nagel et al. 2019, arXiv 1906.04721; SmoothQuant, arXiv 2211.10438, and AWQ, arXiv 2306.00978, move scales
between the same tensors). They do so to any checkpoint, for reasons of their own, and take most of a fold out without
knowing of it. Queries and keys, which none of these tools touch, stay as they are.
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


def equalise(model: PreTrainedModel) -> Growth:
    """Merge gains and equalise ranges in place. The function stays up to rounding.

    Returns:
        How many pairs were changed.

    Raises:
        NotApplicable: The model's family has no such pair that is known here.
    """
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}
    found = symmetric_pairs(model)
    # Gains first, as converters do: afterwards a column of up weighs what it does to its input.
    order = ("norm_readers", "up_down", "value_output")
    pairs = sorted((pair for pair in found if pair.kind in order), key=lambda pair: order.index(pair.kind))
    if not pairs:
        raise NotApplicable(
            f"{type(model).__name__} has no norm, MLP or attention that is known here and could be equalised",
            "Leave --variant equalise out.",
        )
    changed = 0
    touched: set[str] = set()
    for pair in pairs:
        factors = _gain_factors(pair, tensors) if pair.kind == "norm_readers" else _range_factors(pair, tensors)
        if bool((factors == 1).all()):
            continue
        for side in pair.sides:
            multiply_channels(side, tensors[side.tensor], factors**side.power)
            touched.add(side.tensor)
        changed += 1
    count = sum(tensors[name].numel() for name in touched)
    return Growth(changed, count, count, 0)


def _gain_factors(pair: SymmetricPair, tensors: dict[str, Tensor]) -> Tensor:
    """What makes every gain 1, shape [channels]; a gain of zero stays."""
    gain = next(side for side in pair.sides if side.power == 1 and side.tensor.endswith("weight"))
    sizes = channel_values(gain, tensors[gain.tensor]).reshape(pair.channels, -1)[:, 0]
    return torch.where(sizes != 0, 1 / sizes, 1.0)


def _range_factors(pair: SymmetricPair, tensors: dict[str, Tensor]) -> Tensor:
    """What makes the largest weight of a channel the same on both sides, shape [channels]: √(r₋/r₊)."""
    ranges = {1: torch.zeros(pair.channels, dtype=torch.float64), -1: torch.zeros(pair.channels, dtype=torch.float64)}
    for side in pair.sides:
        if tensors[side.tensor].ndim > 1:  # biases follow
            values = channel_values(side, tensors[side.tensor]).abs().amax(1).cpu()
            ranges[side.power] = torch.maximum(ranges[side.power], values)
    present = (ranges[1] > 0) & (ranges[-1] > 0)
    return torch.where(present, (ranges[-1] / ranges[1]).sqrt(), 1.0)
