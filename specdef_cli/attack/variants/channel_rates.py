"""The informed attack that leaves the model as it is: a learning rate for every row and column.

Both constructions work because one learning rate has to serve weights of very different scales (arXiv 2602.18868,
Section 4). An attacker who knows that gives each channel a rate in proportion to its size. The attack needs neither a
manifest nor the pairs: the size of a row or column is the median of its weights' absolute values, and a weight's rate
is the product of its row's and its column's, relative to the median row and column.

That is the same as training a rescaled weight, w = s·v with the rates s, and is written so: it then holds for every
optimizer. The scales are powers of two, which keeps the function bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from specdef_cli.attack.variants.growth import Growth
from specdef_cli.model.skeleton import tied_parameters


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
        """The factors of s."""
        return tuple(self.get_buffer(f"scale{number}") for number in range(self.count))

    def forward(self, trained: Tensor) -> Tensor:
        """w."""
        for scale in self.scales:
            trained = trained * scale
        return trained

    def right_inverse(self, weight: Tensor) -> Tensor:
        """v."""
        for scale in self.scales:
            weight = weight / scale
        return weight


def scale_rates(model: nn.Module) -> Growth:
    """Give every weight of ``model`` that trains the scale of its row and column, in place.

    Embeddings keep one rate, since a row is a token there and no fold touches it; so do parameters that modules share,
    and convolutions.
    """
    shared = tied_parameters(model)
    layers = changed = 0
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding):
            continue
        scales = {
            name: _scales(module, name, parameter.detach())
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad and f"{path}.{name}".lstrip(".") not in shared and parameter.ndim <= 3
        }
        scales = {name: found for name, found in scales.items() if any(bool((scale != 1).any()) for scale in found)}
        for name, found in scales.items():
            changed += module.get_parameter(name).numel()
            parametrize.register_parametrization(module, name, Scaled(*found))
        layers += bool(scales)
    return Growth(layers, changed, changed, 0)


def channel_scales(weight: Tensor) -> tuple[Tensor, ...]:
    """The scales of rows [..., m, 1] and of columns [..., 1, n], powers of two.

    Args:
        weight: A matrix [m, n], or stacked ones [experts, m, n].
    """
    size = weight.float().abs()
    return _relative(size.median(-1, keepdim=True).values), _relative(size.median(-2, keepdim=True).values)


def parameter_name(name: str) -> str:
    """What a parameter was called before :func:`scale_rates`."""
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
