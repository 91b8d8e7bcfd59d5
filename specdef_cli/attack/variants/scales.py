"""Variants that move scales between weights: what undoes scales and folds, what converters do, and rates to match.

Interpretability tools merge the gains of norms into their readers (TransformerLens calls it ``fold_ln``). Converters
for low precision balance the range of neighbouring weights (cross-layer equalisation, Nagel et al. 2019, arXiv
1906.04721; SmoothQuant, arXiv 2211.10438; AWQ, arXiv 2306.00978). They do so to any checkpoint, and take most of a fold
out without knowing of it. Queries and keys, which none of these tools touch, stay as they are.

Both constructions work because one learning rate has to serve weights of very different scales (arXiv 2602.18868,
Section 4). An attacker who knows that gives each channel a rate in proportion to its size. The attack needs neither a
manifest nor the pairs: the size of a row or column is the median of its weights' absolute values, and a weight's rate
is the product of its row's and its column's, relative to the median row and column. That is the same as training a
rescaled weight, w = s·v with the rates s, and is written so: it then holds for every optimizer. The scales are powers
of two, which keeps the function bit for bit.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from specdef_cli.attack.table import NotApplicable
from specdef_cli.attack.variants.factored import collapse, hardened_paths
from specdef_cli.hardening.recognise import channel_exponents
from specdef_cli.model import SpecDefScaled
from specdef_cli.model.body import Side, SymmetricPair
from specdef_cli.model.skeleton import tied_parameters
from specdef_cli.model.symmetries import symmetric_pairs


def channel_values(side: Side, tensor: Tensor) -> Tensor:
    """The entries of each channel, shape [channels, entries], float64."""
    rows, index = _rows(side, tensor)
    return rows[index.flatten()].double().reshape(len(index), -1)


def multiply_channels(side: Side, tensor: Tensor, factors: Tensor) -> None:
    """Multiply each channel's slice in place."""
    rows, index = _rows(side, tensor)
    factors = factors.to(tensor.device)
    index, factors = index[factors != 1], factors[factors != 1]  # a fold has few, and the product is a copy in float64
    spread = factors[:, None].expand(index.shape).reshape(-1, *[1] * (rows.ndim - 1))
    rows[index.flatten()] = (rows[index.flatten()].double() * spread).to(rows.dtype)


def _rows(side: Side, tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A view with the channels' entries on the first axis, and where they are in it, shape [channels, positions]."""
    target, axis = (tensor, side.axis) if side.block is None else (tensor[side.block], side.axis - 1)
    return target.movedim(axis, 0), torch.tensor(side.indices, device=tensor.device)


def unscale(model: nn.Module) -> None:
    """Put the module inside of every :class:`SpecDefScaled` in its place, its weight unscaled."""
    wrapped = {path: module for path, module in model.named_modules() if isinstance(module, SpecDefScaled)}
    if not wrapped:
        raise NotApplicable(
            f"{type(model).__name__} has no scaled module", "Give a directory hardened with --method scale."
        )
    done: set[int] = set()
    for path, module in wrapped.items():
        if id(module.inflated.weight) not in done:
            done.add(id(module.inflated.weight))
            _multiply(module)
        model.set_submodule(path, module.inflated)


def _multiply(module: SpecDefScaled) -> None:
    weight = cast(Tensor, module.inflated.weight).detach()
    bias: Tensor | None = getattr(module.inflated, "bias", None)
    inputs = None if module.input_scale is None else module.input_scale.weight.detach()
    outputs = None if module.output_scale is None else module.output_scale.weight.detach()
    # A linear has its outputs on the first axis, an embedding and a Conv1D on the last, a norm has one axis.
    last = isinstance(module.inflated, nn.Embedding | Conv1D) or weight.dim() == 1
    if outputs is not None:
        weight.mul_(outputs if last else outputs[:, None])
        if bias is not None:
            bias.detach().mul_(outputs)
    if inputs is not None:
        weight.mul_(inputs[:, None] if last else inputs)


def rebalance(model: PreTrainedModel) -> None:
    """Equalize the sides of every symmetric pair of ``model`` in place; scales are taken out and
    inserted layers collapsed first.

    The factors are powers of two, so the function is kept bit for bit.
    """
    if any(isinstance(module, SpecDefScaled) for module in model.modules()):
        unscale(model)
    if hardened_paths(model):
        collapse(model)
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}
    pairs = tuple(pair for pair in symmetric_pairs(model) if pair.channels > 1)
    if not pairs:
        raise NotApplicable(
            f"{type(model).__name__} has no symmetric pair that could be rebalanced",
            "Leave --rebalance out: this model was not folded.",
        )
    # All are measured before any is changed: they share tensors.
    exponents = {pair: channel_exponents(pair, parameters.__getitem__) for pair in pairs}
    for pair, found in exponents.items():
        for side in pair.sides:
            multiply_channels(side, parameters[side.tensor], (-side.power * found.double()).exp2())


def equalise(model: PreTrainedModel) -> None:
    """Merge gains and equalise ranges in place. The function stays up to rounding."""
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
    for pair in pairs:
        factors = _gain_factors(pair, tensors) if pair.kind == "norm_readers" else _range_factors(pair, tensors)
        for side in pair.sides:
            multiply_channels(side, tensors[side.tensor], factors**side.power)


def _gain_factors(pair: SymmetricPair, tensors: dict[str, Tensor]) -> Tensor:
    """Factors that make every gain 1, shape [channels]; a gain of zero stays."""
    gain = next(side for side in pair.sides if side.power == 1 and side.tensor.endswith("weight"))
    sizes = channel_values(gain, tensors[gain.tensor])[:, 0]
    return torch.where(sizes != 0, 1 / sizes, 1.0)


def _range_factors(pair: SymmetricPair, tensors: dict[str, Tensor]) -> Tensor:
    """Factors that make a channel's largest weight the same on both sides, shape [channels]: √(r₋/r₊)."""
    ranges = {1: torch.zeros(pair.channels, dtype=torch.float64), -1: torch.zeros(pair.channels, dtype=torch.float64)}
    for side in pair.sides:
        if tensors[side.tensor].ndim > 1:  # biases follow
            values = channel_values(side, tensors[side.tensor]).abs().amax(1).cpu()
            ranges[side.power] = torch.maximum(ranges[side.power], values)
    present = (ranges[1] > 0) & (ranges[-1] > 0)
    return torch.where(present, (ranges[-1] / ranges[1]).sqrt(), 1.0)


class Scaled(nn.Module):
    """w = s·v.

    Args:
        scales: The factors of s, powers of two in shapes that w's broadcasts with: rows' and columns' are never
            multiplied out, which would take another copy of w.
    """

    def __init__(self, *scales: Tensor) -> None:
        super().__init__()
        self.count = len(scales)
        for number, scale in enumerate(scales):
            self.register_buffer(f"scale{number}", scale, persistent=False)

    @property
    def scales(self) -> tuple[Tensor, ...]:
        return tuple(self.get_buffer(f"scale{number}") for number in range(self.count))

    def forward(self, trained: Tensor) -> Tensor:
        for scale in self.scales:
            trained = trained * scale
        return trained

    def right_inverse(self, weight: Tensor) -> Tensor:
        for scale in self.scales:
            weight = weight / scale
        return weight


def scale_rates(model: nn.Module) -> None:
    """Give every weight of ``model`` that trains the scale of its row and column, in place.

    Embeddings keep one rate, since a row is a token there and no fold touches it; so do parameters that modules share,
    and convolutions.
    """
    shared = tied_parameters(model)
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding):
            continue
        scales = {
            name: _scales(module, name, parameter.detach())
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad and f"{path}.{name}".lstrip(".") not in shared and parameter.ndim <= 3
        }
        for name, found in scales.items():
            if any(bool((scale != 1).any()) for scale in found):
                parametrize.register_parametrization(module, name, Scaled(*found))


def channel_scales(weight: Tensor) -> tuple[Tensor, ...]:
    """The scales of rows [..., m, 1] and of columns [..., 1, n], powers of two.

    Args:
        weight: A matrix [m, n], or stacked ones [experts, m, n].
    """
    size = weight.float().abs()
    return _relative(size.median(-1, keepdim=True).values), _relative(size.median(-2, keepdim=True).values)


def parameter_name(name: str) -> str:
    """The name of a parameter before :func:`scale_rates`."""
    return name.replace(".parametrizations.", ".").removesuffix(".original")


def _scales(module: nn.Module, name: str, parameter: Tensor) -> tuple[Tensor, ...]:
    weight = getattr(module, "weight", None)
    if parameter.ndim >= 2:
        found = channel_scales(parameter)
    elif name == "bias" and isinstance(weight, Tensor) and weight.ndim == 2:
        # A bias is scaled as the outputs that it is added to; its own size says little, being near zero for many.
        rows, columns = channel_scales(weight.detach())
        found = ((columns if isinstance(module, Conv1D) else rows).flatten(),)
    else:
        found = (_relative(parameter.float().abs()),)
    return tuple(scale.to(parameter.dtype) for scale in found)


def _relative(sizes: Tensor) -> Tensor:
    """Sizes over their median in whole octaves; 1 where there is nothing to compare."""
    present = sizes > 0
    if not bool(present.any()):
        return torch.ones_like(sizes)
    return torch.where(present, (sizes / sizes[present].median()).log2().round(), 0.0).exp2()
